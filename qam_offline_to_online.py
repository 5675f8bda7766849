# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.6", "flax>=0.10.4", "optax>=0.2.5", "gymnasium>=1.1", "ogbench>=1.2", "tyro>=0.9.2",
#     "wandb>=0.19", "numpy>=2.0", "tqdm>=4.66"]
# ///
"""Q-learning with Adjoint Matching (QAM), offline to online: python qam_offline_to_online.py --env-id cube-double-play

First qam_offline.py as it is, then --online-steps environment steps, with updates from a replay buffer on the device:
the whole dataset, then what the policy does. The host executes a chunk while the device works. arXiv 2601.14234.
A critic Q is learned by temporal differences, and two flow policies: "slow" imitates the data, "fast" is slow moved to
high Q. Both turn noise x_0 into a chunk of H actions a = x_1 along a velocity v(s, x, t), T steps of h = 1/T:
(1) critic      y = R + discount^H m (mean_K Q'(s', a') - rho std_K Q'(s', a'));   L_Q = mean (Q_k(s, a) - y)^2
(2) behaviour   x_t = (1 - t) x_0 + t a;   L_BC = mean (v_slow(s, x_t, t) - (a - x_0))^2
(3) sampling    x_{i+1} = x_i + h v(s, x_i, t_i),   t_i = i h
(4) rollout     x_{i+1} = x_i + h (2 v_fast(s, x_i, t_i) - x_i / (t_i + h)) + sqrt(h) sigma_i noise_i
                sigma_i = sqrt(2 (1 - t_i + h) / (t_i + h)); x_T by (3) with v_slow'. Then x_T does not remember x_0
(5) adjoint     g = -inv_temp grad_a mean_K Q'(s, a) at a = x_T, then backwards through the behaviour flow
                g <- g + h J^T g,   J = d/dx [2 v_slow'(s, x, t_i + h) - x / (t_i + h)] at x_i
(6) matching    L_AM = mean_B sum_i || (2 / sigma_i) (v_fast - v_slow')(s, x_i, t_i) + sigma_i g_i ||^2
Q', v_slow': target copies. (6) is regression: no gradient through the rollout. Its optimum, as h -> 0, samples from
pi_slow(a|s) exp(inv_temp Q) / Z; at T = 10 roughly: of a Gaussian's variance (4) makes 1.2 to 1.5, (3) 0.6 to 0.8.
"Choice:" marks what the paper leaves open. Shapes: B batch, O observation, A action, D = H A, K critics, N transitions.

Differs from qam_offline.py: imports, COEFFICIENTS, MAY_CHANGE, Args, train_steps, evaluate, main.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
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

# --------------------------------------------------------------------------------------------------------- 2. arguments
PAPER_SETTINGS = {  # arXiv 2601.14234, tables of hyperparameters; for other domains see resolve_args
    "cube-double-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=False, inv_temp=1.0),
    "cube-triple-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=False, inv_temp=3.0),
    "cube-quadruple-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=False, inv_temp=1.0, dataset="100M"),
    "scene-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=True, inv_temp=1.0),
    "puzzle-3x3-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=True, inv_temp=3.0),
    "puzzle-4x4-play": dict(horizon=5, discount=0.99, rho=0.5, sparse=True, inv_temp=30.0, dataset="100M"),
    "antmaze-large-navigate": dict(horizon=1, discount=0.99, rho=0.5, sparse=False, inv_temp=10.0),
    "antmaze-giant-navigate": dict(horizon=1, discount=0.995, rho=0.5, sparse=False, inv_temp=3.0),
    "humanoidmaze-medium-navigate": dict(horizon=1, discount=0.995, rho=0.0, sparse=False, inv_temp=3.0),
    "humanoidmaze-large-navigate": dict(horizon=1, discount=0.995, rho=0.0, sparse=False, inv_temp=3.0),
}
COEFFICIENTS = {"inv_temp": (1.0, 0, 1e9), "utd_ratio": (0, 1, 100)}  # its own: value elsewhere (Choice), least, most
COEFFICIENTS |= {"offline_steps": (0, 0, 10**9), "start_training": (0, 0, 10**9), "online_steps": (0, 1, 10**7)}
MAY_CHANGE = set("online_steps log_every eval_every eval_episodes eval_envs checkpoint_every dataset_dir".split())
MAY_CHANGE |= {"run_dir", "resume", "eval_only", "track", "wandb_project", "capture_video"}  # in a resumed run


@dataclasses.dataclass
class Args:
    """Arguments; None means the paper's value for the domain (PAPER_SETTINGS)."""

    env_id: str = "cube-double-play"  # domain, or with its task (scene-play-task1), or an OGBench id
    seed: int = 1  # seed of the first (or only) run, 0 or more
    num_seeds: int = 1  # 1: each seed needs its own environment and buffer, and so its own run
    offline_steps: int = 1_000_000  # gradient steps before the first environment step, 0 or more
    online_steps: int = 500_000  # environment steps, at least 1; no update if not above --start-training
    start_training: int = 5_000  # environment steps before the first online update, 0 or more
    utd_ratio: int = 1  # updates an environment step from there on, 1 to 100
    balanced_sampling: bool = False  # half of each batch from online steps; act at random until start_training
    offline_checkpoint: str | None = None  # finished run folder of qam_offline.py to start from; sets --offline-steps
    batch_size: int = 256  # action chunks a gradient step, at least 1
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # width of each hidden layer, of every network
    num_critics: int = 10  # critics in the ensemble (K), at least 1
    horizon: int | None = None  # actions in a chunk (H), executed one after the other without looking, at least 1
    flow_steps: int = 10  # Euler steps from noise to action (T), at least 2
    discount: float | None = None  # discount an environment step, in [0, 1]
    tau: float = 0.005  # target-update rate a gradient step, in (0, 1]
    rho: float | None = None  # pessimism: standard deviations of the ensemble taken off the target, 0 or more
    inv_temp: float | None = None  # inverse temperature: weight of Q against the behaviour flow, 0 (imitation) or more
    learning_rate: float = 3e-4  # Adam's step size, above 0
    max_grad_norm: float = 1.0  # largest norm of the joint gradient of all networks, above 0
    best_of_n: int = 1  # chunks drawn when acting, of which that of highest Q is executed, at least 1
    sparse: bool | None = None  # make every reward that is not 0 a -1
    eval_every: int = 50_000  # steps (offline: updates, online: environment steps) between evaluations, at least 1
    eval_episodes: int = 50  # episodes an evaluation, at least 1
    eval_envs: int = os.cpu_count() or 1  # environment processes, at least 1; does not change the score
    log_every: int = 5_000  # steps between rows of metrics.csv, at least 1
    checkpoint_every: int = 50_000  # steps between checkpoints, at least 1
    dataset_dir: str | None = None  # folder of the dataset's npz file, or of its shards; without it see find_dataset
    dataset_replace_every: int = 1_000  # gradient steps on a shard before the next one, at least 1
    run_dir: str = "runs"  # folder in which the run makes its own folder
    resume: str | None = None  # run folder to go on with; flags that would change its result are refused
    eval_only: str | None = None  # run folder whose checkpoint is scored, without training
    track: bool = False  # log to Weights & Biases (offline, in the run folder, when not logged in there)
    wandb_project: str = "qam"  # project there
    capture_video: int = 0  # evaluation episodes to record as mp4, 0 or more (needs: pip install "imageio[ffmpeg]")


def fail(message: str, status: int = 2) -> None:
    """Print one sentence and exit: status 2 for what the user can put right, 1 for what broke on the way."""
    tqdm.write("error: " + message.replace("\n", " "), file=sys.stderr)  # beside the progress bar
    sys.exit(status)


def read_offline_run(args: Args) -> tuple[Args, dict]:
    """--offline-checkpoint: (args with its number of offline steps, its args.json); exits with 2 if settings differ."""
    try:
        source = json.loads((Path(args.offline_checkpoint) / "args.json").read_text())
        assert source["script"] == "qam_offline" and source["data"]["sha256"] and source["data"]["path"][0]
        names = (source.keys() & vars(args).keys()) - MAY_CHANGE - {"seed", "num_seeds", "offline_steps"}
        other = sorted(name for name in names if source[name] != json.loads(json.dumps(vars(args)[name])))
        other += [] if args.seed in range(source["seed"], source["seed"] + source["num_seeds"]) else ["seed"]
        kept = {"offline_steps": int(source["offline_steps"]), "dataset_dir": args.dataset_dir or source["dataset_dir"]}
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, AssertionError):
        fail(f"--offline-checkpoint {args.offline_checkpoint} is no run of qam_offline.py: see its args.json")
    other = " ".join(f"--{k} {source[k]}" for k in other).translate(dict.fromkeys(map(ord, "[],")))
    return (dataclasses.replace(args, **kept), source) if not other else fail(f"--offline-checkpoint needs {other}")


def split_env_id(env_id: str) -> tuple[str, str, str]:
    """`env_id` -> (domain, gymnasium id, dataset name); exits with 2 and the nearest valid names if there is none."""
    kinds = {"pointmaze": "navigate stitch", "antmaze": "navigate stitch explore", "humanoidmaze": "navigate stitch"}
    kinds |= {"antsoccer": "navigate stitch", "visual": ""}  # of the others: play noisy; one model does not compile
    names = sorted({n[:-14] for n in gymnasium.registry if n[-14:] == "-singletask-v0"} - {"humanoidmaze-teleport"})
    domains = [f"{name}-{kind}" for name in names for kind in kinds.get(name.split("-")[0], "play noisy").split()]
    domain, size, task = re.fullmatch(r"(.*?)(-100m)?(?:-singletask)?(-task\w*)?(?:-v0)?", env_id, re.S).groups("")
    if domain not in domains:
        near = ", ".join(difflib.get_close_matches(domain.removeprefix("visual-"), domains, cutoff=0.3) or domains)
        fail(f"--env-id {env_id} is none of OGBench's state-based single-task domains; the nearest are {near}")
    environment_id = f"{domain.rsplit('-', 1)[0]}-singletask{task}-v0"
    if environment_id not in gymnasium.registry:
        fail(f"--env-id {env_id}: {domain} has no '{task[1:]}'; its tasks are task1 to task5")
    return domain, environment_id, f"{domain}{size}-v0"


def resolve_args(args: Args) -> tuple[Args, dict]:
    """Fill in the paper's values, or those of the run to go on with; check all: (args, that run's args.json or {})."""
    saved = {}
    if folder := args.resume or args.eval_only:
        try:
            saved = json.loads((Path(folder) / "args.json").read_text())
            assert saved["script"] == Path(__file__).stem and saved["data"]["sha256"] and saved["data"]["path"][0]
            saved["hidden_dims"] = tuple(map(int, saved["hidden_dims"]))
            assert all(isinstance(saved[f.name], f.type) for f in dataclasses.fields(Args) if f.name != "hidden_dims")
            said = {word.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for word in sys.argv[1:]}
            given = {k: v for k, v in vars(args).items() if saved[k] != v and (v != getattr(Args, k) or k in said)}
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, AssertionError):
            fail(f"{folder} is no run of {Path(__file__).name}: its args.json is missing, damaged or another script's")
        if changed := given.keys() - MAY_CHANGE:
            fail(f"{folder} was started with another {', '.join(sorted(changed))}; leave that out, or start a new run")
        args = Args(**{k: saved[k] for k in vars(args)} | {"resume": args.resume, "eval_only": args.eval_only} | given)
    domain = split_env_id(args.env_id)[0]
    settings = dict(horizon=5 if domain[:3] in ("cub", "sce", "puz") else 1, discount=0.99, rho=0.5, sparse=False)
    settings |= {name: value for name, (value, *_) in COEFFICIENTS.items()} | PAPER_SETTINGS.get(domain, {})
    args = dataclasses.replace(args, **{k: v for k, v in settings.items() if getattr(args, k, v) is None})
    values = vars(args) | {"hidden_dims": min(args.hidden_dims, default=0)}
    bounds = {f.name: (1, 10**12) for f in dataclasses.fields(Args) if f.type in (int, tuple[int, ...])}
    bounds |= dict.fromkeys(("horizon", "num_critics", "best_of_n", "num_seeds", "eval_envs"), (1, 1000))
    bounds |= {"batch_size": (1, 10**6), "seed": (0, 2**31 - 10**6), "capture_video": (0, 1000), "discount": (0, 1)}
    bounds |= {"flow_steps": (2, 1000), "tau": (1e-9, 1), "rho": (0, 1e9), "learning_rate": (1e-12, 1e3)}
    bounds |= {"max_grad_norm": (1e-12, 1e12)} | {name: limits for name, (_, *limits) in COEFFICIENTS.items()}
    for name, (least, most) in bounds.items():
        if type(values[name]) not in (int, float) or not least <= values[name] <= most:
            fail(f"--{name.replace('_', '-')} must be from {least} to {most}, not {values[name]}")
    return args, saved


# -------------------------------------------------------------------------------------------------------------- 3. data
class Dataset(NamedTuple):
    observations: Any  # (N, O)
    actions: Any  # (N, A)
    rewards: Any  # (N,)
    masks: Any  # (N,) 0 where the task is solved: no bootstrap
    terminals: Any  # (N,) 1 at the last transition of an episode
    next_observations: Any  # (N, O)


class Batch(NamedTuple):
    observations: jax.Array  # (B, O)
    actions: jax.Array  # (B, H*A)
    rewards: jax.Array  # (B,) discounted sum over the chunk
    masks: jax.Array  # (B,)
    valid: jax.Array  # (B,) 1 if the whole chunk lies in one episode
    next_observations: jax.Array  # (B, O)


def gather_chunks(dataset: Dataset, indices: jax.Array, horizon: int, discount: float) -> Batch:
    """Chunks of `horizon` transitions from `indices` (B,) on, cut where their episode ends (arXiv 2507.07969)."""
    steps = indices[:, None] + jnp.arange(horizon)  # (B, H)
    valid = (jnp.cumsum(dataset.terminals[steps], axis=1) == dataset.terminals[steps]).astype(jnp.float32)  # (B, H)
    rewards = jnp.sum(discount ** jnp.arange(horizon) * dataset.rewards[steps] * valid, axis=1)
    masks = jnp.min(jnp.where(valid == 1, dataset.masks[steps], 1.0), axis=1)
    last = indices + jnp.sum(valid, axis=1).astype(indices.dtype) - 1  # (B,) last valid step
    actions = dataset.actions[steps].reshape(len(indices), -1)  # (B, H*A)
    return Batch(dataset.observations[indices], actions, rewards, masks, valid[:, -1], dataset.next_observations[last])


def make_buffer(parts: list[Dataset], online: dict, capacity: int) -> tuple[Dataset, int]:
    """(replay buffer: `parts` of data, online rows so far, empty rows up to `capacity` online ones; rows of data)."""
    num_data = sum(len(part.rewards) for part in parts)
    fill = lambda *x: jnp.concatenate([*x, jnp.zeros((num_data + capacity - sum(map(len, x)), *x[0].shape[1:]))])
    return jax.tree.map(fill, *parts, *([Dataset(**online)] if online else [])), num_data


def add_transitions(buffer: Dataset, rows: Dataset, count, num_data, written, continues) -> Dataset:
    """Write the first `count` of `rows` (H, ..) after the `written` before them: a ring behind `num_data` rows of data.
    The last row ends its episode, so that no chunk runs over the write position, until the next rows go on with that
    episode (`continues`). Its mask stays: an episode that is only cut keeps its bootstrap."""
    size, steps = len(buffer.rewards), jnp.arange(len(rows.rewards))  # (H,)
    place = lambda n: num_data + n % (size - num_data)
    before = buffer.terminals.at[place(written - 1)].min(jnp.where(continues, 0.0, 1.0))
    buffer, rows = buffer._replace(terminals=before), rows._replace(terminals=rows.terminals.at[count - 1].set(1.0))
    at = jnp.where(steps < count, place(written + steps), size)  # row `size` is nowhere: dropped
    return jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), buffer, rows)


def find_dataset(args: Args) -> list[Path]:
    """The dataset's file, or its shards. Downloads or collects what is missing."""
    name, folder = split_env_id(args.env_id)[2], os.path.expanduser(args.dataset_dir or "")
    official, collected = (Path(f"~/.ogbench/{kind}/{name}.npz").expanduser() for kind in ("data", "collected"))
    if args.dataset_dir is not None:
        paths = sorted(filter(Path.is_file, Path(folder).glob("*.npz"))) if os.path.isdir(folder) else []
        paths = [path for path in paths if path.stem == name] or [path for path in paths if path.stem[-4:] != "-val"]
        return paths or fail(f"--dataset-dir {args.dataset_dir} holds neither {name}.npz nor another npz file")
    if found := [path for path in (official, collected) if path.exists()]:
        return found[:1]
    try:
        socket.setdefaulttimeout(20)  # seconds without an answer
        ogbench.download_datasets([name])
        return [official]
    except OSError as error:
        print(f"{name}.npz can't be downloaded ({error}).", flush=True)
    tools = [t for d in Path(__file__).resolve().parents[:2] if (t := d / "tools/collect_dataset.py").exists()]
    if not tools or subprocess.run([sys.executable, tools[0], name, "--episodes", "100"]).returncode:
        fail(f"no dataset: put {name}.npz into {official.parent}, or see tools/collect_dataset.py of the project")
    return [collected]


def load_dataset(args: Args, path: Path, env: gymnasium.Env) -> Dataset:
    """Read an OGBench file and label it with the task's rewards; numpy arrays, float32. Exits with 2 if it is unfit."""
    try:
        data = ogbench.load_dataset(str(path), add_info=True)
        assert not (bad := [k for k, v in data.items() if not np.isfinite(v).all()]), f"{bad} are not finite throughout"
        assert len(data["next_observations"]) == len(data["actions"]), "its last row does not end an episode"
        dims = [data[field].shape[1:] for field in ("observations", "actions", "qpos")]
        assert dims == [(d,) for d in (*env.dims, env.unwrapped.model.nq)], f"its fields {dims} are not the task's"
        assert len(data["actions"]) >= args.horizon, f"its {len(data['actions'])} transitions are fewer than --horizon"
        ogbench.relabel_utils.relabel_dataset(split_env_id(args.env_id)[1], env, data)
    except Exception as error:  # numpy and zipfile raise whatever they stumble over in a foreign file
        fail(f"{path} can't be used for {args.env_id}: {str(error) or type(error).__name__}; make or name another")
    data["rewards"] = np.where(data["rewards"] != 0, -1.0, 0.0) if args.sparse else data["rewards"]
    data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)
    return Dataset(*(np.asarray(data[field], np.float32) for field in Dataset._fields))


# ---------------------------------------------------------------------------------------------------------- 4. networks
class MLP(nn.Module):
    """Dense -> GELU (-> LayerNorm) for each hidden layer, then Dense. (..., I) -> (..., output_dim)."""

    hidden_dims: tuple[int, ...]
    output_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_dims:
            x = nn.gelu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x), approximate=True)
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return nn.Dense(self.output_dim, kernel_init=nn.initializers.xavier_uniform())(x)


class VelocityField(nn.Module):
    """v(s, x, t): (..., O), (..., D), (..., 1) -> (..., D)."""

    hidden_dims: tuple[int, ...]
    action_dim: int  # D

    @nn.compact
    def __call__(self, observations, x, t):
        nn.share_scope(self, mlp := MLP(self.hidden_dims, self.action_dim))
        observations, t = (jnp.broadcast_to(y, (*x.shape[:-1], y.shape[-1])) for y in (observations, t))
        return mlp(jnp.concatenate([observations, x, t], axis=-1))


class Critic(nn.Module):
    """K critics Q_k(s, a): (..., O), (..., D) -> (K, ...)."""

    hidden_dims: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, observations, actions):
        ensemble = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        nn.share_scope(self, mlp := nn.vmap(MLP, axis_size=self.num_critics, **ensemble)(self.hidden_dims, 1, True))
        return mlp(jnp.concatenate([observations, actions], axis=-1))[..., 0]


class Networks(NamedTuple):
    critic: Critic
    slow: VelocityField  # behaviour flow
    fast: VelocityField  # fine-tuned flow


def make_networks(args: Args, observation_dim: int, action_dim: int) -> Networks:
    """The modules, without parameters; `action_dim` is A, of one action."""
    velocity_field = VelocityField(args.hidden_dims, args.horizon * action_dim)
    return Networks(Critic(args.hidden_dims, args.num_critics), velocity_field, velocity_field)


# -------------------------------------------------------------------------------------------------------- 5. the policy
def sample_ode(velocity, x0: jax.Array, num_steps: int) -> jax.Array:
    """Equation (3): x0 (..., D) noise -> (..., D) action chunk, not clipped. Choice: `unroll`, docs/performance.md."""
    step = lambda x, t: (x + velocity(x, jnp.full((*x.shape[:-1], 1), t)) / num_steps, None)
    return jax.lax.scan(step, x0, jnp.arange(num_steps) / num_steps, unroll=10)[0]


def memoryless_sigma(t, h):
    """sigma_i of equation (4), with t_i = t; the paper shifts t by h to stay finite at 0."""
    return jnp.sqrt(2 * (1 - t + h) / (t + h))


def sample_memoryless_sde(velocity, base_velocity, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """Equation (4): x0 (B, D), noise (T-1, B, D) -> x_0 .. x_T (T+1, B, D); the last is an Euler step of the base."""
    h = 1 / (len(noise) + 1)

    def step(x, t_and_noise):
        t, noise_i = t_and_noise
        drift = 2 * velocity(x, jnp.full((*x.shape[:-1], 1), t)) - x / (t + h)
        x_next = x + h * drift + jnp.sqrt(h) * memoryless_sigma(t, h) * noise_i
        return x_next, x_next

    x, xs = jax.lax.scan(step, x0, (jnp.arange(len(noise)) * h, noise), unroll=10)  # (T-1, B, D): x_1 .. x_{T-1}
    x_last = x + h * base_velocity(x, jnp.full((*x.shape[:-1], 1), 1 - h))
    return jnp.concatenate([x0[None], xs, x_last[None]])


def lean_adjoint(base_velocity, xs: jax.Array, terminal_adjoint: jax.Array) -> jax.Array:
    """Equation (5): states x_0 .. x_{T-1} (T, B, D), g at x_T (B, D) -> adjoints g_0 .. g_{T-1} (T, B, D)."""
    h = 1 / len(xs)

    def linearise(x, t):  # x_i (B, D), t_i + h -> the map from g to J^T g
        return jax.vjp(lambda x: 2 * base_velocity(x, jnp.full((*x.shape[:-1], 1), t)) - x / t, x)[1]

    def step(g, pull_back):
        g = g + h * pull_back(g)[0]
        return g, g

    pull_backs = jax.vmap(linearise)(xs, (jnp.arange(len(xs)) + 1) * h)  # all T at once; only g goes step by step
    return jax.lax.scan(step, terminal_adjoint, pull_backs, reverse=True, unroll=10)[1]


def policy(args: Args, networks: Networks, params: dict, observations: jax.Array, noise: jax.Array) -> jax.Array:
    """The policy: observations (..., O), noise (..., D) -> chunks (..., D) in [-1, 1] by fast, equation (3)."""
    fast = partial(networks.fast.apply, {"params": params["fast"]}, observations)
    return jnp.clip(sample_ode(fast, noise, args.flow_steps), -1, 1)


def sample_actions(args: Args, networks: Networks, params: dict, observations: jax.Array, key: jax.Array) -> jax.Array:
    """Act: observations (B, O) -> chunks (B, H*A) in [-1, 1], the best of `best_of_n` by the mean critic."""
    action_dim = params["critic"]["Dense_0"]["kernel"].shape[-2] - observations.shape[-1]  # D
    noise = jax.random.normal(key, (args.best_of_n, len(observations), action_dim))
    observations = jnp.broadcast_to(observations, (args.best_of_n, *observations.shape))
    actions = policy(args, networks, params, observations, noise)  # (n, B, D)
    if args.best_of_n == 1:
        return actions[0]
    q = networks.critic.apply({"params": params["critic"]}, observations, actions).mean(axis=0)  # (n, B)
    return jnp.take_along_axis(actions, q.argmax(axis=0)[None, :, None], axis=0)[0]


# ------------------------------------------------------------------------------------------------------------ 6. losses
def td_target(rewards: jax.Array, masks: jax.Array, next_q: jax.Array, discount_h: float, rho: float) -> jax.Array:
    """Equation (1): rewards (B,), masks (B,), next_q (K, B) -> y (B,)."""
    return rewards + discount_h * masks * (next_q.mean(axis=0) - rho * next_q.std(axis=0))


def critic_loss(args: Args, networks: Networks, params: dict, target_params: dict, batch: Batch, key: jax.Array):
    """Equation (1): (loss, metrics)."""
    noise, acting = jax.random.normal(key, batch.actions.shape), params | {"target": target_params}
    next_actions = jax.lax.stop_gradient(policy(args, networks, acting, batch.next_observations, noise))  # a' (B, D)
    next_q = networks.critic.apply({"params": target_params["critic"]}, batch.next_observations, next_actions)  # (K, B)
    y = td_target(batch.rewards, batch.masks, next_q, args.discount**args.horizon, args.rho)
    q = networks.critic.apply({"params": params["critic"]}, batch.observations, batch.actions)  # (K, B)
    loss = jnp.mean(batch.valid * (q - y) ** 2)
    return loss, {"critic_loss": loss, "q_mean": q.mean(), "q_std": q.std(axis=0).mean()}


def flow_matching_loss(velocity, actions: jax.Array, valid: jax.Array, x0: jax.Array, t: jax.Array) -> jax.Array:
    """Equation (2): actions (B, D), valid (B,), x0 (B, D) noise, t (B, 1) -> scalar."""
    x_t = (1 - t) * x0 + t * actions
    return jnp.mean(valid * jnp.mean((velocity(x_t, t) - (actions - x0)) ** 2, axis=-1))


def adjoint_matching_loss(velocity, base_velocity, xs: jax.Array, adjoints: jax.Array) -> jax.Array:
    """Equation (6): states x_0 .. x_{T-1} and adjoints (T, B, D) -> scalar; gradients reach `velocity` alone."""
    xs, adjoints = jax.lax.stop_gradient((xs, adjoints))
    t = jnp.broadcast_to(jnp.arange(len(xs))[:, None, None] / len(xs), (*xs.shape[:-1], 1))  # (T, B, 1)
    sigma = memoryless_sigma(t, 1 / len(xs))  # (T, B, 1)
    difference = velocity(xs, t) - jax.lax.stop_gradient(base_velocity(xs, t))
    return jnp.mean(jnp.sum((2 / sigma * difference + sigma * adjoints) ** 2, axis=(0, 2)))


def policy_loss(args: Args, networks: Networks, params: dict, target_params: dict, batch: Batch, q, target_q, key):
    """Equations (2), (4), (5), (6): (loss, metrics). q and target_q map (s, a) to (K, B); QAM uses target_q alone."""
    key_x0, key_t, key_sde, key_noise = jax.random.split(key, 4)
    observations, shape = batch.observations, batch.actions.shape  # (B, D)
    slow = partial(networks.slow.apply, {"params": params["slow"]}, observations)
    fast = partial(networks.fast.apply, {"params": params["fast"]}, observations)
    base = partial(networks.slow.apply, {"params": target_params["slow"]}, observations)
    x0, t = jax.random.normal(key_x0, shape), jax.random.uniform(key_t, (shape[0], 1))
    behaviour_loss = flow_matching_loss(slow, batch.actions, batch.valid, x0, t)
    x0, noise = jax.random.normal(key_sde, shape), jax.random.normal(key_noise, (args.flow_steps - 1, *shape))
    xs = jax.lax.stop_gradient(sample_memoryless_sde(fast, base, x0, noise))  # (T+1, B, D)
    value = lambda a: target_q(observations, jnp.clip(a, -1, 1)).mean(axis=0).sum()
    g = -args.inv_temp * jax.grad(value)(xs[-1])  # (B, D)
    matching_loss = adjoint_matching_loss(fast, base, xs[:-1], lean_adjoint(base, xs[:-1], g))
    metrics = {"flow_loss": behaviour_loss, "adjoint_loss": matching_loss, "adjoint_mean": jnp.abs(g).mean()}
    return behaviour_loss + matching_loss, metrics


# ---------------------------------------------------------------------------------------------------------- 7. training
class TrainState(NamedTuple):
    params: dict  # by network
    target_params: dict  # of those networks that have a slow copy
    opt_state: Any
    step: jax.Array  # () gradient steps taken


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """One Adam for all networks; their joint gradient is clipped at `max_grad_norm` first."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate))


def init_state(args: Args, networks: Networks, observation_dim: int, action_dim: int, key: jax.Array) -> TrainState:
    """Fresh parameters, each network's independent of the others'; targets start as copies; `action_dim` is A."""
    keys = dict(zip(networks._fields, jax.random.split(key, len(networks)), strict=True))
    s, a, t = jnp.zeros((1, observation_dim)), jnp.zeros((1, args.horizon * action_dim)), jnp.zeros((1, 1))
    inputs = {"critic": (s, a), "slow": (s, a, t), "fast": (s, a, t)}
    params = {name: getattr(networks, name).init(keys[name], *inputs[name])["params"] for name in inputs}
    target_params = {name: jax.tree.map(jnp.copy, params[name]) for name in ("critic", "slow")}
    return TrainState(params, target_params, make_optimizer(args).init(params), jnp.zeros((), jnp.int32))


def update(args: Args, networks: Networks, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict]:
    """One gradient step on both losses; targets move towards the parameters of before it: (state, metrics)."""
    key_critic, key_policy = jax.random.split(key)
    params, target_params = state.params, state.target_params
    q, target_q = (partial(networks.critic.apply, {"params": p["critic"]}) for p in (params, target_params))  # fixed

    def total_loss(params):
        loss_q, metrics_q = critic_loss(args, networks, params, target_params, batch, key_critic)
        loss_pi, metrics_pi = policy_loss(args, networks, params, target_params, batch, q, target_q, key_policy)
        return loss_q + loss_pi, metrics_q | metrics_pi

    grads, metrics = jax.grad(total_loss, has_aux=True)(params)
    updates, opt_state = make_optimizer(args).update(grads, state.opt_state, params)
    target_params = optax.incremental_update({k: params[k] for k in target_params}, target_params, args.tau)
    metrics |= {"grad_norm": optax.tree.norm(grads), "policy_grad_norm": optax.tree.norm(grads | {"critic": 0.0})}
    return TrainState(optax.apply_updates(params, updates), target_params, opt_state, state.step + 1), metrics


def sample_indices(args: Args, key: jax.Array, num_data, num_online) -> jax.Array:
    """First rows (B,) of chunks in the buffer, uniform; with --balanced-sampling half are data, half online rows."""
    online = args.balanced_sampling & (num_online > 0) & (jnp.arange(args.batch_size) < args.batch_size // 2)  # (B,)
    first, last = jnp.where(online, num_data, 0), num_data + jnp.where(args.balanced_sampling & ~online, 0, num_online)
    return jax.random.randint(key, (args.batch_size,), first, jnp.maximum(first, last - args.horizon) + 1)


def train_steps(args, networks: Networks, state: TrainState, dataset: Dataset, num_steps, num_data=None, num_online=0):
    """`num_steps` updates, for main to jit as one call: (state, metrics of the last, or of the first not finite)."""
    num_data = len(dataset.rewards) if num_data is None else num_data  # behind them `num_online` rows of online steps

    def one_update(_, carry):
        state, before = carry
        key_indices, key_update = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), state.step))
        indices = sample_indices(args, key_indices, num_data, jnp.minimum(num_online, len(dataset.rewards) - num_data))
        batch = gather_chunks(dataset, indices, args.horizon, args.discount)
        state, metrics = update(args, networks, state, batch, key_update)
        metrics |= {"step": state.step}
        finite = jnp.isfinite(jnp.array(list(before.values()))).all()
        return state, jax.tree.map(partial(jnp.where, finite), metrics, before or metrics)

    metrics = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_update, 0, (state, {}))[1])
    return jax.lax.fori_loop(0, num_steps, one_update, (state, metrics))


# ------------------------------------------------------------------------------------------------- 8. evaluation, files
class ChunkedEpisode(gymnasium.Wrapper):
    """An environment whose step executes a whole chunk, and whose episode depends on the reset's seed alone."""

    def __init__(self, environment_id: str, horizon: int):
        warnings.filterwarnings("ignore")  # about missing displays and rounded bounds
        super().__init__(gymnasium.make(environment_id))
        self.one_action = type(self.unwrapped).action_space = self.env.action_space  # OGBench's own is unseeded
        self.dims = self.env.observation_space.shape[0], self.one_action.shape[0]  # O, A
        self.action_space = gymnasium.spaces.Box(-1, 1, (horizon * self.dims[1],))

    def reset(self, *, seed=None, options=None):
        np.random.seed(seed)  # OGBench draws from numpy's global generator too
        self.one_action.seed(seed)
        self.scores, self.frames = {"success": 0.0, "return": 0.0, "length": 0}, []
        self.video = (options or {}).get("videos", {}).get(seed)
        return self.env.reset(seed=seed)[0], {}

    def step(self, chunk):
        for action in chunk.reshape(-1, self.dims[1]):
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.scores["success"], self.scores["length"] = float(info["success"]), self.scores["length"] + 1
            self.scores["return"] += float(reward)
            self.frames += [self.unwrapped.render()] if self.video else []
            if terminated or truncated:
                break
        if self.video and (terminated or truncated):
            self.video = __import__("imageio").mimwrite(self.video, self.frames, fps=20, macro_block_size=8)
        return observation, float(reward), terminated, truncated, self.scores


def play(args: Args, env: ChunkedEpisode, observation: np.ndarray, actions: np.ndarray) -> tuple[Dataset, int, bool]:
    """Execute actions (n, A), n <= H, while the episode lasts: (rows (H, ..), how many of them hold, ended)."""
    rows, ended = [], False
    for action in np.clip(actions, -1 + 1e-5, 1 - 1e-5):
        if not ended:  # OGBench scores the state before the step, here as in load_dataset
            next_observation, reward, terminated, truncated, _ = env.step(action)
            reward, ended = -float(reward != 0) if args.sparse else reward, terminated or truncated
            rows.append((observation, action, reward, 1.0 - terminated, float(ended), next_observation))
            observation = next_observation
    padded = rows + rows[-1:] * (args.horizon - len(rows))  # one shape, one compilation
    return Dataset(*(np.array(column, np.float32) for column in zip(*padded, strict=True))), len(rows), ended


def evaluate(args: Args, act, states: TrainState, envs, run_dir: Path, signals: list, step: int | None = None):
    """Score act(params, observations (E, O), key, numbers (E,)) -> (E, H*A) by seed: rows of eval.csv, [] on stop."""
    rows, step, num_envs = [], int(states.step[0]) if step is None else step, envs.num_envs
    for i, seed in enumerate(range(args.seed, args.seed + args.num_seeds)):
        params = jax.tree.map(lambda x: x[i], states.params | {"target": states.target_params})  # noqa: B023
        videos = {e: f"{run_dir}/videos/step_{step}_seed_{seed}_{e}.mp4" for e in range(args.capture_video)}
        key, started, results = jax.random.fold_in(jax.random.key(seed), 2**32 - 2), time.time(), []  # of no update
        episodes, chunks = np.arange(num_envs), np.zeros(num_envs, int)  # process i: i, i + E, .., a quota fixed here
        playing = restart = np.ones(num_envs, bool)
        while playing.any():
            if signals:
                return []
            if restart.any():
                observations, _ = envs.reset(seed=episodes.tolist(), options=dict(reset_mask=restart, videos=videos))
            actions = np.asarray(act(params, observations, key, episodes * 2**12 + chunks))  # the same for any E
            observations, _, terminated, truncated, scores = envs.step(actions)
            ended = (terminated | truncated) & playing
            results += [[scores[name][e] for name in ("success", "return", "length")] for e in np.flatnonzero(ended)]
            episodes, chunks = episodes + num_envs * ended, (chunks + 1) * ~ended
            playing = episodes < args.eval_episodes
            restart = ended & playing
        scores = dict(zip(("success_rate", "return", "length"), np.mean(results, axis=0).tolist(), strict=True))
        scores |= {"episodes": len(results), "wall_seconds": round(time.time() - started, 1)}
        rows.append({"step": step, "seed": seed, "phase": ("offline", "online")[step > args.offline_steps]} | scores)
        tqdm.write("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


def write_whole(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all; the one before becomes `previous`, if named."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(f"{path}.tmp", path)


def save_checkpoint(run_dir: Path, states: TrainState, log: dict) -> None:
    """checkpoint.msgpack: 32 bytes of SHA-256, then the states and, as JSON, the rows of the CSV files."""
    states = flax.serialization.to_state_dict(jax.device_get(states))
    content = flax.serialization.msgpack_serialize({"states": states, "log": json.dumps(log)})
    content = hashlib.sha256(content).digest() + content
    write_whole(run_dir / "checkpoint.msgpack", content, run_dir / "checkpoint.previous.msgpack")


def load_checkpoint(run_dir: str | Path) -> dict:
    """{"states": nested dicts of arrays, leading axis the seeds, "log": JSON}; exits with 2 if no file is whole."""
    for path in (Path(run_dir) / "checkpoint.msgpack", Path(run_dir) / "checkpoint.previous.msgpack"):
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return flax.serialization.msgpack_restore(content[32:])
        print(f"{path} is {'damaged' if content else 'not there'}", file=sys.stderr)
    fail(f"{run_dir} holds no whole checkpoint; start the run anew")


# -------------------------------------------------------------------------------------------------------------- 9. main
def main(args: Args) -> list[dict] | None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts there is nothing to save
    (args, saved), signals = resolve_args(args), []
    args.num_seeds == 1 or fail("--num-seeds must be 1: each seed needs its own environment and buffer, so a run each")
    args, source = read_offline_run(args) if args.offline_checkpoint and not saved else (args, {})
    name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.eval_only or Path(args.run_dir) / name)
    if args.capture_video:
        os.environ.setdefault("MUJOCO_GL", "glfw" if os.environ.get("DISPLAY") else "egl")
        find_spec("imageio_ffmpeg") or fail('--capture-video needs an encoder: pip install "imageio[ffmpeg]"')
    make_env = partial(ChunkedEpisode, split_env_id(args.env_id)[1], args.horizon)
    env = make_env()
    networks = make_networks(args, *env.dims)
    init = lambda seed: init_state(args, networks, *env.dims, jax.random.key(~seed))
    states = jax.jit(jax.vmap(init))(np.array([args.seed]))  # a leading axis of one seed, as in qam_offline.py's files
    alone = lambda states, *rest: jax.lax.map(lambda state: train_steps(args, networks, state, *rest), states)
    act = lambda params, s, key, n: sample_actions(args, networks, params, s[None], jax.random.fold_in(key, n))[0]
    act, key = jax.jit(jax.vmap(act, (None, 0, None, 0))), jax.random.fold_in(jax.random.key(args.seed), 2**32 - 3)
    choose = jax.jit(lambda p, s, n: act(jax.tree.map(lambda x: x[0], p), s[None], key, jnp.array([n]))[0])
    log, online = {file: [] for file in ("metrics.csv", "eval.csv", "episodes.csv")}, {}  # online: rows behind the data
    if saved or source:
        checkpoint = load_checkpoint(run_dir if saved else args.offline_checkpoint)
        online, i = checkpoint["states"].pop("online", {}), args.seed - (saved or source)["seed"]
        states = flax.serialization.from_state_dict(states, jax.tree.map(lambda x: x[i : i + 1], checkpoint["states"]))
        log |= {k: [r for r in rows if r["seed"] == args.seed] for k, rows in json.loads(checkpoint["log"]).items()}
    states, updates, written = jax.device_put(states), int(states.step[0]), len(online.get("rewards", ()))
    step, total = min(updates, args.offline_steps) + written, args.offline_steps + args.online_steps
    source and updates != args.offline_steps and fail(f"--offline-checkpoint: finish that run, now at update {updates}")
    owed = lambda: args.offline_steps + args.utd_ratio * max(0, written - args.start_training) - updates
    if not args.eval_only:
        paths = find_dataset(args)
        order, every = np.random.default_rng(args.seed).permutation(len(paths)), args.dataset_replace_every
        shard = lambda step: load_dataset(args, paths[order[step // every % len(paths)]], env)
        whole = (online, max(args.online_steps, written))  # online rows, and room for them
        dataset, num_data = make_buffer([shard(step)], *(whole if len(paths) == 1 else ({}, 0)))
        hashes = [hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in paths]
        if (before := saved or source) and hashes != before["data"]["sha256"]:
            fail(f"{paths[0]} is not the run's data, {before['data']['path'][0]}; name its folder with --dataset-dir")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the environment processes: Ctrl-C is for this one alone
    spawn = dict(context="spawn", autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)  # fork copies held locks
    envs = gymnasium.vector.AsyncVectorEnv([make_env] * min(args.eval_envs, args.eval_episodes), **spawn)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    if args.eval_only:
        return evaluate(args, act, states, envs, run_dir, signals, step) or sys.exit(128 + signals[0])
    record = vars(args) | {"script": Path(__file__).stem, "observation_dim": env.dims[0], "action_dim": env.dims[1]}
    paper = PAPER_SETTINGS.get(split_env_id(args.env_id)[0], {}).get("dataset", "official")
    data = {"path": list(map(str, paths)), "sha256": hashes, "transitions": num_data, "of_paper": paper}
    versions = {name: version(name) for name in ("jax", "flax", "optax", "gymnasium", "ogbench", "mujoco")}
    record |= {"data": data, "device": jax.local_devices()[0].device_kind, "versions": versions}
    print(", ".join(f"{key} {value}" for key, value in record.items()))
    try:
        (run_dir / "videos").mkdir(parents=True, exist_ok=bool(saved))
        write_whole(run_dir / "args.json", json.dumps(record, indent=1).encode())
        if args.track:
            import wandb

            mode = os.environ.get("WANDB_MODE", "online" if wandb.api.api_key else "offline")
            wandb.init(project=args.wandb_project, name=run_dir.name, dir=str(run_dir), config=record, mode=mode)

        def add_rows(file, rows):
            log[file] += rows
            cells = [log[file][-1], *([row.get(name, "") for name in log[file][-1]] for row in log[file])]
            write_whole(run_dir / file, "".join(",".join(map(str, row)) + "\n" for row in cells).encode())
            for row in rows if args.track else []:
                wandb.log({f"{file[:-4]}/{key}/{row['seed']}": value for key, value in row.items()}, step=row["step"])

        train, add = jax.jit(alone, donate_argnums=0), jax.jit(add_transitions, donate_argnums=0)
        states, _ = train(states, dataset, 0, num_data, 0)  # compiles
        intervals = [args.log_every, args.eval_every, args.checkpoint_every] + [every] * (len(paths) > 1)
        loader, dispatch, logged, busy, left = ThreadPoolExecutor(1), 1, updates, 0.0, None
        observation, actions, metrics = None, np.zeros((0, env.dims[1])), {}
        upcoming = loader.submit(shard, step + every) if len(paths) > 1 else None
        for file, rows in log.items():  # what a killed run wrote after its checkpoint goes
            add_rows(file, []) if rows else (run_dir / file).unlink(missing_ok=True)
        bar = tqdm(total=total, initial=step, unit=" steps", dynamic_ncols=True)
        while True:
            done, last = step >= total and owed() <= 0, log["eval.csv"][-1]["step"] if log["eval.csv"] else 0
            due = step > last and (done or (step < total and 0 in (step % args.eval_every, step - args.offline_steps)))
            if signals or done or due or (step > 0 and step % args.checkpoint_every == 0):
                if written and not upcoming:
                    online = jax.device_get({k: x[num_data : num_data + written] for k, x in dataset._asdict().items()})
                save_checkpoint(run_dir, states._asdict() | {"online": online}, log)
            if due and (rows := evaluate(args, act, states, envs, run_dir, signals, step)):
                add_rows("eval.csv", rows)
                rates = [row["success_rate"] for row in rows]
                bar.set_description(f"success {np.mean(rates):.2f} ± {np.std(rates):.2f}")
            if signals or done:
                break
            started, num_updates, limit = time.time(), 0, min(n - step % n for n in intervals)
            if step < args.offline_steps:
                num_steps = num_updates = min(dispatch, args.offline_steps - step, limit)
                states, metrics = train(states, dataset, num_updates, num_data, 0)
            else:
                if upcoming:  # the online phase begins: all shards at once from here on
                    dataset = upcoming = upcoming.result() and None  # wait: its thread resets env
                    dataset, num_data = make_buffer([load_dataset(args, path, env) for path in paths], *whole)
                if observation is None:  # a new episode
                    episode_seed = np.random.SeedSequence((args.seed, written)).generate_state(1)[0]
                    (observation, _), actions, began = env.reset(seed=int(episode_seed)), actions[:0], started
                if not len(actions) or step >= total:  # Choice: act before the updates that the last chunk calls for
                    chosen = choose(states.params | {"target": states.target_params}, observation, written)
                    if num_updates := owed():
                        learning = loader.submit(train, states, dataset, num_updates, num_data, written)
                    if args.balanced_sampling and written < args.start_training:
                        chosen = np.random.default_rng((args.seed, written)).uniform(-1, 1, chosen.shape)
                    actions = np.asarray(chosen).reshape(-1, env.dims[1])
                actions, rest = np.split(actions, [min(total - step, limit)])  # played while the device works
                rows, num_steps, ended = play(args, env, observation, actions) if len(actions) else (None, 0, False)
                states, metrics = learning.result() if num_updates else (states, metrics)
                if num_steps:
                    dataset = add(dataset, rows, num_steps, num_data, written, env.scores["length"] > num_steps)
                    actions, observation = rest, None if ended else rows.next_observations[num_steps - 1]
                    written += num_steps
                if ended:
                    row = {"step": step + num_steps, "seed": args.seed} | env.scores
                    add_rows("episodes.csv", [row | {"wall_seconds": round(time.time() - began, 2)}])
            metrics = jax.device_get(metrics)  # waits for the device
            step, updates, seconds = step + num_steps, updates + num_updates, time.time() - started
            if bad := sorted((n for n in metrics if not np.isfinite(metrics[n]).all()), key=lambda n: "loss" not in n):
                fail(f"{bad[0]} is not finite at step {metrics['step'].min()}; {run_dir} keeps the last checkpoint", 1)
            busy, dispatch = busy + seconds * (num_updates > 0), max(1, int(1.5 * num_steps / seconds))  # Choice: 1.5 s
            if left is None and busy > 1 and num_updates:
                left = (args.offline_steps + args.utd_ratio * args.online_steps - updates) / num_updates * seconds
                tqdm.write(f"about {left / 3600:.2g} hours on this {record['device']}; see README for sizes that fit")
            bar.set_postfix({n: f"{m.mean():.3g}" for n, m in metrics.items() if "loss" in n}, refresh=False)
            bar.update(num_steps)
            if step % args.log_every == 0 and updates > logged and num_steps:
                values = {"step": step, "seed": args.seed} | {n: float(m[0]) for n, m in metrics.items() if n != "step"}
                add_rows("metrics.csv", [values | {"updates_per_second": round((updates - logged) / busy, 2)}])
                logged, busy = updates, 0.0
            if upcoming and step % every == 0:
                dataset = None  # two shards in memory, never three
                dataset, num_data = make_buffer([upcoming.result()], {}, 0)
                upcoming = loader.submit(shard, step + every)
        bar.close(), envs.close(terminate=True)  # also when the signal has reached its processes
    except OSError as error:
        fail(f"writing to {run_dir} failed ({error}); what was saved there before is whole. See --run-dir and --resume")
    if signals:
        print(f"stopped at step {step} and saved; to go on: python {sys.argv[0]} --resume {run_dir}")
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    main(tyro.cli(Args))
