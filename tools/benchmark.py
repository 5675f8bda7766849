"""Measure a script's speed: python tools/benchmark.py qam_offline.py [--json] [the script's flags]

In one process: the rate at which this machine multiplies matrices of the sizes in use (float32), the script's updates a
second, and the fraction that these reach of the best of those rates ("MFU"), with a nominal count of operations that
does not change with the implementation. For QAM 2 B ((8 T + 3) W_v + 6 K W_c) an update, with W the kernel entries of
one network: 61 GFLOP at paper size with 37 observations and D = 25. Then the seconds to compile, the peak memory, and
the environment steps a second of an evaluation against those of the bare environment on as many processes. Medians of
--repeats, after warm-up. Data are random numbers (--transitions of them), or the dataset in --dataset-dir. --json
prints one JSON object and nothing else.

qam_offline_to_online.py is also run online (--online-seconds, after its first fifth): its environment steps a second,
and what fraction that is of the slower of the environment alone (one, in this process) and the updates alone.
"""

import argparse
import dataclasses
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gymnasium
import jax
import numpy as np
import ogbench  # noqa: F401 (registers the environments, in the processes of the evaluation too)
import tyro

# Forward pass: 1 W; backward pass to the input: 1 W; to the parameters: 1 W. T flow steps, v: flow, q: K critics.
NOMINAL = {
    "qam_offline": lambda T, K, W: (8 * T + 3) * W["fast"] + 6 * K * W["critic"],
    "fql": lambda T, K, W: (T + 3) * W["flow"] + 4 * W["one_step"] + 6 * K * W["critic"],
    "fbrac": lambda T, K, W: (4 * T + 3) * W["flow"] + 6 * K * W["critic"],
    "qam_offline_to_online": lambda T, K, W: (8 * T + 3) * W["fast"] + 6 * K * W["critic"],
    "qam_diffusion_variant": lambda T, K, W: (8 * T - 3) * W["fast"] + 6 * K * W["critic"],
    "bam": lambda T, K, W: (9 * T - 3) * W["fast"] + 6 * K * W["critic"],
    "dsrl": lambda T, K, W: (2 * T + 3) * W["flow"] + 4 * W["actor"] + 5 * K * (W["critic"] + W["latent_critic"]),
}


def kernel_entries(args, params: dict) -> dict:
    """{network: entries of its kernels}, of one member where there are K."""
    entries = {}
    for name, tree in params.items():
        kernels = [leaf for leaf in jax.tree.leaves(tree) if np.ndim(leaf) >= 2]
        ensemble = name.endswith("critic")
        kernels = [leaf for leaf in kernels if np.ndim(leaf) == 2 + ensemble]  # not the biases of an ensemble
        entries[name] = sum(leaf.size for leaf in kernels) // (args.num_critics if ensemble else 1)
    return entries


def steps_of(args) -> int:
    """T, or N for a diffusion."""
    return args.flow_steps if hasattr(args, "flow_steps") else args.diffusion_steps


def matmul_rates(args) -> dict:
    """{size: a function that multiplies for about 0.2 s and returns GFLOP a second}, float32."""
    width, batch = max(args.hidden_dims), args.batch_size
    sizes = {
        f"{batch} x {width}": ((batch, width), (width, width)),
        f"{steps_of(args) * batch} x {width}": ((steps_of(args) * batch, width), (width, width)),
        f"{args.num_critics} x {batch} x {width}": ((args.num_critics, batch, width), (args.num_critics, width, width)),
    }

    def measured(left, right):
        a, b = (jax.random.normal(jax.random.key(0), shape) for shape in (left, right))
        many = jax.jit(lambda a, b, n: jax.lax.fori_loop(0, n, lambda _, x: x @ b * right[-1] ** -0.5, a))
        operations = 2 * float(np.prod(left)) * right[-1]
        n = max(1, int(1e9 / operations))
        while timed(partial(many, a, b, n)) < 0.1:
            n *= 2
        return lambda: operations * n / timed(partial(many, a, b, n)) / 1e9

    return {name: measured(*shapes) for name, shapes in sizes.items()}


def timed(call) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def random_dataset(script, args, dims: tuple[int, int], transitions: int):
    rng, (observation_dim, action_dim) = np.random.default_rng(0), dims
    observations, next_observations = rng.normal(size=(2, transitions, observation_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (transitions, action_dim)).astype(np.float32)
    terminals = (np.arange(1, transitions + 1) % 1000 == 0).astype(np.float32)
    ones = np.ones(transitions, np.float32)
    return script.Dataset(observations, actions, -ones, ones, terminals, next_observations)


class BareEpisode(gymnasium.Wrapper):
    """The environment alone: a step is a whole episode of the given actions."""

    def __init__(self, environment_id: str):
        super().__init__(gymnasium.make(environment_id))
        self.one_action, self.length = self.env.action_space, self.env.spec.max_episode_steps
        self.action_space = gymnasium.spaces.Box(-1, 1, (self.length, self.one_action.shape[0]))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        return np.zeros(1), {}

    def step(self, actions):
        for action in actions:
            _, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                break
        return np.zeros(1), 0.0, True, False, {}


def evaluation_speed(script, args, networks, states, repeats: int) -> tuple[float, float]:
    """Environment steps a second of `evaluate`, and of the bare environment on as many processes, resets included."""
    spawn = dict(context="spawn", autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
    environment_id = script.split_env_id(args.env_id)[1]
    args = dataclasses.replace(args, num_seeds=1, capture_video=0, eval_episodes=4 * args.eval_envs)
    act = lambda params, s, key, n: script.sample_actions(args, networks, params, s[None], jax.random.fold_in(key, n))[
        0
    ]
    act = jax.jit(jax.vmap(act, (None, 0, None, 0)))
    speeds = {"evaluate": [], "bare": []}
    envs = gymnasium.vector.AsyncVectorEnv(
        [partial(script.ChunkedEpisode, environment_id, args.horizon)] * args.eval_envs, **spawn
    )
    bare = gymnasium.vector.AsyncVectorEnv([partial(BareEpisode, environment_id)] * args.eval_envs, **spawn)
    actions = np.clip(np.random.default_rng(0).normal(size=bare.action_space.shape), -1, 1)  # what a new policy does
    for _ in range(repeats + 1):  # the first compiles
        started = time.perf_counter()
        (row,) = script.evaluate(args, act, states, envs, Path(tempfile.gettempdir()), [])
        speeds["evaluate"].append(row["length"] * row["episodes"] / (time.perf_counter() - started))
        started = time.perf_counter()
        bare.reset(seed=list(range(args.eval_envs)))
        bare.step(actions)
        speeds["bare"].append(actions.shape[0] * actions.shape[1] / (time.perf_counter() - started))
    envs.close()
    bare.close()
    return tuple(float(np.median(values[1:])) for values in speeds.values())


def online_speed(script, args, env, bound: float, seconds: float, transitions: int) -> float:
    """Environment steps a second of the script's own main, from an online phase of about `seconds` at `bound` steps."""
    steps = max(10, int(bound * seconds / 5)) * 5
    with tempfile.TemporaryDirectory() as folder:
        rng, data = np.random.default_rng(0), random_dataset(script, args, env.dims, transitions)
        size = {"qpos": env.unwrapped.model.nq, "qvel": env.unwrapped.model.nv}
        buttons = getattr(env.unwrapped, "_cur_button_states", np.zeros(0))
        file = {name: rng.normal(size=(transitions, n)).astype(np.float32) for name, n in size.items()}
        file |= {"button_states": np.zeros((transitions, len(buttons)), np.int64)} if len(buttons) else {}
        file |= {name: getattr(data, name) for name in ("observations", "actions")} | {"terminals": data.terminals > 0}
        np.savez(f"{folder}/{script.split_env_id(args.env_id)[2]}.npz", **file)
        own = dict(offline_steps=0, start_training=0, online_steps=steps, log_every=steps // 5, checkpoint_every=10**9)
        own |= dict(eval_every=10**9, eval_episodes=1, eval_envs=1, run_dir=f"{folder}/runs", offline_checkpoint=None)
        script.main(dataclasses.replace(args, **own, dataset_dir=args.dataset_dir or folder))
        (metrics,) = Path(folder).glob("runs/*/metrics.csv")
        header, *lines = (line.split(",") for line in metrics.read_text().splitlines())
    rates = [float(line[header.index("updates_per_second")]) for line in lines]
    return float(np.median(rates[1:])) / args.utd_ratio  # the first holds the compilation


def environment_speed(script, args, env, seconds: float) -> float:
    """Steps a second of the environment alone, as `play` executes them, resets included."""
    rng, count, started = np.random.default_rng(0), 0, time.perf_counter()
    ended, observation = True, None
    while time.perf_counter() - started < seconds:
        observation = env.reset(seed=count)[0] if ended else observation
        actions = rng.uniform(-1, 1, (args.horizon, env.dims[1]))
        rows, n, ended = script.play(args, env, observation, actions)
        observation, count = rows.next_observations[n - 1], count + n
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="for example qam_offline.py; its own flags may follow")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--repeats", type=int, default=7, help="at least 5 for a figure to rely on")
    parser.add_argument("--seconds", type=float, default=1.5, help="of updates a repeat")
    parser.add_argument("--transitions", type=int, default=100_000, help="of random data, without --dataset-dir")
    parser.add_argument("--skip-evaluation", action="store_true")
    parser.add_argument(
        "--online-seconds", type=float, default=30, help="of the online phase, for a script that has one"
    )
    own, flags = parser.parse_known_args()
    if not own.script.is_file() or own.repeats < 1 or own.transitions < 10_000 or own.seconds <= 0:
        parser.error("name a script of the project; --repeats from 1, --transitions from 10000, --seconds above 0")
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what environments and scripts print must not get between the figures
    sys.path.insert(0, str(own.script.resolve().parent))
    script = importlib.import_module(own.script.stem)
    args, _ = script.resolve_args(tyro.cli(script.Args, args=flags, prog=own.script.name))
    warnings = []
    if (load := os.getloadavg()[0]) > 0.3:
        warnings.append(f"the machine was busy at the start (load {load:.1f}); these figures are too low")

    env = script.ChunkedEpisode(script.split_env_id(args.env_id)[1], args.horizon)
    networks = script.make_networks(args, *env.dims)
    dataset = random_dataset(script, args, env.dims, own.transitions)
    if args.dataset_dir is not None:
        dataset = script.load_dataset(args, script.find_dataset(args)[0], env)
    dataset_mib = sum(array.nbytes for array in dataset) / 2**20
    dataset = jax.device_put(dataset)
    seeds = np.arange(args.seed, args.seed + args.num_seeds)
    init = lambda seed: script.init_state(args, networks, *env.dims, jax.random.key(seed))
    states = jax.jit(jax.vmap(init))(seeds)
    one_seed = lambda seed, *rest: script.train_steps(dataclasses.replace(args, seed=seed), networks, *rest)
    train = jax.vmap(one_seed, (0, 0, None, None))
    if args.num_seeds == 1:  # as the script does
        train = lambda seeds, states, *rest: jax.lax.map(lambda x: one_seed(*x, *rest), (seeds, states))
    train = jax.jit(train, donate_argnums=1).lower(seeds, states, dataset, 0)
    started = time.perf_counter()
    train = train.compile()
    compile_seconds = time.perf_counter() - started

    def run(num_steps):
        nonlocal states
        states, metrics = train(seeds, states, dataset, num_steps)
        return metrics

    num_steps = 1
    while (seconds := timed(partial(run, num_steps))) < own.seconds / 2:
        num_steps = max(num_steps + 1, int(num_steps * own.seconds / max(seconds, own.seconds / 10)))
    peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)
    matmuls, rates, speeds = matmul_rates(args), [], []
    for _ in range(own.repeats):  # in turns, so that both see the same machine
        speeds.append(args.num_seeds * num_steps / timed(partial(run, num_steps)))
        rates.append([matmul() for matmul in matmuls.values()])
    rates = dict(zip(matmuls, np.median(rates, axis=0).round(1).tolist(), strict=True))
    if max(speeds) > 1.15 * min(speeds):
        warnings.append(f"updates a second from {min(speeds):.2f} to {max(speeds):.2f}: something else was running")
    params = jax.tree.map(lambda x: x[0], states.params)
    gflop, updates_per_second = None, float(np.median(speeds))
    if own.script.stem in NOMINAL:
        entries = kernel_entries(args, params)
        gflop = 2 * args.batch_size * NOMINAL[own.script.stem](steps_of(args), args.num_critics, entries) / 1e9
    figures = {
        "script": own.script.name,
        "env_id": args.env_id,
        "device": jax.devices()[0].device_kind,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "num_seeds": args.num_seeds,
        "repeats": own.repeats,
        "updates_per_second": round(updates_per_second, 2),
        "gflop_per_update": gflop and float(f"{gflop:.4g}"),
        "matmul_gflop_per_second": max(rates.values()),
        "matmul_gflop_per_second_by_size": rates,
        "mfu": gflop and round(updates_per_second * gflop / max(rates.values()), 3),
        "compile_seconds": round(compile_seconds, 1),
        "dataset_mib": round(dataset_mib, 1),
        "peak_memory_mib": round(peak_memory_mib, 1),
    }
    if not own.skip_evaluation:
        speed, bare = evaluation_speed(script, args, networks, states, own.repeats)
        figures |= {"eval_envs": args.eval_envs, "eval_steps_per_second": round(speed, 1)}
        figures |= {"bare_steps_per_second": round(bare, 1), "eval_fraction": round(speed / bare, 3)}
    if hasattr(script, "play"):
        alone = environment_speed(script, args, env, own.seconds * 2)
        bound = min(alone, updates_per_second / args.utd_ratio)
        speed = online_speed(script, args, env, bound, own.online_seconds, own.transitions)
        figures |= {"environment_steps_per_second_alone": round(alone, 1), "utd_ratio": args.utd_ratio}
        figures |= {"online_steps_per_second": round(speed, 2), "online_fraction": round(speed / bound, 3)}
    figures["warnings"] = warnings
    if own.json:
        print(json.dumps(figures), file=output)
    else:
        print(*(f"{name:34} {value}" for name, value in figures.items()), sep="\n", file=output)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
