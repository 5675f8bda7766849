# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.6", "flax>=0.10.4", "optax>=0.2.5", "gymnasium>=1.1", "ogbench>=1.2",
#     "tyro>=1.0.16", "wandb>=0.19", "numpy>=2.0", "tqdm>=4.66"]
#
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""Q-score matching (QSM).

Offline, from a fixed dataset alone: python THIS_FILE --env-id cube-double-play

QSM (arXiv 2312.11752) learns a critic Q by temporal differences, and a DDPM policy: a network
e_hat(s, x, k) that finds the noise in a noisy chunk of actions, and by whose N steps noise becomes
a chunk. What it finds is regressed on minus the gradient of Q at the noisy chunk. (If
exp(inv_temp Q) were the density there, the noise would be sqrt(1 - abar_k) times that.)

(1) critic     y = R + discount^H m (mean_K Q'(s', a') - rho std_K Q'(s', a'))
               L_Q = mean (Q_k(s, a) - y)^2
(2) schedule   alpha_k = exp(-0.1 / N - 4.95 (2 k - 1) / N^2),   abar_k = prod_{j <= k} alpha_j
(3) sampling   x_hat = (x_k - sqrt(1 - abar_k) e_hat(s, x_k, k)) / sqrt(abar_k),   k = N .. 1
               x_{k-1} = clip(x_hat + sqrt(1 - alpha_k) z_k);   no noise for k = 1; clip to [-1, 1]
(4) imitation  x_k = sqrt(abar_k) a + sqrt(1 - abar_k) e;   L_BC = mean (e_hat(s, x_k, k) - e)^2
(5) policy     L = mean (e_hat(s, x_k, k) + inv_temp grad_x mean_K Q'(s, x_k))^2 + alpha L_BC

Q': target copy. R: discounted reward of the chunk; s': observation after it; a': a chunk of the
policy there; m: 0 if the chunk solves the task, else 1. (1), (4) and (5) leave out chunks that run
over the end of an episode. (3) goes on from x_hat itself, not from the mean of x_{k-1} given x_hat:
this, the schedule and (4) are what the code runs that the published curves of arXiv 2601.14234 come
from.

"Choice:" marks what the paper leaves open. Other methods stand in files like this one: what is not
used here is there for them.

Shapes: B batch, O observation, A action, H horizon, D = H A, K critics, T steps, N transitions.

Nearest: qam_diffusion_variant.py.

Differs from qam_offline.py: OWN, Args, Networks, make_networks, policy_actions, sample_actions,
critic_loss, policy_loss, init_state.
"""

import csv
import dataclasses
import datetime
import fcntl
import glob
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
import tyro
from tqdm import tqdm

# ------------------------------------------------------------------------------------- arguments
# The settings of all methods, and below those of this one.
SHARED = ("horizon", "discount", "rho", "sparse")
DOMAINS = {  # Choice: the last two rows, for domains that the paper does not have
    "cube-double-play": (5, 0.99, 0.5, False),
    "cube-triple-play": (5, 0.99, 0.5, False),
    "cube-quadruple-play": (5, 0.99, 0.5, False),
    "scene-play": (5, 0.99, 0.5, True),
    "puzzle-3x3-play": (5, 0.99, 0.5, True),
    "puzzle-4x4-play": (5, 0.99, 0.5, True),
    "antmaze-large-navigate": (1, 0.99, 0.5, False),
    "antmaze-giant-navigate": (1, 0.995, 0.5, False),
    "humanoidmaze-medium-navigate": (1, 0.995, 0.0, False),
    "humanoidmaze-large-navigate": (1, 0.995, 0.0, False),
    "another manipulation": (5, 0.99, 0.5, False),
    "another maze": (1, 0.99, 0.5, False),
}
PAPER_USED_100M = ("cube-quadruple-play", "puzzle-4x4-play")  # transitions, not the default dataset
# This method's coefficients, in the order of DOMAINS.
OWN = {
    "alpha": [10.0, 10.0, 10.0, 30.0, 30.0, 1.0, 10.0, 10.0, 30.0, 30.0, 10.0, 10.0],
    "inv_temp": [1.0, 10.0, 1.0, 3.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 1.0, 1.0],
}
# Whole numbers must be at least 1, but for these.
LEAST = {
    "seed": 0,
}


def available_cores():
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass
class Args:
    """Train a policy on an OGBench dataset. Settings that are None take the paper's values.

    On a GPU: --env-id cube-double-play

    On a laptop, in minutes: --env-id pointmaze-medium-navigate-task1 --hidden-dims 128 128 128
    --num-critics 2 --diffusion-steps 5 --tau 0.02 --learning-rate 1e-3 --horizon 10
    --offline-steps 10000 --eval-every 2500 --log-every 500 --checkpoint-every 2500
    """

    env_id: str = "cube-double-play"  # domain, with its task (scene-play-task1), or an OGBench id
    seed: int = 1  # of the first (or only) run
    num_seeds: int = 1  # seeds seed, seed + 1, .. are trained side by side in this process
    offline_steps: int = 1_000_000  # gradient steps
    batch_size: int = 256  # action chunks per gradient step
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # width of each hidden layer
    num_critics: int = 10  # critics in the ensemble
    horizon: int | None = None  # actions in a chunk: manipulation 5, mazes 1
    diffusion_steps: int = 10  # steps from noise to action, at least 2
    discount: float | None = None  # of an environment step: 0.99, large mazes 0.995
    tau: float = 0.005  # target-update rate
    rho: float | None = None  # pessimism, in deviations of the ensemble: 0.5, humanoidmaze 0
    learning_rate: float = 3e-4  # of Adam
    max_grad_norm: float = 1.0  # limit on the joint gradient's norm
    best_of_n: int = 1  # chunks drawn when acting, of which the one with the highest Q is executed
    sparse: bool | None = None  # rewards that are not 0 become -1: scene and puzzle True

    alpha: float | None = None  # weight of imitation against Q: the paper's are 1 to 30
    inv_temp: float | None = None  # inverse temperature, weight of Q: the paper's are 1 to 10

    eval_every: int = 50_000  # steps between evaluations
    eval_episodes: int = 50  # episodes per evaluation
    eval_envs: int = available_cores()  # environment processes; does not change the score
    log_every: int = 5_000  # steps between rows of metrics.csv
    checkpoint_every: int = 50_000  # steps between checkpoints
    dataset_dir: str | None = None  # folder of the dataset's npz file, or of its shards
    dataset_replace_every: int = 1_000  # gradient steps on one shard
    run_dir: str = "runs"  # folder in which the run makes its own
    resume: str | None = None  # folder of the run to go on with
    track: bool = False  # log to Weights & Biases (WANDB_MODE=offline works without an account)
    wandb_project: str = "qam"  # project there

    def __post_init__(self):
        """Fill in the paper's values; raises ValueError for what can't be used."""
        domain, _, _ = parse_env_id(self.env_id)
        for name, value in paper_values(domain).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

        for name, value in vars(self).items():
            least = LEAST.get(name, 1)
            if type(value) is int and value < least:  # no bool
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.diffusion_steps < 2:
            raise ValueError("--diffusion-steps must be at least 2")
        if min(self.hidden_dims, default=0) < 1:
            raise ValueError("--hidden-dims must be one or more widths, each at least 1")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"--discount must be from 0 to 1, not {self.discount}")
        for name in ("run_dir", "dataset_dir", "resume"):
            path = getattr(self, name)
            if path:
                setattr(self, name, os.path.abspath(os.path.expanduser(path)))


# -------------------------------------------------------------------------------------- networks


class MLP(nn.Module):
    """Dense -> GELU (-> LayerNorm) for each hidden layer, then Dense. (..., I) -> (..., output)."""

    hidden_dims: tuple[int, ...]
    output_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
        for width in self.hidden_dims:
            x = nn.gelu(dense(width)(x), approximate=True)
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return dense(self.output_dim)(x)


class MishMLP(nn.Module):
    """Dense -> mish for each hidden layer, then Dense. (..., I) -> (..., output)."""

    hidden_dims: tuple[int, ...]
    output_dim: int

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
        for width in self.hidden_dims:
            x = jax.nn.mish(dense(width)(x))
        return dense(self.output_dim)(x)


class FourierFeatures(nn.Module):
    """Waves of learned frequency: k (..., 1) -> (..., 64)."""

    @nn.compact
    def __call__(self, k):
        kernel = self.param("kernel", nn.initializers.normal(0.2), (32, 1))  # w
        angles = 2 * jnp.pi * k @ kernel.T
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FourierNoisePredictor(nn.Module):
    """e_hat(s, x, k): (..., O), (..., D), (..., 1) or a number -> (..., D)."""

    hidden_dims: tuple[int, ...]
    action_dim: int  # D

    @nn.compact
    def __call__(self, observations, x, k):
        observations = jnp.broadcast_to(observations, (*x.shape[:-1], observations.shape[-1]))
        k = jnp.broadcast_to(k, (*x.shape[:-1], 1)).astype(x.dtype)
        features = FourierFeatures(name="FourierFeatures_0")(k)
        time = MishMLP(self.hidden_dims[:-1], self.hidden_dims[-1], name="MLP_0")(features)
        inputs = jnp.concatenate([x, observations, time], axis=-1)
        return MishMLP(self.hidden_dims, self.action_dim, name="MLP_1")(inputs)


class Critic(nn.Module):
    """K critics Q_k(s, a): (..., O), (..., D) -> (K, ...).

    Another critic (a categorical one, say) returns its mean here and changes a line of critic_loss.
    sample_actions reads O + D off its first layer, Dense_0.
    """

    hidden_dims: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, observations, actions):
        ensemble = nn.vmap(
            MLP,
            variable_axes={"params": 0},  # every parameter has a leading axis K
            split_rngs={"params": True},
            in_axes=None,
            axis_size=self.num_critics,
        )
        mlp = ensemble(self.hidden_dims, 1, layer_norm=True)
        nn.share_scope(self, mlp)  # Dense_0, Dense_1, .. again
        q = mlp(jnp.concatenate([observations, actions], axis=-1))  # (K, ..., 1)
        return q[..., 0]


class Networks(NamedTuple):
    critic: Critic
    policy: FourierNoisePredictor  # e_hat


def make_networks(args, observation_dim, action_dim):
    """The modules; `action_dim` is A, of one action."""
    policy = FourierNoisePredictor(args.hidden_dims, args.horizon * action_dim)
    return Networks(Critic(args.hidden_dims, args.num_critics), policy)


# ------------------------------------------------------------------------------ flow and adjoint


def vp_schedule(num_steps):
    """Equation (2): alpha_k for k = 1 .. N (N,), abar_k for k = 0 .. N (N+1,)."""
    k = np.arange(1, num_steps + 1)
    alpha = np.exp(-0.1 / num_steps - 4.95 * (2 * k - 1) / num_steps**2)
    abar = np.concatenate([[1.0], np.cumprod(alpha)])
    dtype = jnp.result_type(float)  # float32, unless JAX is set to 64 bits
    return jnp.asarray(alpha, dtype), jnp.asarray(abar, dtype)


def sample_by_prediction(epsilon, noise):
    """Equation (3): x_N, z_N .. z_2 (N, ..., D) -> x_0 (..., D) in [-1, 1]."""
    num_steps = len(noise)
    alpha, abar = vp_schedule(num_steps)

    def step(x, k_and_z):
        k, z = k_and_z
        x_hat = (x - jnp.sqrt(1 - abar[k]) * epsilon(x, k)) / jnp.sqrt(abar[k])
        return jnp.clip(x_hat + jnp.sqrt(1 - alpha[k - 1]) * z, -1, 1), None

    zs = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])  # none for k = 1
    x, _ = jax.lax.scan(step, noise[0], (jnp.arange(num_steps, 0, -1), zs), unroll=10)
    return x


def policy_actions(args, networks, params, observations, noise):
    """The policy, by (3): observations (..., O), noise (N, ..., D) -> chunks (..., D)."""
    epsilon = partial(networks.policy.apply, {"params": params["policy"]}, observations)
    return sample_by_prediction(epsilon, noise)


def sample_actions(args, networks, params, observations, key):
    """Act: observations (B, O) -> chunks (B, H*A) in [-1, 1], the best of `best_of_n` by mean Q.

    `params` are those of a TrainState, with its target_params under "target".
    """
    # The critic's first layer sees O + D numbers.
    action_dim = params["critic"]["Dense_0"]["kernel"].shape[-2] - observations.shape[-1]  # D
    shape = (args.diffusion_steps, args.best_of_n, len(observations), action_dim)
    noise = jax.random.normal(key, shape)
    observations = jnp.broadcast_to(observations, (args.best_of_n, *observations.shape))
    actions = policy_actions(args, networks, params, observations, noise)  # (n, B, D)
    if args.best_of_n == 1:
        return actions[0]
    q = networks.critic.apply({"params": params["critic"]}, observations, actions)  # (K, n, B)
    best = q.mean(axis=0).argmax(axis=0)  # (B,)
    return actions[best, jnp.arange(len(best))]


# ---------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, H*A)
    rewards: jax.Array  # (B,) discounted sum over the chunk
    masks: jax.Array  # (B,) 0 if the task is solved in the chunk: no bootstrap
    valid: jax.Array  # (B,) 1 if the whole chunk lies in one episode
    next_observations: jax.Array  # (B, O)


def td_target(rewards, masks, next_q, discount_h, rho):
    """Equation (1): rewards (B,), masks (B,), next_q (K, B) -> y (B,)."""
    pessimistic = next_q.mean(axis=0) - rho * next_q.std(axis=0)
    return rewards + discount_h * masks * pessimistic


def critic_loss(args, networks, params, target_params, batch, key):
    """Equation (1): (loss, metrics)."""
    noise = jax.random.normal(key, (args.diffusion_steps, *batch.actions.shape))
    acting = {**params, "target": target_params}  # other methods act by target copies
    # As in the paper, a' is one draw, whatever best_of_n is.
    next_actions = policy_actions(args, networks, acting, batch.next_observations, noise)
    next_actions = jax.lax.stop_gradient(next_actions)  # a' (B, D)
    target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
    next_q = target_q(batch.next_observations, next_actions)  # (K, B)
    y = td_target(batch.rewards, batch.masks, next_q, args.discount**args.horizon, args.rho)
    q = networks.critic.apply({"params": params["critic"]}, batch.observations, batch.actions)
    # `valid` leaves out chunks that run over the end of an episode. The mean over the batch divides
    # by B, not by the number of valid chunks, so that a chunk weighs the same in every batch.
    loss = jnp.mean(batch.valid * (q - y) ** 2)
    return loss, {"critic_loss": loss, "q_mean": q.mean()}


def policy_loss(args, networks, params, target_params, batch, q, target_q, key):
    """Equations (4), (5): (loss, metrics).

    q and target_q map (s, a) to (K, B) and are held constant; QSM uses target_q alone.
    """
    key_e, key_k = jax.random.split(key)
    observations = batch.observations

    # Noisy actions, and the noise that is found in them.
    e = jax.random.normal(key_e, batch.actions.shape)  # (B, D)
    k = jax.random.randint(key_k, (len(e),), 1, args.diffusion_steps + 1)  # (B,)
    _, abar = vp_schedule(args.diffusion_steps)
    signal = jnp.sqrt(abar[k])[:, None]  # (B, 1)
    spread = jnp.sqrt(1 - abar[k])[:, None]  # (B, 1)
    x_k = signal * batch.actions + spread * e  # (B, D)
    eps = networks.policy.apply({"params": params["policy"]}, observations, x_k, k[:, None])
    bc_loss = jnp.mean(batch.valid * jnp.mean((eps - e) ** 2, axis=-1))

    # The critic's gradient there. In the sum over the batch, term b depends on row b alone.
    def total_value(x):
        return target_q(observations, x).mean(axis=0).sum()

    g = jax.grad(total_value)(x_k)  # (B, D)

    # Policy: the noise that is found should point against the gradient.
    error = eps + args.inv_temp * g
    actor_loss = jnp.mean(batch.valid * jnp.mean(error**2, axis=-1))

    metrics = {"bc_loss": bc_loss, "actor_loss": actor_loss}
    return args.alpha * bc_loss + actor_loss, metrics


# ------------------------------------------------------------------------------ state and update


class TrainState(NamedTuple):
    params: dict  # by network
    target_params: dict  # of those networks that have a target copy
    opt_state: Any
    step: jax.Array  # () gradient steps taken
    key: jax.Array  # () never changes; step n draws with fold_in(key, n)


def make_optimizer(args):
    """One Adam for all networks, after their joint gradient is clipped. Its state: opt_state."""
    return optax.chain(
        optax.clip_by_global_norm(args.max_grad_norm),
        optax.adam(args.learning_rate),
    )


def init_state(args, networks, observation_dim, action_dim, key):
    """A TrainState of fresh parameters; `action_dim` is A. Targets start as copies."""
    observations = jnp.zeros((1, observation_dim))
    actions = jnp.zeros((1, args.horizon * action_dim))
    key, key_critic, key_policy = jax.random.split(key, 3)
    params = {
        "critic": networks.critic.init(key_critic, observations, actions)["params"],
        "policy": networks.policy.init(key_policy, observations, actions, 0.0)["params"],
    }
    copied = {"critic": params["critic"]}
    target_params = jax.tree.map(jnp.copy, copied)
    opt_state = make_optimizer(args).init(params)
    return TrainState(params, target_params, opt_state, jnp.zeros((), jnp.int32), key)


def update(args, networks, state, batch, key):
    """One gradient step on the sum of all losses: (state, metrics)."""
    key_critic, key_policy = jax.random.split(key)
    target_params = state.target_params
    q = partial(networks.critic.apply, {"params": state.params["critic"]})
    target_q = partial(networks.critic.apply, {"params": target_params["critic"]})

    def total_loss(params):
        shared = (args, networks, params, target_params, batch)
        loss_q, metrics_q = critic_loss(*shared, key_critic)
        loss_pi, metrics_pi = policy_loss(*shared, q, target_q, key_policy)
        return loss_q + loss_pi, {**metrics_q, **metrics_pi}

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = make_optimizer(args).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # As in the paper's code, targets move towards the parameters from before this step.
    before = {name: state.params[name] for name in target_params}
    target_params = optax.incremental_update(before, target_params, args.tau)
    return TrainState(params, target_params, opt_state, state.step + 1, state.key), metrics


def train_steps(args, networks, state, dataset, num_steps):
    """`num_steps` updates in one dispatch: (state, metrics of the last update)."""

    def one_update(_, carry):
        state, _ = carry
        key_indices, key_update = jax.random.split(jax.random.fold_in(state.key, state.step))
        num_starts = len(dataset.rewards) - args.horizon + 1
        indices = jax.random.randint(key_indices, (args.batch_size,), 0, num_starts)
        batch = gather_chunks(dataset, indices, args.horizon, args.discount)
        return update(args, networks, state, batch, key_update)

    # The loop has to begin with metrics of the right shapes.
    _, shapes = jax.eval_shape(one_update, 0, (state, None))
    metrics = jax.tree.map(jnp.zeros_like, shapes)
    return jax.lax.fori_loop(0, num_steps, one_update, (state, metrics))


def over_seeds(function, num_seeds):
    """`function(state, *rest)` for states with a leading axis of seeds, which share `rest`."""

    def for_all(states, *rest):
        if num_seeds > 1:
            return jax.vmap(lambda state: function(state, *rest))(states)
        # One seed alone is a fifth faster without vmap.
        results = function(jax.tree.map(lambda x: x[0], states), *rest)
        return jax.tree.map(lambda x: x[None], results)

    return for_all


# -------------------------------------------------------------------------- data and environment


class Dataset(NamedTuple):
    observations: Any  # (N, O)
    actions: Any  # (N, A)
    rewards: Any  # (N,) in OGBench -1 until the task is solved; cubes: minus the number misplaced
    masks: Any  # (N,) 0 where the task is solved: no bootstrap
    terminals: Any  # (N,) 1 at the last transition of an episode
    next_observations: Any  # (N, O)


def gather_chunks(dataset, indices, horizon, discount):
    """Chunks of `horizon` transitions from `indices` (B,) on (arXiv 2507.07969).

    Where an episode ends in a chunk, rewards are summed and the next observation is taken up to
    there. Only losses that do not use `valid` see the difference.
    """
    steps = indices[:, None] + jnp.arange(horizon)  # (B, H)
    ends = dataset.terminals[steps]
    valid = jnp.cumsum(ends, axis=1) - ends == 0  # (B, H) no episode has ended before that step
    last = indices + valid.sum(axis=1) - 1  # (B,) last valid step
    discounts = discount ** jnp.arange(horizon)
    return Batch(
        observations=dataset.observations[indices],
        actions=dataset.actions[steps].reshape(len(indices), -1),
        rewards=jnp.sum(discounts * dataset.rewards[steps] * valid, axis=1),
        masks=jnp.where(valid, dataset.masks[steps], 1.0).min(axis=1),
        valid=valid[:, -1].astype(jnp.float32),
        next_observations=dataset.next_observations[last],
    )


# OGBench: the functions from here to load_dataset and the table DOMAINS are made for it. Another
# environment needs flat observations, actions in [-1, 1], the six arrays of a Dataset and, for the
# success rate, `info["success"]`: docs/own_data.md has the change.


def parse_env_id(env_id):
    """`env_id` -> (domain, gymnasium id, dataset name); raises ValueError for what is none."""
    # For example cube-quadruple-play-100m, scene-play-task1, cube-double-play-singletask-task2-v0.
    pattern = r"([\s\S]*?)(-100m)?(-singletask)?(-task\w+)?(-v0)?"
    domain, size, _, task, _ = re.fullmatch(pattern, env_id).groups("")
    name = domain.rpartition("-")[0]  # without the kind of data: play, navigate, ..
    if name.startswith("visual"):
        raise ValueError(f"--env-id {env_id}: only domains with state observations are supported")
    environment_id = f"{name}-singletask{task}-v0"
    try:
        gymnasium.spec(environment_id)
    except gymnasium.error.Error as error:
        examples = "Domains are cube-double-play, scene-play, ..; their tasks are task1 to task5"
        raise ValueError(f"--env-id {env_id}: {error} {examples}") from error
    return domain, environment_id, f"{domain}{size}-v0"


def paper_values(domain):
    """{flag: value} of a domain, by the tables above."""
    if domain not in DOMAINS:
        kind = "manipulation" if domain.startswith(("cube", "scene", "puzzle")) else "maze"
        domain = f"another {kind}"
    row = list(DOMAINS).index(domain)
    values = dict(zip(SHARED, DOMAINS[domain], strict=True))
    return values | {name: column[row] for name, column in OWN.items()}


def make_env(args):
    """The environment: observations (O,), actions (A,) in [-1, 1]."""
    _, environment_id, _ = parse_env_id(args.env_id)
    warnings.simplefilter("ignore")  # of missing displays and rounded bounds, in each process
    env = gymnasium.make(environment_id)
    # In place of a property of the class, which makes a new, unseeded action space each time.
    type(env.unwrapped).action_space = env.action_space
    return env


def find_dataset(args):
    """The dataset's file, or its shards. Downloads or collects what is missing."""
    domain, _, name = parse_env_id(args.env_id)
    if args.dataset_dir:
        return find_shards(Path(args.dataset_dir), domain, name)
    official = Path(f"~/.ogbench/data/{name}.npz").expanduser()
    collected = Path(f"~/.ogbench/collected/{name}.npz").expanduser()
    for path in (official, collected):
        if path.exists():
            return [path]
    if download(name, official):
        return [official]
    tool = "tools/collect_dataset.py"
    for folder in Path(__file__).resolve().parents[:2]:
        if (folder / tool).exists():
            print(f"collecting 100 episodes of {name} with OGBench's scripted policies")
            subprocess.run([sys.executable, folder / tool, name, "--episodes", "100"])
    if not collected.exists():
        fail(f"no dataset: put {name}.npz into {official.parent}, or collect it with {tool}")
    return [collected]


def find_shards(folder, domain, name):
    """NAME.npz of the folder, or all its npz files that may be shards of this domain's dataset."""
    if (folder / f"{name}.npz").exists():
        return [folder / f"{name}.npz"]
    environments = tuple(id.removesuffix("singletask-v0") for id in gymnasium.registry)
    shards = []
    files = sorted(glob.glob("*.npz", root_dir=folder))  # no hidden files
    for file in files:
        foreign = file.startswith(environments) and not file.startswith(domain)
        if not foreign and not file.endswith("-val.npz"):
            shards.append(folder / file)
    if not shards:
        fail(f"--dataset-dir {folder} holds {files}: none is {name}.npz, or a shard of {domain}")
    for path in shards:
        if not zipfile.is_zipfile(path):  # cut short: the directory is at the end
            fail(f"{path} is no whole npz file: mend it or take it away")
    return shards


def download(name, path):
    """Fetch the official file; it takes its name only if it has arrived whole."""
    url = f"{ogbench.utils.DATASET_URL}/{name}.npz"
    part = Path(f"{path}.{os.getpid()}.part")
    print(f"downloading {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=20) as answer:
            part.write_bytes(answer.read())
        if zipfile.ZipFile(part).testzip():
            raise OSError("a checksum in it is wrong")
        os.replace(part, path)
        return True
    except (OSError, http.client.HTTPException, zipfile.BadZipFile) as error:
        print(f"{name}.npz can't be downloaded ({error})")
        part.unlink(missing_ok=True)
        return False


def load_dataset(args, path, env):
    """Read a file and label it with the task's rewards: numpy arrays, float32."""
    damaged = (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    )
    try:
        data = ogbench.load_dataset(str(path), add_info=True)
        ogbench.relabel_utils.relabel_dataset(args.env_id, env, data)
    except damaged as error:
        fail(
            f"{path} can't be read: {error!r}. A field is missing, or the file is damaged: delete"
            " it or name other data"
        )

    problem = None
    dims = (data["observations"].shape[1:], data["actions"].shape[1:])
    if dims != (env.observation_space.shape, env.action_space.shape):
        problem = f"its observations and actions have shapes {dims}, not the environment's"
    elif len(data["next_observations"]) != len(data["actions"]):
        problem = "its last row does not end an episode"
    elif len(data["actions"]) < args.horizon:
        problem = f"its {len(data['actions'])} transitions are fewer than --horizon"
    elif not all(np.isfinite(array).all() for array in data.values()):
        problem = "it holds numbers that are not finite"
    if problem:
        fail(f"{path} can't be used for {args.env_id}: {problem}. Name other data")

    if args.sparse:
        data["rewards"] = np.where(data["rewards"] != 0, -1.0, 0.0)
    # As in the paper's code. Some methods invert a tanh here.
    data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)
    return Dataset(*(np.asarray(data[field], np.float32) for field in Dataset._fields))


def load_shard(args, paths, step, env):
    """The shard whose turn it is at a step, on the device."""
    order = np.random.default_rng(args.seed).permutation(len(paths))
    turn = step // args.dataset_replace_every % len(paths)
    return jax.device_put(load_dataset(args, paths[order[turn]], env))


# ------------------------------------------------------------------------------------ evaluation


class ChunkedEpisode(gymnasium.Wrapper):
    """An environment whose step executes a chunk; `info` has the episode's scores so far."""

    def __init__(self, args):
        super().__init__(make_env(args))
        self.action_space = gymnasium.spaces.Box(
            -1, 1, (args.horizon * self.env.action_space.shape[0],)
        )

    def reset(self, *, seed, options=None):
        # The episode depends on its seed alone: OGBench's resets draw from these two as well.
        np.random.seed(seed)
        self.env.action_space.seed(seed)
        self.scores = np.zeros(3)  # success, return, length
        return self.env.reset(seed=seed)

    def step(self, chunk):
        for action in chunk.reshape(-1, *self.env.action_space.shape):
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.scores[0] = info.get("success", 0.0)  # at the last step, as OGBench counts it
            self.scores[1] += reward
            self.scores[2] += 1
            if terminated or truncated:
                break
        return observation, reward, terminated, truncated, {"scores": self.scores}


def start_eval_envs(args):
    """The processes that play the evaluation's episodes; to be called in a thread of its own."""
    # They inherit this thread's mask: Ctrl-C in a terminal is for the main process alone. (The
    # resource tracker would clear the mask when it starts, so it starts first.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return gymnasium.vector.AsyncVectorEnv(
        [partial(ChunkedEpisode, args)] * min(args.eval_envs, args.eval_episodes),
        context="spawn",  # a forked process would hold locks of JAX's threads
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
    )


def make_act(args, networks):
    """act(params, observations (N, O), chunks (N,), key) -> chunks of actions (N, H*A).

    The noise of a row depends on its number and on how many chunks its episode has executed.
    """

    def act(params, observations, chunks, key):
        def act_alone(observation, episode, chunk):
            noise_key = jax.random.fold_in(jax.random.fold_in(key, episode), chunk)
            return sample_actions(args, networks, params, observation[None], noise_key)[0]

        return jax.vmap(act_alone)(observations, jnp.arange(len(chunks)), chunks)

    return jax.jit(act)


def evaluate(args, act, params, envs, key):
    """Play episodes 0 .. `eval_episodes` - 1: their mean scores; unfinished if a stop comes.

    Choice: of E processes, process i plays episodes i, i + E, .., so that short episodes do not
    count more. The policy always sees one row per episode, for a matrix product of another shape
    would round in another way. So the score does not depend on E.
    """
    num_episodes = args.eval_episodes
    results = np.zeros((num_episodes, 3))
    chunks = np.zeros(num_episodes, int)  # executed so far of each episode
    observations = np.zeros((num_episodes, *envs.single_observation_space.shape))
    episode = np.arange(envs.num_envs)  # (E,) the one that each process plays
    playing = episode < num_episodes
    restart = playing
    while playing.any() and not stop_signals:
        if restart.any():
            current, _ = envs.reset(seed=episode.tolist(), options={"reset_mask": restart})
        observations[episode[playing]] = current[playing]
        actions = np.asarray(act(params, observations, chunks, key))  # (episodes, H*A)
        # A process that has played all of its episodes gets any row, and is not counted.
        current, _, terminated, truncated, info = envs.step(actions[episode % num_episodes])
        chunks[episode[playing]] += 1
        ended = playing & (terminated | truncated)
        results[episode[ended]] = info["scores"][ended]
        episode = episode + envs.num_envs * ended
        playing = episode < num_episodes
        restart = ended & playing
    success, total, length = results.mean(axis=0)
    return {"success_rate": success, "return": total, "length": length, "episodes": num_episodes}


def evaluate_seeds(args, act, envs, run_dir, states, step):
    """A row of eval.csv for each seed. `envs` is the future of start_eval_envs."""
    rows = []
    try:
        for i in range(args.num_seeds):
            started = time.perf_counter()
            state = jax.tree.map(lambda x: x[i], states)  # noqa: B023
            params = {**state.params, "target": state.target_params}
            key = jax.random.fold_in(state.key, 2**31 - 1)  # no update has this number
            scores = evaluate(args, act, params, envs.result(), key)
            seconds = round(time.perf_counter() - started, 1)
            row = {"step": step, "seed": args.seed + i, "phase": "offline", **scores}
            rows.append({**row, "wall_seconds": seconds})
    except (EOFError, ConnectionError):
        sys.unraisablehook = lambda _: None  # gymnasium's clean-up complains of the dead process
        for process in active_children():  # or the others complain, too
            process.terminate()
        time.sleep(1)  # a batch system stops all processes at once: its signal may be on the way
        if not stop_signals:
            fail(
                "an evaluation process has died, perhaps for want of memory (see --eval-envs);"
                f" the checkpoint is saved; {how_to_resume(run_dir)}",
                status=1,
            )
    return rows


# ------------------------------------------------------------------------------------ run folder

stop_signals = []  # numbers of the signals that asked the run to stop

# What a resumed run may change: the state after n updates does not depend on it. (The place of
# the data may change, but not its size.)
MAY_CHANGE = (
    "offline_steps",
    "eval_every",
    "eval_episodes",
    "eval_envs",
    "log_every",
    "checkpoint_every",
    "dataset_dir",
    "run_dir",
    "resume",
    "track",
    "wandb_project",
)

# JAX's settings that change results: kept in args.json, and the same when a run is resumed.
JAX_SETTINGS = ("jax_enable_x64", "jax_default_prng_impl", "jax_default_matmul_precision")


def fail(message, status=2):
    """Print one sentence and exit: status 2 for what the user can put right, else 1."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def how_to_resume(run_dir):
    return "to go on: " + shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])


def write_file(path, content):
    """Write a file so that it is there whole or not at all, whenever the process dies."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        fail(
            f"writing to {path} failed ({error}); what was saved before is whole;"
            f" {how_to_resume(path.parent)}",
            status=1,
        )


def save_checkpoint(run_dir, states):
    """checkpoint.msgpack: 32 bytes of SHA-256, then all that is needed to go on."""
    states = jax.device_get(states._replace(key=jax.random.key_data(states.key)))
    content = flax.serialization.to_bytes({"states": states})
    write_file(run_dir / "checkpoint.msgpack", hashlib.sha256(content).digest() + content)


def load_checkpoint(run_dir):
    """{"states": nested dicts of numpy arrays, leading axis the seeds}; no code can be in it."""
    path = Path(f"{run_dir}/checkpoint.msgpack")
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        fail(f"{path} is {'damaged' if content else 'not there yet'}: start the run anew")
    return flax.serialization.msgpack_restore(content[32:])


def restore(states, checkpoint):
    """The states of a checkpoint, in the form of `states`. Keys are kept as numbers."""
    states = flax.serialization.from_state_dict(states, checkpoint["states"])
    return states._replace(key=jax.random.wrap_key_data(states.key))


class RunLog:
    """metrics.csv and eval.csv, lines on the screen and, with --track, Weights & Biases."""

    def __init__(self, args, run_dir, step):
        self.run_dir = run_dir
        self.rows = {"metrics": [], "eval": []}
        for name in self.rows:
            path = run_dir / f"{name}.csv"
            if path.exists():
                rows = csv.DictReader(path.open())
                # What a killed run wrote after its last checkpoint will come again.
                self.rows[name] = [row for row in rows if int(row["step"]) <= step]
        self.tracker = None
        if args.track:
            import wandb

            # The same id makes one curve of a run, however often it is resumed.
            self.tracker = wandb.init(
                project=args.wandb_project,
                id=run_dir.name,
                resume="allow",
                dir=run_dir,
                config=vars(args),
            )

    def append(self, name, rows):
        """Add new rows to a file, which is written whole: a full disk leaves no half a row."""
        self.rows[name] += rows
        for row in rows:
            tqdm.write("  ".join(f"{key} {value}" for key, value in row.items()))
            if self.tracker:
                curves = {f"{name}/{key}/{row['seed']}": value for key, value in row.items()}
                self.tracker.log(curves, step=row["step"])
        text = io.StringIO()
        # The columns are those of the last row.
        writer = csv.DictWriter(text, self.rows[name][-1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[name])
        write_file(self.run_dir / f"{name}.csv", text.getvalue().encode())

    def evaluation_is_due(self, step, every, last):
        """At every multiple and at the end, unless its row is there already."""
        scored = {int(row["step"]) for row in self.rows["eval"]}
        return step > 0 and (step % every == 0 or step == last) and step not in scored


def read_run(run_dir):
    """A run's args.json, and its Args."""
    try:
        record = json.loads(Path(f"{run_dir}/args.json").read_text())
        values = {field.name: record[field.name] for field in dataclasses.fields(Args)}
        values["hidden_dims"] = tuple(values["hidden_dims"])
        saved = Args(**values)
        if Path(record["script"]).name != Path(__file__).name:
            raise ValueError("that is a run of another script")
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{run_dir} is no run of {Path(__file__).name}: see its args.json ({error!r})")
    return record, saved


def parse_args():
    """The command line; with --resume, flags that are not given keep the values of the run."""
    args = tyro.cli(Args)
    if not args.resume:
        return args
    _, saved = read_run(args.resume)
    args = tyro.cli(Args, default=saved)
    for name, value in vars(saved).items():
        if getattr(args, name) != value and name not in MAY_CHANGE:
            fail(f"{args.resume} was started with another {name}, {value}: leave that flag out")
    return args


def describe_run(args, paths, dataset):
    """What args.json holds."""
    source = "official" if paths[0].parent.name == "data" else "collected"
    if args.dataset_dir:
        source = "from --dataset-dir"
    words = f"{source}, {int(dataset.terminals.sum())} episodes in {paths[0].name}"
    if args.env_id.startswith(PAPER_USED_100M):
        words += "; the paper used 100M transitions"
    return {
        **vars(args),
        "script": os.path.abspath(__file__),
        "data": {
            "words": words,
            "path": [str(path) for path in paths],
            "bytes": [path.stat().st_size for path in paths],
            "transitions": len(dataset.rewards),
        },
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "ogbench", "mujoco")},
        "jax_settings": {name: getattr(jax.config, name) for name in JAX_SETTINGS},
    }


def check_same_run(record, before):
    """A resumed run goes on with the same data and JAX settings; devices may round otherwise."""
    if record["jax_settings"] != before["jax_settings"]:
        fail(f"the run was started with {before['jax_settings']}: set that again to go on with it")
    if record["data"]["bytes"] != before["data"]["bytes"]:
        fail(
            f"the run's data is {before['data']['path'][0]} ({before['data']['words']}),"
            f" not {record['data']['path'][0]}: see --dataset-dir"
        )


def open_run_folder(args):
    """The run's folder, made or found, and locked."""
    now = datetime.datetime.now()
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{now:%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.resume or f"{args.run_dir}/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR)
        # The operating system takes the lock back when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{run_dir} is in use: another process trains there")
    except OSError as error:
        fail(f"{run_dir} can't be made ({error}); name another place with --run-dir")
    return run_dir


# ------------------------------------------------------------------------------------------ main


def handle_signals(handler):
    """Ctrl-C, batch systems' signals, and a closed terminal unless the run was started by nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def request_stop(number, _):
    os.write(2, b"\nstopping: saving first\n")
    stop_signals.append(number)


def check_finite(metrics, step, run_dir):
    for name, values in metrics.items():
        if not np.isfinite(values).all():
            fail(f"{name} is not finite at step {step}; {run_dir} keeps what was saved", status=1)


def train_offline(args, networks, states, env, paths, dataset, evaluate_at, log):
    """The offline phase: the states at its end, or where a stop was asked for; saved."""
    train = over_seeds(partial(train_steps, args, networks), args.num_seeds)
    train = jax.jit(train, donate_argnums=0)
    states, _ = train(states, dataset, 0)  # no update, and the program serves any number
    handle_signals(request_stop)

    step = int(states.step[0])
    marks = (args.log_every, args.eval_every, args.checkpoint_every, args.dataset_replace_every)
    updates_per_second = 0.0
    logged_step = step
    busy_seconds = 0.0
    bar = tqdm(total=args.offline_steps, initial=step, unit=" updates", disable=None)
    while not stop_signals:
        if log.evaluation_is_due(step, args.eval_every, args.offline_steps):
            save_checkpoint(log.run_dir, states)  # an evaluation may be long, and be killed
            score(evaluate_at, states, step, log, bar)
            continue
        if step >= args.offline_steps:
            break

        # Choice: about a second of updates, so that a stop is prompt, but not past the next event.
        to_events = [mark - step % mark for mark in marks]
        num_updates = min(int(updates_per_second) + 1, args.offline_steps - step, *to_events)
        started = time.perf_counter()
        states, metrics = train(states, dataset, num_updates)
        metrics = jax.device_get(metrics)  # {name: (seeds,)}; waits for the device
        seconds = max(time.perf_counter() - started, 1e-3)  # a clock may be coarse
        step += num_updates
        check_finite(metrics, step, log.run_dir)
        updates_per_second = num_updates / seconds
        busy_seconds += seconds
        bar.update(num_updates)

        if step % args.log_every == 0:
            speed = (step - logged_step) / busy_seconds
            log_metrics(args, log, metrics, step, args.offline_steps - step, speed)
            logged_step = step
            busy_seconds = 0.0
        if step % args.checkpoint_every == 0:
            save_checkpoint(log.run_dir, states)
        if step % args.dataset_replace_every == 0 and len(paths) > 1:
            dataset = None  # one shard on the device at a time
            try:
                dataset = load_shard(args, paths, step, env)
            except SystemExit:  # it can't be used: nothing is lost, and another may be named
                save_checkpoint(log.run_dir, states)
                raise
    bar.close()
    save_checkpoint(log.run_dir, states)
    return states


def score(evaluate_at, states, step, log, bar):
    """Evaluate now; what a stop leaves unfinished is not kept."""
    rows = evaluate_at(states, step)
    if not stop_signals:
        log.append("eval", rows)
        bar.set_description(f"success {np.mean([row['success_rate'] for row in rows]):.2f}")


def log_metrics(args, log, metrics, step, updates_left, updates_per_second):
    """A row of metrics.csv for each seed, and the time to go where it is long."""
    rows = []
    for i in range(args.num_seeds):
        row = {"step": step, "seed": args.seed + i}
        row |= {name: value[i] for name, value in metrics.items()}
        rows.append({**row, "updates_per_second": round(updates_per_second, 2)})
    log.append("metrics", rows)
    seconds = round(updates_left / updates_per_second)
    if seconds > 3600:
        tqdm.write(f"{datetime.timedelta(seconds=seconds)} to go")


def main(args):
    # Lines appear at once in a file, too; a console may not know every letter of a path.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    handle_signals(lambda number, _: sys.exit(128 + number))  # until there is something to save
    if jax.default_backend() == "cpu" and args.hidden_dims == Args.hidden_dims:
        print(
            "This size takes days without a GPU. For a laptop:\n"
            f"python {sys.argv[0]} --env-id {args.env_id}"
            " --hidden-dims 128 128 128 --num-critics 2 --offline-steps 10000"
        )

    env = make_env(args)
    dims = (env.observation_space.shape[0], env.action_space.shape[0])
    networks = make_networks(args, *dims)
    keys = jax.vmap(jax.random.key)(np.arange(args.seed, args.seed + args.num_seeds))
    states = jax.jit(jax.vmap(partial(init_state, args, networks, *dims)))(keys)
    if args.resume:
        states = restore(states, load_checkpoint(args.resume))
    paths = find_dataset(args)
    step = int(states.step[0])
    dataset = load_shard(args, paths, step, env)

    record = describe_run(args, paths, dataset)
    if args.resume:
        before, _ = read_run(args.resume)
        check_same_run(record, before)
    run_dir = open_run_folder(args)
    write_file(run_dir / "args.json", json.dumps(record, indent=1).encode())
    for name, value in record.items():
        print(f"{name:22} {value}")
    print(f"run folder: {run_dir}\ncompiling the update")

    envs = ThreadPoolExecutor(1).submit(start_eval_envs, args)  # while the update compiles
    evaluate_at = partial(evaluate_seeds, args, make_act(args, networks), envs, run_dir)
    log = RunLog(args, run_dir, step)
    states = train_offline(args, networks, states, env, paths, dataset, evaluate_at, log)
    if stop_signals:
        print(f"stopped and saved; {how_to_resume(run_dir)}")
        sys.exit(128 + stop_signals[0])
    folder = shlex.quote(str(run_dir))
    print(f"finished: {folder}")
    print(f"score, draw: python tools/evaluate.py {folder}; python tools/report.py {folder}")


if __name__ == "__main__":
    main(parse_args())
