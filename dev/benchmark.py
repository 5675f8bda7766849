"""Measure a script's speed: python dev/benchmark.py qam_offline.py [--json] [the script's flags]

In one process: the rate at which this machine multiplies matrices of the sizes in use (float32),
the script's updates a second, and the fraction that these reach of the best of those rates ("MFU"),
with a nominal count of operations that does not change with the implementation. For QAM
2 B ((8 T + 3) W_policy + 6 K W_critic) an update, with W the kernel entries of one network: 61
GFLOP at paper size with 37 observations and D = 25. Then the seconds to compile, the peak memory,
and the environment steps a second of an evaluation against those of the bare environment on as many
processes. Medians of --repeats, after warm-up. Data are random numbers (--transitions of them), or
the dataset in --dataset-dir. --json prints one JSON object and nothing else.

A script with an online phase is also run online (--online-seconds, after its first fifth): its
environment steps a second, and what fraction that is of the slower of the environment alone (one,
in this process) and the updates alone.
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
import tyro
from flax.traverse_util import flatten_dict

# How often an update multiplies a batch with the kernels of a network: a T + b times for (a, b). A
# forward pass counts 1, a backward pass to the input 1, one to the parameters 1.
NOMINAL = {
    "qam_offline": {"policy": (8, 3), "critic": (0, 6)},
    "qam_offline_to_online": {"policy": (8, 3), "critic": (0, 6)},
    "qam_diffusion_variant": {"policy": (8, -3), "critic": (0, 6)},
    "fql": {"behavior": (1, 3), "one_step": (0, 4), "critic": (0, 6)},
    "fbrac": {"policy": (4, 3), "critic": (0, 6)},
    "bam": {"policy": (9, -3), "critic": (0, 6)},
    "dsrl": {"behavior": (2, 3), "actor": (0, 4), "critic": (0, 5), "latent_critic": (0, 5)},
    "trqam": {"policy": (8, 3), "critic": (0, 6)},
    "qam_fql": {"policy": (8, 3), "one_step": (0, 4), "critic": (0, 8)},
    "qam_edit": {"policy": (9, 3), "edit": (0, 4), "critic": (0, 8)},
}
# With this flag at 0 an update is QAM's.
ADDED_BY = {"qam_fql": "fql_alpha", "qam_edit": "edit_scale"}
NEVER = 10**9  # steps


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def seconds_of(call) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    # A clock may be coarse.
    return max(time.perf_counter() - started, 1e-6)


# ----------------------------------------------------------------------------- counting operations


def num_steps_to_action(args) -> int:
    """T, or N for a diffusion."""
    if hasattr(args, "flow_steps"):
        return args.flow_steps
    return args.diffusion_steps


def kernel_entries(params: dict) -> dict[str, int]:
    """{network: entries of its kernels}, those of all K critics of an ensemble."""
    entries = {}
    for name, tree in params.items():
        layers = flatten_dict({"network": tree})
        kernels = [leaf for path, leaf in layers.items() if path[-1] == "kernel"]
        entries[name] = sum(kernel.size for kernel in kernels)
    return entries


def multiplications(method: str, num_steps: int, entries: dict[str, int]) -> int:
    """Nominal multiplications of an update, for one row of a batch."""
    total = 0
    for network, (a_step, more) in NOMINAL[method].items():
        total += (a_step * num_steps + more) * entries[network]
    return total


def gflop_per_update(method: str, args, params: dict) -> float | None:
    if method not in NOMINAL:
        return None
    if method in ADDED_BY and getattr(args, ADDED_BY[method]) == 0:
        method = "qam_offline"
    count = multiplications(method, num_steps_to_action(args), kernel_entries(params))
    gflop = 2 * args.batch_size * count / 1e9
    return float(f"{gflop:.4g}")


# --------------------------------------------------------------------------------- multiplications


class Multiplication:
    """Multiply a matrix with another again and again."""

    def __init__(self, left: tuple, right: tuple):
        key = jax.random.key(0)
        self.left = jax.random.normal(key, left)
        self.right = jax.random.normal(key, right)
        self.gflop = 2 * float(np.prod(left)) * right[-1] / 1e9
        self.multiply = jax.jit(self.multiply_often)
        # So often that it takes a tenth of a second.
        self.times = 1
        while self.seconds() < 0.1:
            self.times *= 2

    @staticmethod
    def multiply_often(left, right, times):
        scale = right.shape[-1] ** -0.5  # keeps the numbers near 1
        return jax.lax.fori_loop(0, times, lambda _, x: x @ right * scale, left)

    def seconds(self) -> float:
        return seconds_of(partial(self.multiply, self.left, self.right, self.times))

    def rate(self) -> float:
        """GFLOP a second."""
        return self.gflop * self.times / self.seconds()


def make_multiplications(args) -> dict[str, Multiplication]:
    """Of the sizes in use: a batch, the batches of all steps at once, a batch for each critic."""
    width = max(args.hidden_dims)
    rows = args.batch_size
    all_rows = num_steps_to_action(args) * rows
    critics = args.num_critics
    square = (width, width)
    return {
        f"{rows} x {width}": Multiplication((rows, width), square),
        f"{all_rows} x {width}": Multiplication((all_rows, width), square),
        f"{critics} x {rows} x {width}": Multiplication((critics, rows, width), (critics, *square)),
    }


# ----------------------------------------------------------------------------------------- updates


def random_dataset(script, dims: tuple, transitions: int):
    """Numbers in place of a dataset, in episodes of 1000."""
    rng = np.random.default_rng(0)
    observation_dim, action_dim = dims
    observations = rng.normal(size=(2, transitions, observation_dim)).astype(np.float32)
    actions = rng.uniform(-1, 1, (transitions, action_dim)).astype(np.float32)
    ones = np.ones(transitions, np.float32)
    terminals = np.zeros(transitions, np.float32)
    terminals[999::1000] = 1
    return script.Dataset(observations[0], actions, -ones, ones, terminals, observations[1])


class Updates:
    """The script's own updates, compiled as the script compiles them."""

    def __init__(self, script, args, networks, dims: tuple, dataset):
        self.num_seeds = args.num_seeds
        self.dataset = dataset
        seeds = np.arange(args.seed, args.seed + args.num_seeds)
        init = partial(script.init_state, args, networks, *dims)
        self.states = jax.jit(jax.vmap(init))(jax.vmap(jax.random.key)(seeds))
        train = script.jit_over_seeds(partial(script.train_steps, args, networks), args.num_seeds)
        lowered = train.lower(self.states, dataset, 0)
        started = time.perf_counter()
        self.train = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    def run(self, num_steps: int):
        self.states, metrics = self.train(self.states, self.dataset, num_steps)
        return metrics

    def steps_that_take(self, seconds: float) -> int:
        """How many updates take about so long; warms up."""
        num_steps = 1
        taken = seconds_of(partial(self.run, num_steps))
        while taken < seconds / 2:
            # At most ten times as many, for the first ones are slow.
            more = int(num_steps * seconds / max(taken, seconds / 10))
            num_steps = max(num_steps + 1, more)
            taken = seconds_of(partial(self.run, num_steps))
        return num_steps

    def rate(self, num_steps: int) -> float:
        """Updates a second, of all seeds together."""
        return self.num_seeds * num_steps / seconds_of(partial(self.run, num_steps))

    def acting_params(self) -> dict:
        """What sample_actions takes, of the first seed."""
        states = jax.tree.map(lambda x: x[0], self.states)
        return {**states.params, "target": states.target_params}


def measure_updates(options, args, updates: Updates, warnings: list[str]) -> dict:
    num_steps = updates.steps_that_take(options.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mib = peak / 2**10 if sys.platform == "linux" else peak / 2**20
    machine = make_multiplications(args)
    machine_rates = {size: [] for size in machine}
    rates = []
    # In turns, so that both see the same machine.
    for _ in range(options.repeats):
        rates.append(updates.rate(num_steps))
        for size, multiplication in machine.items():
            machine_rates[size].append(multiplication.rate())
    if max(rates) > 1.15 * min(rates):
        span = f"{min(rates):.2f} to {max(rates):.2f}"
        warnings.append(f"updates a second from {span}: something else was running")
    medians = {}
    for size, values in machine_rates.items():
        medians[size] = round(float(np.median(values)), 1)
    best = max(medians.values())
    updates_per_second = float(np.median(rates))
    gflop = gflop_per_update(options.script.stem, args, updates.acting_params())
    mfu = None
    if gflop is not None:
        mfu = round(updates_per_second * gflop / best, 3)
    return {
        "updates_per_second": round(updates_per_second, 2),
        "gflop_per_update": gflop,
        "matmul_gflop_per_second": best,
        "matmul_gflop_per_second_by_size": medians,
        "mfu": mfu,
        "compile_seconds": round(updates.compile_seconds, 1),
        "dataset_mib": round(sum(array.nbytes for array in updates.dataset) / 2**20, 1),
        "peak_memory_mib": round(peak_mib, 1),
    }


# -------------------------------------------------------------------------------------- evaluation


class BareEpisode(gymnasium.Wrapper):
    """The environment alone: a step is a whole episode of the given actions."""

    def __init__(self, make_env):
        super().__init__(make_env())
        length = self.env.spec.max_episode_steps
        action_dim = self.env.action_space.shape[0]
        self.action_space = gymnasium.spaces.Box(-1, 1, (length, action_dim))
        self.observation_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        return np.zeros(1), {}

    def step(self, actions):
        for action in actions:
            _, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                break
        return np.zeros(1), 0.0, True, False, {}


def measure_evaluation(options, script, args, networks, updates: Updates) -> dict:
    """Environment steps a second of `evaluate`, and of the bare environment, resets included."""
    args = dataclasses.replace(args, eval_episodes=4 * args.eval_envs)
    act = jax.jit(partial(script.sample_actions, args, networks))
    params = updates.acting_params()
    envs = script.start_eval_envs(args)
    bare = gymnasium.vector.AsyncVectorEnv(
        [partial(BareEpisode, partial(script.make_env, args))] * args.eval_envs,
        context="spawn",
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
    )
    # What a new policy does.
    actions = np.random.default_rng(0).normal(size=bare.action_space.shape)
    actions = np.clip(actions, -1, 1)
    speeds = []
    bare_speeds = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        scores = script.evaluate(args, act, params, envs, jax.random.key(0))
        steps = scores["length"] * scores["episodes"]
        speeds.append(steps / (time.perf_counter() - started))
        started = time.perf_counter()
        bare.reset(seed=list(range(args.eval_envs)))
        bare.step(actions)
        steps = actions.shape[0] * actions.shape[1]
        bare_speeds.append(steps / (time.perf_counter() - started))
    envs.close()
    bare.close()
    # The first repeat compiles.
    speed = float(np.median(speeds[1:]))
    bare_speed = float(np.median(bare_speeds[1:]))
    return {
        "eval_envs": args.eval_envs,
        "eval_steps_per_second": round(speed, 1),
        "bare_steps_per_second": round(bare_speed, 1),
        "eval_fraction": round(speed / bare_speed, 3),
    }


# ---------------------------------------------------------------------------------------- online


def environment_speed(env, seconds: float) -> float:
    """Steps a second of the environment alone, resets included."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (1000, *env.action_space.shape))
    count = 0
    ended = True
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        if ended:
            env.reset(seed=count)
        _, _, terminated, truncated, _ = env.step(actions[count % 1000])
        ended = terminated or truncated
        count += 1
    return count / (time.perf_counter() - started)


def write_random_dataset(path: Path, env, data) -> None:
    """A file in OGBench's form."""
    rng = np.random.default_rng(0)
    simulator = env.unwrapped
    fields = {"observations": data.observations, "actions": data.actions}
    fields["terminals"] = data.terminals > 0
    num_rows = len(data.actions)
    sizes = {"qpos": simulator.model.nq, "qvel": simulator.model.nv}
    for name, size in sizes.items():
        fields[name] = rng.normal(size=(num_rows, size)).astype(np.float32)
    buttons = getattr(simulator, "_cur_button_states", [])
    if len(buttons):
        fields["button_states"] = np.zeros((num_rows, len(buttons)), np.int64)
    np.savez(path, **fields)


def online_speed(options, script, args, env, data, bound: float) -> float:
    """Environment steps a second of the script's own main, online for about so many seconds."""
    steps = 5 * max(10, int(bound * options.online_seconds / 5))
    with tempfile.TemporaryDirectory() as folder:
        _, _, name = script.parse_env_id(args.env_id)
        write_random_dataset(Path(folder) / f"{name}.npz", env, data)
        args = dataclasses.replace(
            args,
            offline_steps=0,
            start_training=0,
            online_steps=steps,
            log_every=steps // 5,
            checkpoint_minutes=float(NEVER),
            eval_every=NEVER,
            eval_episodes=1,
            eval_envs=1,
            offline_checkpoint=None,
            dataset_dir=args.dataset_dir or folder,
            run_dir=f"{folder}/runs",
        )
        script.main(args)
        (path,) = Path(folder).glob("runs/*/metrics.csv")
        rows = np.genfromtxt(path, delimiter=",", names=True)
    # The first row holds the compilation.
    return float(np.median(rows["updates_per_second"][1:])) / args.utd_ratio


def measure_online(options, script, args, env, data, updates_per_second: float) -> dict:
    alone = environment_speed(env, 2 * options.seconds)
    bound = min(alone, updates_per_second / args.utd_ratio)
    speed = online_speed(options, script, args, env, data, bound)
    return {
        "environment_steps_per_second_alone": round(alone, 1),
        "utd_ratio": args.utd_ratio,
        "online_steps_per_second": round(speed, 2),
        "online_fraction": round(speed / bound, 3),
    }


# -------------------------------------------------------------------------------------------- main


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """This program's flags, and the script's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("script", type=Path, help="for example qam_offline.py; its own flags may follow")
    flag("--json", action="store_true", help="one JSON object on standard output")
    flag("--repeats", type=int, default=7, help="at least 5 for a figure to rely on")
    flag("--seconds", type=float, default=1.5, help="of updates a repeat")
    flag("--transitions", type=int, default=100_000, help="of random data")
    flag("--skip-evaluation", action="store_true")
    flag("--online-seconds", type=float, default=30, help="of the online phase, where there is one")
    options, flags = parser.parse_known_args()
    if not options.script.is_file():
        fail(f"there is no script {options.script}")
    if options.repeats < 1 or options.transitions < 10_000:
        fail("--repeats must be at least 1, --transitions at least 10000")
    if options.seconds <= 0 or options.online_seconds <= 0:
        fail("--seconds and --online-seconds must be above 0")
    return options, flags


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe(options, args) -> dict:
    return {
        "script": options.script.name,
        "env_id": args.env_id,
        "device": jax.devices()[0].device_kind,
        "processors": available_cores(),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "num_seeds": args.num_seeds,
        "repeats": options.repeats,
    }


def measure(options, script, args) -> dict:
    """All figures, by name."""
    warnings = []
    load = os.getloadavg()[0]
    if load > 0.3:
        words = f"the machine was busy at the start (load {load:.1f})"
        warnings.append(f"{words}; these figures are too low")
    env = script.make_env(args)
    dims = (env.observation_space.shape[0], env.action_space.shape[0])
    networks = script.make_networks(args, *dims)
    data = random_dataset(script, dims, options.transitions)
    if args.dataset_dir is not None:
        _, paths = script.find_dataset(args)
        data = script.load_dataset(args, paths[0], env)
    updates = Updates(script, args, networks, dims, jax.device_put(data))
    figures = describe(options, args)
    figures.update(measure_updates(options, args, updates, warnings))
    if not options.skip_evaluation:
        figures.update(measure_evaluation(options, script, args, networks, updates))
    if hasattr(args, "online_steps"):
        rate = figures["updates_per_second"]
        figures.update(measure_online(options, script, args, env, data, rate))
    figures["warnings"] = warnings
    return figures


def main() -> None:
    options, flags = parse_flags()
    # What environments and scripts print must not get between the figures.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(options.script.resolve().parent))
    script = importlib.import_module(options.script.stem)
    args = tyro.cli(script.Args, args=flags, prog=options.script.name)
    figures = measure(options, script, args)
    if options.json:
        print(json.dumps(figures), file=output)
    else:
        for name, figure in figures.items():
            print(f"{name:34} {figure}", file=output)
    for warning in figures["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
