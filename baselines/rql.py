# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.6", "flax>=0.10.4", "optax>=0.2.5", "gymnasium>=1.1", "ogbench>=1.2",
#     "tyro>=1.0.16", "wandb>=0.19", "numpy>=2.0", "tqdm>=4.66"]
#
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""Reversal Q-learning (RQL).

Offline, from a fixed dataset alone: python THIS_FILE --env-id cube-double-play

RQL (arXiv 2606.17551) has one flow, "policy", that turns noise x_0 into a chunk of H actions x_T,
in T Euler steps of h = 1 / T along a velocity v(s, x, t), and one critic for all of that path:
V(s, x, t) is the value of the chunk that the flow makes of x from time t on. V learns at points of
the paths to the data's chunks, which the flow finds when it runs backwards. The policy imitates the
data, and each of its steps climbs V where the step ends.

(1) critic     y = R + discount^H m (mean_K V'(s', x_0', 0) - rho std_K V'(s', x_0', 0))
               L_V = mean w (y - V_k(s, x, t))^2,   w = expectile where y >= V_k, else 1 - expectile
(2) behavior   x_t = (1 - t) x_0 + t a;   L_BC = mean (v(s, x_t, t) - (a - x_0))^2
(3) sampling   x_{i+1} = x_i + h v(s, x_i, t_i),   t_i = i h;   actions are x_T clipped to [-1, 1]
(4) reversal   x = a, t = 1 at first;   T times x <- x - (d / T) v(s, x, t),   t <- t - d / T
(5) policy     L = alpha L_BC - mean V(s, x_t + e v(s, x_t, t), t + e),   e = min(h, 1 - t)

V': target copy. R: discounted reward of the chunk; s': observation after it; x_0': noise; m: 0 if
the chunk solves the task, else 1. (1) has (x, t) from (4): d is uniform in [0, 1] for one half of
the batch, and one of 0, h, .. 1 for the other. No gradient goes through (4), nor from (5) into V.
All losses leave out chunks that run over the end of an episode.

In evaluations the policy's slow copy acts, which keeps the share ema of itself at each update;
online the policy itself does.

"Choice:" marks what the paper leaves open.
Shapes: B batch, O observation, A action, H horizon, D = H A, K critics, T steps, N transitions.

Nearest: baselines/fbrac.py.

Differs from qam_offline.py: OWN, Args, Networks, make_networks, sample_actions, critic_loss,
policy_loss, init_state, update, evaluate.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
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


@dataclasses.dataclass
class Args:
    """Train a policy on a dataset. None: the value named beside it, or in OWN below, if any.

    On a laptop, in minutes: --env-id pointmaze-medium-navigate-task1 --hidden-dims 128 128 128
    --num-critics 5 --flow-steps 5 --tau 0.02 --learning-rate 1e-3 --offline-steps 10000
    """

    env_id: str = "cube-double-play"  # OGBench's domain (and -task1 to 5), or any Gymnasium id
    seed: int = 1  # of the first (or only) run
    num_seeds: int = 1  # trains seed, seed + 1, .. side by side in this process
    batch_size: int = 256  # action chunks per gradient step
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # width of each hidden layer
    num_critics: int = 10  # critics in the ensemble
    horizon: int | None = None  # actions in a chunk: manipulation 5, pointmaze 10, others 1
    flow_steps: int = 10  # steps from noise to action; with more, compiling takes longer
    discount: float | None = None  # of an environment step: 0.99 or 0.995, by DOMAINS
    tau: float = 0.005  # target-update rate
    rho: float | None = None  # pessimism, in deviations of the ensemble: 0.5 or 0, likewise
    learning_rate: float = 3e-4  # of Adam
    max_grad_norm: float = 1e12  # limit on the joint gradient's norm: none
    best_of_n: int = 1  # chunks drawn when acting, of which the one with the highest Q is executed
    sparse: bool | None = None  # rewards that are not 0 become -1: for scene, puzzles

    alpha: float | None = None  # weight of imitation against V: the paper's are 0.1 to 10
    expectile: float | None = None  # of (1), from 0 to 1: the paper's are 0.5 to 0.9
    ema: float | None = None  # what the slow copy keeps of itself at a step: the paper's is 0.999

    dataset_replace_every: int = 1_000  # gradient steps on each file of a dataset in several
    # --resume may change what follows, not the above: the state after n updates depends on that.
    offline_steps: int = 1_000_000  # gradient steps
    eval_every: int | None = None  # steps between evaluations: a twentieth of all
    eval_episodes: int = 50  # episodes per evaluation
    eval_envs: int = 4  # environment processes; does not change the score
    log_every: int | None = None  # steps between rows of metrics.csv: a two-hundredth of all
    checkpoint_minutes: float = 5.0  # between checkpoints; 0: after each dispatch of updates
    dataset_dir: str | None = None  # folder of the dataset's npz file or files
    run_dir: str = "runs"  # folder in which the run makes its own
    resume: str | None = None  # folder of the run to go on with
    track: bool = False  # log to Weights & Biases (WANDB_MODE=offline works without an account)
    wandb_project: str = "qam"  # project there

    def __post_init__(self):
        resolve_args(self)
        if max(self.expectile, self.ema) > 1:
            raise ValueError("--expectile and --ema are at most 1")


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


class VelocityField(nn.Module):
    """v(s, x, t): (..., O), (..., D), (..., 1) or a number -> (..., D)."""

    hidden_dims: tuple[int, ...]
    action_dim: int  # D

    @nn.compact
    def __call__(self, observations, x, t):
        mlp = MLP(self.hidden_dims, self.action_dim)
        nn.share_scope(self, mlp)  # parameters are named Dense_0, .., not MLP_0/Dense_0, ..
        # (B, O) observations serve all T steps of (T, B, D) states, and a number all rows.
        observations = jnp.broadcast_to(observations, (*x.shape[:-1], observations.shape[-1]))
        t = jnp.broadcast_to(t, (*x.shape[:-1], 1))
        return mlp(jnp.concatenate([observations, x, t], axis=-1))


class Critic(nn.Module):
    """K critics Q_k(s, a): (..., O), (..., D) -> (K, ...)."""

    hidden_dims: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, observations, actions):
        # Each parameter has a leading axis K, initialized independently; the input is one for all.
        ensemble = nn.vmap(MLP, {"params": 0}, {"params": True}, None, axis_size=self.num_critics)
        mlp = ensemble(self.hidden_dims, 1, layer_norm=True)
        nn.share_scope(self, mlp)  # as above
        q = mlp(jnp.concatenate([observations, actions], axis=-1))  # (K, ..., 1)
        return q[..., 0]


class Networks(NamedTuple):
    critic: Critic  # V
    policy: VelocityField  # imitates the data and climbs V
    chunk_dim: int  # D


def make_networks(args, observation_dim, action_dim):
    """The modules; `action_dim` is A, of one action. (O is for others: flax infers it.)"""
    chunk_dim = args.horizon * action_dim
    flow = VelocityField(args.hidden_dims, chunk_dim)
    return Networks(Critic(args.hidden_dims, args.num_critics), flow, chunk_dim)


# ------------------------------------------------------------------------------ flow and adjoint
def sample_ode(velocity, x0, num_steps):
    """Equation (3), not clipped: noise x0 (..., D) -> action chunks (..., D)."""
    h = 1 / num_steps
    x = x0
    for i in range(num_steps):
        t = jnp.full_like(x[..., :1], i * h)  # (..., 1)
        x = x + h * velocity(x, t)
    return x


def reverse_ode(velocity, actions, distance, num_steps):
    """Equation (4): from actions (B, D) at t = 1 back by `distance` (B, 1) in time -> x (B, D)."""
    h = distance / num_steps
    x = actions
    for i in range(num_steps):
        x = x - h * velocity(x, 1 - i * h)
    return x


def with_time(x, t):
    """What the critic takes for an action: x (..., D), t (..., 1) or a number -> (..., D + 1)."""
    return jnp.concatenate([x, jnp.broadcast_to(t, (*x.shape[:-1], 1))], axis=-1)


def policy_actions(args, networks, params, observations, noise):
    """The policy, by (3): observations (..., O), noise (..., D) -> chunks (..., D) in [-1, 1]."""
    v_policy = partial(networks.policy.apply, {"params": params["policy"]}, observations)
    return jnp.clip(sample_ode(v_policy, noise, args.flow_steps), -1, 1)


def sample_actions(args, networks, params, observations, key):
    """Act: observations (B, O) -> chunks (B, H*A) in [-1, 1], the best of `best_of_n` by mean V.

    `params`: of a TrainState. In an evaluation the policy's slow copy stands in its place there.
    """
    noise = jax.random.normal(key, (args.best_of_n, len(observations), networks.chunk_dim))
    observations = jnp.broadcast_to(observations, (args.best_of_n, *observations.shape))
    actions = policy_actions(args, networks, params, observations, noise)  # (n, B, D)
    # Where n is 1 there is nothing to choose, and the compiler leaves the critics out.
    timed = with_time(actions, 1.0)  # (n, B, D + 1)
    q = networks.critic.apply({"params": params["critic"]}, observations, timed)  # (K, n, B)
    best = q.mean(axis=0).argmax(axis=0)  # (B,)
    return actions[best, jnp.arange(len(best))]


# ------------------------------------------------------------------------------ batch and losses
class Dataset(NamedTuple):
    observations: Any  # (N, O)
    actions: Any  # (N, A)
    rewards: Any  # (N,) in OGBench -1 until the task is solved; cubes: minus the number misplaced
    masks: Any  # (N,) 0 where the task is solved: no bootstrap
    terminals: Any  # (N,) 1 at the last transition of an episode
    next_observations: Any  # (N, O)


class Batch(NamedTuple):
    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, H*A)
    rewards: jax.Array  # (B,) discounted sum over the chunk
    masks: jax.Array  # (B,) 0 if the task is solved in the chunk: no bootstrap
    valid: jax.Array  # (B,) 1 if the whole chunk lies in one episode
    next_observations: jax.Array  # (B, O)


def gather_chunks(dataset, indices, horizon, discount):
    """The `horizon` transitions that begin at each of `indices` (B,), as in arXiv 2507.07969.

    Where one runs over the end of an episode, `valid` is 0, and rewards and next observation stop.
    """
    steps = indices[:, None] + jnp.arange(horizon)  # (B, H)
    ends = dataset.terminals[steps]
    inside = (jnp.cumsum(ends, axis=1) - ends) == 0  # (B, H) no episode has ended before that step
    last = indices + inside.sum(axis=1) - 1  # (B,) the last step inside
    return Batch(
        observations=dataset.observations[indices],
        actions=dataset.actions[steps].reshape(len(indices), -1),  # beyond the end, too
        rewards=(discount ** jnp.arange(horizon) * dataset.rewards[steps] * inside).sum(axis=1),
        masks=jnp.where(inside, dataset.masks[steps], 1.0).min(axis=1),
        valid=inside[:, -1].astype(jnp.float32),
        next_observations=dataset.next_observations[last],
    )


def td_target(rewards, masks, next_q, discount_h, rho):
    """Equation (1): rewards (B,), masks (B,), next_q (K, B) -> y (B,)."""
    return rewards + discount_h * masks * (next_q.mean(axis=0) - rho * next_q.std(axis=0))


def critic_loss(args, networks, params, target_params, batch, key):
    """Equation (1): (loss, metrics)."""
    key_next, key_t, key_k = jax.random.split(key, 3)
    next_x0 = jax.random.normal(key_next, batch.actions.shape)  # x_0' (B, D)
    target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
    next_q = target_q(batch.next_observations, with_time(next_x0, 0.0))  # (K, B)
    y = td_target(batch.rewards, batch.masks, next_q, args.discount**args.horizon, args.rho)

    # Points of the paths to the data's chunks.
    half = len(next_x0) // 2
    anywhere = jax.random.uniform(key_t, (half,))
    steps = jax.random.randint(key_k, (len(next_x0) - half,), 0, args.flow_steps + 1)
    distance = jnp.concatenate([anywhere, steps / args.flow_steps])[:, None]  # d (B, 1)
    v_policy = partial(networks.policy.apply, {"params": params["policy"]}, batch.observations)
    x = reverse_ode(v_policy, batch.actions, distance, args.flow_steps)
    timed = with_time(jax.lax.stop_gradient(x), 1 - distance)  # (B, D + 1)

    q = networks.critic.apply({"params": params["critic"]}, batch.observations, timed)  # (K, B)
    error = y - q
    weight = jnp.where(error >= 0, args.expectile, 1 - args.expectile)
    # `valid` leaves out chunks that run over the end of an episode. The mean divides by K B, not by
    # the number of valid chunks, so that a chunk weighs the same in every batch.
    loss = jnp.mean(batch.valid * weight * error**2)
    return loss, {"critic_loss": loss, "q_mean": q.mean()}


def flow_matching_loss(velocity, actions, valid, x0, t):
    """Equation (2): actions (B, D), valid (B,), x0 (B, D) noise, t (B, 1) -> scalar."""
    x_t = (1 - t) * x0 + t * actions
    error = velocity(x_t, t) - (actions - x0)
    return jnp.mean(valid * jnp.mean(error**2, axis=-1))


def policy_loss(args, networks, params, target_params, batch, q, target_q, key):
    """All losses but the critic's, equations (2), (5): (loss, metrics).

    q and target_q map (s, (x, t)) to (K, B) and are held constant; RQL uses q alone.
    """
    key_x0, key_t = jax.random.split(key)
    observations = batch.observations
    shape = batch.actions.shape  # (B, D)
    v_policy = partial(networks.policy.apply, {"params": params["policy"]}, observations)

    # Behavior: flow matching.
    x0 = jax.random.normal(key_x0, shape)
    t = jax.random.uniform(key_t, (len(x0), 1))
    behavior_loss = flow_matching_loss(v_policy, batch.actions, batch.valid, x0, t)

    # Value, where the step that begins at x_t ends. The gradient goes through this step alone.
    x_t = (1 - t) * x0 + t * batch.actions
    h = jnp.minimum(1 / args.flow_steps, 1 - t)  # (B, 1): the last step ends at 1
    x_next = x_t + h * v_policy(x_t, t)
    value = jnp.mean(batch.valid * q(observations, with_time(x_next, t + h)))

    metrics = {"flow_loss": behavior_loss, "value": value}
    return args.alpha * behavior_loss - value, metrics


# ------------------------------------------------------------------------------ state and update
class TrainState(NamedTuple):
    params: dict  # by network
    target_params: dict  # of those networks that have a target copy
    opt_state: Any
    step: jax.Array  # () gradient steps taken
    key: jax.Array  # () never changes; step n draws with fold_in(key, n)


def make_optimizer(args):
    """One Adam for all networks, after their joint gradient is clipped. Its state: opt_state."""
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    return optax.chain(clip, optax.adam(args.learning_rate))


def init_state(args, networks, observation_dim, action_dim, key):
    """A TrainState of fresh parameters; `action_dim` is A. Targets start as copies."""
    observations = jnp.zeros((1, observation_dim))
    actions = jnp.zeros((1, args.horizon * action_dim))
    key, key_critic, key_policy = jax.random.split(key, 3)
    params = {
        "critic": networks.critic.init(key_critic, observations, with_time(actions, 1.0))["params"],
        "policy": networks.policy.init(key_policy, observations, actions, 0.0)["params"],
    }
    target_params = jax.tree.map(jnp.copy, params)
    opt_state = make_optimizer(args).init(params)
    return TrainState(params, target_params, opt_state, jnp.int32(0), key)


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
    old_params = {name: state.params[name] for name in target_params}
    critic = optax.incremental_update(old_params["critic"], target_params["critic"], args.tau)
    policy = optax.incremental_update(old_params["policy"], target_params["policy"], 1 - args.ema)
    target_params = {"critic": critic, "policy": policy}
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


# ============================================================== nothing below is about the method
# What follows is the same in every script, but for the coefficients in OWN.

# Horizon, discount, rho, sparse, in the first row whose name a domain begins with. Choice: the last
# three rows, for what the paper does not have.
DOMAINS = {
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
    "pointmaze": (10, 0.99, 0.5, False),
    "cube|scene|puzzle": (5, 0.99, 0.5, False),
    "": (1, 0.99, 0.5, False),
}
# This method's coefficients, in the order of DOMAINS.
OWN = {
    "alpha": [10.0, 1.0, 1.0, 3.0, 1.0, 1.0, 0.1, 0.1, 0.3, 0.3, 0.3, 1.0, 0.3],
    "expectile": [0.9, 0.9, 0.7, 0.7, 0.7, 0.9, 0.5, 0.5, 0.5, 0.5, 0.7, 0.7, 0.5],
    "ema": [0.999] * 10 + [0.995, 0.999, 0.999],
}
# Numbers are above 0, but for these: a setting of yours that may be 0 goes here, too.
MAY_BE_0 = "seed discount rho checkpoint_minutes offline_steps pretrain_steps start_training "
MAY_BE_0 += "inv_temp edit_scale fql_alpha noisy_coef actor_noise bc_alpha guidance_weight"


def paper_values(args):
    """{flag: value} of the environment's domain, by the tables above."""
    domain, _, _ = parse_env_id(args.env_id)
    row = next(name for name in DOMAINS if re.match(name, domain))
    values = dict(zip(("horizon", "discount", "rho", "sparse"), DOMAINS[row], strict=True))
    for name, column in OWN.items():
        values[name] = column[list(DOMAINS).index(row)]
    return values


def resolve_args(args):
    """Fill in what is None; raises ValueError, which tyro prints. Makes paths absolute."""
    values = paper_values(args)
    # Choice: a short run is looked at as often as a long one.
    values["eval_every"] = max(1, args.offline_steps // 20)
    values["log_every"] = max(1, args.offline_steps // 200)
    for name, value in vars(args).items():
        value = values.get(name) if value is None else value
        if name in ("run_dir", "dataset_dir", "resume", "offline_checkpoint") and value:
            value = os.path.abspath(os.path.expanduser(value))
        setattr(args, name, value)
        positive = type(value) not in (int, float, tuple) or min(np.ravel(value), default=0) > 0
        if not positive and not (value == 0 and name in MAY_BE_0.split()):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    if max(args.discount, args.tau) > 1 or args.seed >= 2**32:
        raise ValueError("--seed must be below 2**32, --discount and --tau at most 1")


# ------------------------------------------------------------------------- environment and data


def parse_env_id(env_id):
    """(OGBench's domain, gymnasium id, dataset name); ("", `env_id`, "") for other environments.

    For example cube-quadruple-play-100m, scene-play-task1, cube-double-play-singletask-task2-v0.
    """
    pattern = r"([\s\S]*?)(-100m)?(?:-singletask)?(-task\w+)?(?:-v0)?"
    domain, size, task = re.fullmatch(pattern, env_id).groups("")
    name = domain.rpartition("-")[0]  # without the kind of data: play, navigate, ..
    environment_id = f"{name}-singletask{task}-v0"
    if environment_id in gymnasium.registry:
        return domain, environment_id, f"{domain}{size}-v0"
    return "", env_id, ""


def make_env(args):
    """The environment: observations (O,), actions (A,) in [-1, 1]."""
    warnings.simplefilter("ignore")  # of missing displays and rounded bounds, in each process
    sys.path.append(os.getcwd())  # where the module of my_module:MyEnv-v0 may be
    with or_fail(f"--env-id {args.env_id} (OGBench has scene-play, scene-play-task1, ..)"):
        env = gymnasium.make(parse_env_id(args.env_id)[1])
        # OGBench makes a fresh, unseeded Box at every access: one is pinned, so that seeding works.
        type(env.unwrapped).action_space = env.action_space
        if isinstance(env.observation_space, gymnasium.spaces.Dict):
            env = gymnasium.wrappers.FlattenObservation(env)
        env = gymnasium.wrappers.RescaleAction(env, -1, 1)
        require(len(env.observation_space.shape) == 1, "observations must be vectors")
    return env


def find_dataset(args):
    """(where it is from, its file or shards). tools/collect_dataset.py gets what is missing."""
    domain, _, name = parse_env_id(args.env_id)
    if args.dataset_dir:
        folder = Path(args.dataset_dir)
        paths = sorted(folder.glob(f"{domain or '[!.]'}*.npz"))  # no hidden files
        shards = [path for path in paths if not path.stem.endswith("-val")]
        if not shards:
            fail(f"--dataset-dir {folder}: no {domain}*.npz, but {[*map(str, folder.glob('*'))]}")
        return "from --dataset-dir", [path for path in shards if path.stem == name] or shards
    if not domain:
        fail(f"{args.env_id} is not OGBench's: name the folder of its data with --dataset-dir")

    for source, folder in (("official", "data"), ("collected", "collected")):
        path = Path(f"~/.ogbench/{folder}/{name}.npz").expanduser()
        if path.exists():
            return source, [path]
    for folder in Path(__file__).resolve().parents[:2]:
        for tool in folder.glob("tools/collect_dataset.py"):
            if subprocess.call([sys.executable, tool, name, "--download"]) == 0:
                return find_dataset(args)
    fail(f"no {name}.npz: see tools/collect_dataset.py, ogbench.download_datasets, --dataset-dir")


def load_dataset(args, path, env):
    """A file as a Dataset of numpy arrays, float32; exits if it does not fit or is damaged.

    One that holds rewards is taken as it is. OGBench's don't: they are labelled for the task.
    """
    with or_fail(f"{path} can't be used for {args.env_id}"):
        data = np.load(path)
        if "rewards" not in data and parse_env_id(args.env_id)[0]:
            data = ogbench.load_dataset(str(path), add_info=True)
            ogbench.relabel_utils.relabel_dataset(args.env_id, env, data)
        require("timeouts" not in data, "an end in timeouts is not read: it belongs to terminals")
        data = Dataset(*(np.asarray(data[name], np.float32) for name in Dataset._fields))
        rows = len(data.actions)
        observation = env.observation_space.shape
        shapes = (observation, env.action_space.shape, (), (), (), observation)
        for name, array, shape in zip(Dataset._fields, data, shapes, strict=True):
            require(array.shape == (rows, *shape), f"{name} is {array.shape}, not {(rows, *shape)}")
            require(np.isfinite(array).all(), f"{name} is not finite")
        require(rows >= args.horizon, f"fewer rows than --horizon {args.horizon}")
        require(data.terminals[-1] == 1, "terminals is not 1 in the last row")
        beyond = np.abs(data.actions) > 1.001
        require(not beyond.any(), f"{beyond.mean():.1%} of the numbers in actions are beyond 1")
    rewards = -np.float32(data.rewards != 0) if args.sparse else data.rewards
    # As in the paper's code. Some methods invert a tanh here.
    return data._replace(actions=np.clip(data.actions, -1 + 1e-5, 1 - 1e-5), rewards=rewards)


def load_shard(args, paths, step, env):
    """The shard whose turn it is at a step, on the device. Choice: by the order of their names."""
    turn = step // args.dataset_replace_every % len(paths)
    return jax.device_put(load_dataset(args, paths[turn], env))


# ----------------------------------------------------------------------------------- evaluation


class ChunkedEpisode(gymnasium.Wrapper):
    """An environment whose step executes a chunk, or nothing once the episode has ended."""

    def reset(self, *, seed, options=None):
        # The episode depends on its seed alone: OGBench's resets draw from these two as well.
        np.random.seed(seed)
        self.unwrapped.action_space.seed(seed)
        self.scores = np.zeros(3)  # success, return, length so far
        self.ended = False
        return self.env.reset(seed=seed)

    def step(self, chunk):
        for action in chunk.reshape(-1, *self.action_space.shape):
            if not self.ended:
                *self.last, info = self.env.step(action)
                _, reward, terminated, truncated = self.last
                self.ended = terminated or truncated
                self.scores[0] = info.get("success", 0)  # at the last step, as OGBench counts it
                self.scores[1] += reward
                self.scores[2] += 1
        return *self.last, {"scores": self.scores}


def start_eval_envs(args):
    """The processes that play the evaluation's episodes."""
    envs = [lambda: ChunkedEpisode(make_env(args))] * min(args.eval_envs, args.eval_episodes)
    # Spawned, by cloudpickle: a forked process would hold locks of JAX's threads.
    return gymnasium.vector.AsyncVectorEnv(envs, context="spawn", autoreset_mode="Disabled")


def evaluate(args, act, params, envs, key):
    """Play episodes 0 .. `eval_episodes` - 1: their mean scores; unfinished if a stop comes.

    E processes play E episodes at a time. The policy always sees one row per episode of all, with
    a noise for each: with another shape the noise would be another, and products would round in
    another way. So the score does not depend on E.
    """
    started = time.perf_counter()
    params = {**params, "policy": params["target"]["policy"]}  # its slow copy acts
    results = np.zeros((args.eval_episodes, 3))  # success, return, length
    observations = np.zeros((args.eval_episodes, *envs.single_observation_space.shape))
    for first in range(0, args.eval_episodes, envs.num_envs):
        # What is over at the end is the first episodes again, with the same results.
        rows = (first + np.arange(envs.num_envs)) % args.eval_episodes
        observations[rows], _ = envs.reset(seed=rows.tolist())
        ended = np.zeros(envs.num_envs, bool)
        chunk = 0
        while not ended.all() and not stop_signals:
            actions = np.asarray(act(params, observations, jax.random.fold_in(key, chunk)))
            observations[rows], _, terminated, truncated, info = envs.step(actions[rows])
            ended = terminated | truncated
            results[rows] = info["scores"]
            chunk += 1
    success, total, length = results.mean(axis=0)
    scores = {"success_rate": success, "return": total, "length": length, "episodes": len(results)}
    return {**scores, "wall_seconds": round(time.perf_counter() - started, 1)}


def score(args, act, envs, states, step, phase, run_dir):
    """Evaluate each seed: rows of eval.csv, unless a stop comes. Returns words for the bar."""
    rows = []
    for i in range(args.num_seeds):
        state = of_seed(states, i)
        params = {**state.params, "target": state.target_params}
        key = jax.random.fold_in(state.key, 2**31 - 1)  # no update has this number
        rows.append({"phase": phase, **evaluate(args, act, params, envs, key)})
    if stop_signals:
        return "stopped"
    log_rows(args, run_dir, "eval", step, rows)
    return f"success {np.mean([row['success_rate'] for row in rows]):.2f}"


# ----------------------------------------------------------------------------------- run folder

stop_signals = []  # numbers of the signals that asked the run to stop
tables = {"metrics": [], "eval": [], "episodes": []}  # rows of the csv files; episodes: online


def fail(message):
    """Print one sentence and exit with status 2: the user can put it right."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def require(condition, message):
    """In a block of or_fail: raise what that is to tell."""
    if not condition:
        raise ValueError(message)


@contextmanager
def or_fail(words):
    """`with or_fail(words):` what goes wrong in the block is told in one sentence, by fail."""
    try:
        yield
    except Exception as error:
        fail(f"{words}: {error!r:.300}")


def how_to_resume(run_dir):
    launcher = "uv run" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
    return f"to go on: {launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(run_dir))}"


def write_file(path, content):
    """Write a file so that it is there whole or not at all, whenever the process dies."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def save_checkpoint(run_dir, states):
    """checkpoint.msgpack: all that is needed to go on."""
    states = jax.device_get(states._replace(key=jax.random.key_data(states.key)))
    write_file(f"{run_dir}/checkpoint.msgpack", flax.serialization.to_bytes({"states": states}))


def load_checkpoint(run_dir):
    """{"states": nested dicts of numpy arrays, leading axis the seeds}; no code can be in it."""
    path = Path(f"{run_dir}/checkpoint.msgpack")
    with or_fail(f"{path} is not there yet, or damaged: start the run anew"):
        return flax.serialization.msgpack_restore(path.read_bytes())


def read_tables(run_dir, step):
    """Fill `tables` with a run's rows up to `step`. What it wrote after that is left out."""
    for name in tables:
        path = Path(f"{run_dir}/{name}.csv")
        with or_fail(f"{path} can't be read: move it away to go on without its rows"):
            rows = csv.DictReader(path.open()) if path.exists() else []
            tables[name] = [row for row in rows if int(row["step"]) <= step]


def log_rows(args, run_dir, name, step, rows):
    """Add a row for each seed to a csv file (written whole), the screen and Weights & Biases."""
    for seed, row in enumerate(rows, start=args.seed):
        tables[name].append({"step": step, "seed": seed, **row})
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if key != "phase"]
        # But for the last, a time or a speed, which the bar shows.
        tqdm.write(f"step {step} seed {seed} {' '.join(numbers[:-1])}")
        if args.track:
            import wandb

            wandb.log({f"{name}/{seed}": tables[name][-1]}, step=step)
    text = io.StringIO()
    writer = csv.DictWriter(text, tables[name][-1], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(tables[name])
    write_file(f"{run_dir}/{name}.csv", text.getvalue().encode())


def evaluation_is_due(step, every, last):
    """At every multiple and at the end, unless its row is there already."""
    scored = {int(row["step"]) for row in tables["eval"]}
    return step > 0 and (step % every == 0 or step == last) and step not in scored


def read_run(run_dir):
    """A run's args.json, and its Args."""
    with or_fail(f"{run_dir} is no run of {Path(__file__).name}, by its args.json"):
        record = json.loads(Path(f"{run_dir}/args.json").read_text())
        require(Path(record["script"]).name == Path(__file__).name, record["script"])
        # What is new in the script has its default.
        values = {name: record[name] for name in vars(Args()) if name in record}
        values["hidden_dims"] = tuple(values["hidden_dims"])
        return record, Args(**values)


def parse_args():
    """The command line; with --resume, flags that are not given keep the values of the run."""
    args = tyro.cli(Args)
    if args.resume:
        _, saved = read_run(args.resume)
        args = tyro.cli(Args, default=saved)
        names = list(vars(saved))
        for name in names[: names.index("offline_steps")]:
            if getattr(args, name) != getattr(saved, name):
                fail(f"{args.resume} has {name} {getattr(saved, name)}: leave that flag out")
    return args


def read_crcs(path):
    """The checksums of an npz file's arrays, from its directory: by them data is known."""
    with or_fail(f"{path} can't be used"):
        return [array.CRC for array in np.load(path).zip.infolist()]


def open_run_folder(args, source, paths, dataset):
    """(the run's folder, what its args.json holds); a resumed run goes on with the same data."""
    packages = ("jax", "flax", "optax", "gymnasium", "ogbench", "mujoco")
    settings = ("jax_enable_x64", "jax_default_matmul_precision")
    words = f"{source}, {int(dataset.terminals.sum())} episodes in {paths[0].name}"
    crcs = [read_crcs(path) for path in paths]
    record = {
        **vars(args),
        "script": os.path.abspath(__file__),
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "data": {"words": words, "path": paths, "crcs": crcs, "transitions": len(dataset.rewards)},
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in packages},
        "jax_settings": {name: getattr(jax.config, name) for name in settings},
    }
    name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{Path(__file__).stem}__{args.seed}")
    run_dir = Path(f"{args.run_dir}/{name}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    if args.resume:
        run_dir = Path(args.resume)
        before, _ = read_run(run_dir)
        if crcs != before["data"]["crcs"]:
            fail(f"{paths[0]} is not the run's data ({before['data']['words']}): see --dataset-dir")
        if record["script_sha256"] != before["script_sha256"]:
            print(f"{record['script']} was edited since the run; to go on as it began, undo that")
    with or_fail(f"--run-dir {args.run_dir} can't be used"):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_file(f"{run_dir}/args.json", json.dumps(record, indent=1, default=str).encode())
    return run_dir, record


# ----------------------------------------------------------------------------------------- main


def of_seed(tree, i):
    """What belongs to the i-th seed, where every array has a leading axis of seeds."""
    return jax.tree.map(lambda x: x[i], tree)


def jit_over_seeds(function, num_seeds):
    """`function(state, *rest)`, compiled, for states with a leading axis of seeds; donates them."""

    def for_all(states, *rest):
        # As one batch, which is vmap. One seed alone is a fifth faster without it.
        batch_size = num_seeds if num_seeds > 1 else None
        return jax.lax.map(lambda state: function(state, *rest), states, batch_size=batch_size)

    return jax.jit(for_all, donate_argnums=0)


def check_finite(args, metrics, step):
    """Names the seeds whose metrics are not finite; exits if there is no other."""
    ok = np.isfinite(list(metrics.values())).all(axis=0)  # (seeds,)
    if not ok.any():
        fail(f"the loss is not finite at step {step}: lower --learning-rate")
    if not ok.all() and step % args.log_every == 0:
        tqdm.write(f"step {step}: seed {np.flatnonzero(~ok) + args.seed} not finite; others go on")


def train_offline(args, networks, states, env, paths, dataset, act, envs, run_dir):
    """The offline phase: the states at its end, or where a stop was asked for; saved."""
    # The number of updates is traced, so that one program serves all.
    train = jit_over_seeds(partial(train_steps, args, networks), args.num_seeds)
    step = int(states.step[0])
    bar = tqdm(total=args.offline_steps, initial=step, unit=" updates", disable=None)
    saved_at = time.monotonic()
    while not stop_signals:
        if evaluation_is_due(step, args.eval_every, args.offline_steps):
            save_checkpoint(run_dir, states)  # an evaluation may be long, and be killed
            bar.set_description(score(args, act, envs, states, step, "offline", run_dir))
            continue
        if step >= args.offline_steps:
            break

        # At most 50, so that a stop is prompt, and not past the next event.
        events = (args.log_every, args.eval_every, args.dataset_replace_every)
        num_updates = min(50, args.offline_steps - step, *[n - step % n for n in events])
        started = time.perf_counter()
        states, metrics = train(states, dataset, num_updates)
        metrics = jax.device_get(metrics)  # {name: (seeds,)}; waits for the device
        seconds = max(time.perf_counter() - started, 1e-3)
        step += num_updates
        bar.update(num_updates)
        check_finite(args, metrics, step)

        if step % args.log_every == 0:
            metrics["updates_per_second"] = np.full(args.num_seeds, num_updates / seconds)
            rows = [of_seed(metrics, i) for i in range(args.num_seeds)]
            log_rows(args, run_dir, "metrics", step, rows)
        if time.monotonic() - saved_at >= 60 * args.checkpoint_minutes:
            save_checkpoint(run_dir, states)
            saved_at = time.monotonic()
        if step % args.dataset_replace_every == 0 and len(paths) > 1:
            save_checkpoint(run_dir, states)  # the next shard may be damaged
            dataset = load_shard(args, paths, step, env)
    save_checkpoint(run_dir, states)
    return states


def main(args):
    # Lines appear at once in a file, too; a console may not know every letter of a path.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, while there is nothing to save
    env = make_env(args)
    dims = env.observation_space.shape + env.action_space.shape  # O, A
    networks = make_networks(args, *dims)
    new_key = partial(jax.random.key, impl="threefry2x32")  # by name: JAX's default may differ
    keys = jax.vmap(new_key)(args.seed + np.arange(args.num_seeds))
    states = jax.jit(jax.vmap(partial(init_state, args, networks, *dims)))(keys)
    if args.resume:
        saved = load_checkpoint(args.resume)["states"]
        # All but the key, which follows from the seed.
        states = flax.serialization.from_state_dict(states, saved)._replace(key=states.key)
    step = int(states.step[0])
    source, paths = find_dataset(args)
    dataset = load_shard(args, paths, step, env)

    run_dir, record = open_run_folder(args, source, paths, dataset)
    folder = shlex.quote(str(run_dir).removeprefix(os.getcwd() + os.sep))
    print(f"data: {record['data']['words']}\ndevice: {record['device']}\nrun folder: {folder}")
    # Windows has no SIGUSR1. The handler only notes: what it raised could come up anywhere.
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, lambda number, _: stop_signals.append(number))
    if args.track:
        import wandb

        # The same id makes one curve of a run, however often it is resumed.
        run = {"project": args.wandb_project, "id": run_dir.name, "resume": "allow"}
        wandb.init(**run, dir=run_dir, config=vars(args))

    read_tables(run_dir, step)
    save_checkpoint(run_dir, states)  # from here on a stop is no loss
    try:
        if step < args.offline_steps or evaluation_is_due(step, args.eval_every, step):
            tqdm.write(f"training from step {step} on; compiling (about 20 s)")
            envs = start_eval_envs(args)
            act = jax.jit(partial(sample_actions, args, networks))
            train_offline(args, networks, states, env, paths, dataset, act, envs, run_dir)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        # A terminal or a batch system stops all processes at once; Ctrl-C there is raised here.
        if not stop_signals:
            words = "error: an evaluation process has died (try --eval-envs 1), or a reader of this"
            sys.exit(f"{words}; {how_to_resume(run_dir)}")
    if stop_signals:
        print(f"stopped and saved; {how_to_resume(run_dir)}")
        sys.exit(128 + stop_signals[0])
    print(f"finished: {folder}; --resume with a longer --offline-steps goes on")
    print(f"python tools/evaluate.py {folder}\npython tools/report.py {folder}")


if __name__ == "__main__":
    main(parse_args())
