"""Score the policies that runs have learned: python tools/evaluate.py RUN...

Each run's args.json names its script, which is loaded: so it serves every algorithm, a file of your
own, too. A line per run and seed goes to standard output. Episodes and noise are those of the run's
own evaluations, and the score does not depend on the number of processes.

--behavior scores the flow that imitates the data instead, and keeps the result as behavior.csv in
the run's folder, where tools/report.py finds it. --video records the first episodes as mp4 into
the run's folder; that needs `pip install "imageio[ffmpeg]"`.
"""

import csv
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path
from typing import Annotated

import flax
import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders"""
    episodes: int | None = None
    """episodes per seed (None: as many as in the run's own evaluations)"""
    envs: int | None = None
    """environment processes (None: as in the run)"""
    behavior: bool = False
    """score the behavior flow"""
    video: int = 0
    """episodes to record, the first ones of each seed"""
    video_steps: int = 10_000
    """steps to record of an episode, at most"""
    checkpoint: Path | None = None
    """a checkpoint file in place of the run's own, for one run"""


def fail(message, status=2):
    """Print one sentence and exit: status 2 for what the user can put right, else 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_record(run):
    try:
        record = json.loads((run / "args.json").read_text())
        Path(record["script"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{run} is no run folder: its args.json is missing or damaged ({error!r})")
    return record


def load_script(path):
    """The script as a module: from where it ran or, if it is gone, from this project."""
    path = Path(path)
    places = [path, ROOT / path.name, *ROOT.glob(f"*/{path.name}")]
    found = [place for place in places if place.is_file()]
    if not found:
        fail(f"{path} is gone, and no script of this project has that name")
    # By its name, so that the environment processes can import it, too.
    sys.path.insert(0, str(found[0].parent))
    sys.modules.pop(path.stem, None)
    return importlib.import_module(path.stem)


def script_args(script, record, args):
    """The run's Args, with this evaluation's number of episodes and processes."""
    names = [field.name for field in dataclasses.fields(script.Args)]
    try:
        values = {name: record[name] for name in names}
        values["hidden_dims"] = tuple(values["hidden_dims"])
        if args.episodes is not None:
            values["eval_episodes"] = args.episodes
        if args.envs is not None:
            values["eval_envs"] = args.envs
        return script.Args(**values)
    except (LookupError, TypeError) as error:
        fail(f"its args.json does not fit {script.__file__} ({error!r})")
    except ValueError as error:
        fail(str(error).replace("--eval-", "--"))


def read_checkpoint(path):
    """The states in a checkpoint file: nested dicts of numpy arrays, leading axis the seeds."""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        fail(f"{path} is {'damaged' if content else 'not there'}")
    return flax.serialization.msgpack_restore(content[32:])["states"]


def steps_done(record, states):
    """Updates of the offline phase, and environment steps of the online one."""
    updates = int(states["step"][0])
    rewards = states.get("online", {}).get("rewards", ())
    return min(updates, record["offline_steps"]) + len(rewards)


def make_behavior_act(script, args, networks, chunk_size):
    """As the script's make_act, for the behavior flow with one noise per chunk."""

    def act_alone(params, observation, episode, chunk, key):
        key = jax.random.fold_in(jax.random.fold_in(key, episode), chunk)

        def behavior(x, t):
            return networks.behavior.apply({"params": params["behavior"]}, observation[None], x, t)

        if hasattr(args, "diffusion_steps"):
            noise = jax.random.normal(key, (args.diffusion_steps, 1, chunk_size))
            actions = script.sample_ancestral(behavior, behavior, noise[0], noise[1:])[-1]
        else:
            noise = jax.random.normal(key, (1, chunk_size))
            actions = script.sample_ode(behavior, noise, args.flow_steps)
        return jnp.clip(actions[0], -1, 1)

    act_in_all = jax.vmap(act_alone, in_axes=(None, 0, 0, 0, None))

    def act(params, observations, chunks, key):
        return act_in_all(params, observations, jnp.arange(len(chunks)), chunks, key)

    return jax.jit(act)


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def say_what_rendering_costs(env, args, num_seeds):
    """Before minutes go by: the time of a frame on this machine."""
    env.reset(seed=0)
    env.unwrapped.render()
    started = time.perf_counter()
    env.unwrapped.render()
    seconds = time.perf_counter() - started
    steps = min(args.video_steps, env.spec.max_episode_steps)
    total = seconds * steps * args.video * num_seeds
    say(
        f"a frame takes {seconds:.2f} s here: up to {total / 60:.1f} minutes for {args.video}"
        f" episode(s) of {steps} steps; --video-steps records fewer"
    )


def record_episode(env, act, params, key, episode, num_rows, num_steps):
    """Frames of an episode, played as in the evaluation: row `episode` of as many rows."""
    observation, _ = env.reset(seed=episode)
    observations = np.zeros((num_rows, *env.observation_space.shape))
    chunks = np.zeros(num_rows, int)
    action_shape = (-1, *env.env.action_space.shape)
    frames = []
    while True:
        observations[episode] = observation
        actions = np.asarray(act(params, observations, chunks, key))[episode]
        for action in actions.reshape(action_shape):
            observation, _, terminated, truncated, _ = env.step(action)
            frames.append(env.unwrapped.render())
            if terminated or truncated or len(frames) >= num_steps:
                return frames
        chunks[episode] += 1


def say(message):
    print(message, file=sys.stderr, flush=True)


def score(args, run):
    """Score one run: a line and, for the behavior flow, a row per seed; then the videos."""
    record = read_record(run)
    script = load_script(record["script"])
    run_args = script_args(script, record, args)
    states = read_checkpoint(args.checkpoint or run / "checkpoint.msgpack")
    step = steps_done(record, states)
    env = script.ChunkedEpisode(run_args)
    networks = script.make_networks(
        run_args, env.observation_space.shape[0], env.env.action_space.shape[0]
    )
    who = "policy"
    act = script.make_act(run_args, networks)
    if args.behavior:
        who = "behavior"
        if "behavior" not in states["params"]:
            fail(f"{run} has no behavior flow: its networks are {', '.join(states['params'])}")
        act = make_behavior_act(script, run_args, networks, env.action_space.shape[0])
    if args.video:
        say_what_rendering_costs(env, args, len(states["step"]))

    say(f"{run}: starting {run_args.eval_envs} processes, {run_args.eval_episodes} episodes a seed")
    # The thread's signal mask is the processes' too: Ctrl-C is for this process alone.
    envs = ThreadPoolExecutor(1).submit(script.start_eval_envs, run_args).result()
    rows = []
    for i, seed in enumerate(range(run_args.seed, run_args.seed + len(states["step"]))):
        params = jax.tree.map(lambda x: x[i], states["params"])  # noqa: B023
        params["target"] = jax.tree.map(lambda x: x[i], states["target_params"])  # noqa: B023
        key = jax.random.wrap_key_data(states["key"][i])
        key = jax.random.fold_in(key, 2**31 - 1)  # as in the script's evaluations
        started = time.perf_counter()
        scores = script.evaluate(run_args, act, params, envs, key)
        seconds = round(time.perf_counter() - started, 1)
        words = " ".join(f"{name} {value}" for name, value in scores.items())
        print(f"step {step} seed {seed} {who} {words}", flush=True)
        row = {"step": step, "seed": seed, "phase": who, **scores, "wall_seconds": seconds}
        rows.append(row)
        for episode in range(min(args.video, run_args.eval_episodes)):
            num_rows = run_args.eval_episodes
            frames = record_episode(env, act, params, key, episode, num_rows, args.video_steps)
            path = run / "videos" / f"{who}_step_{step}_seed_{seed}_{episode}.mp4"
            write_video(path, frames)
    envs.close(terminate=True)
    if args.behavior:
        write_rows(run / "behavior.csv", rows)


def write_video(path, frames):
    import imageio

    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, frames, fps=20, macro_block_size=8)
    say(path)


def main(args):
    signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))
    if args.video:
        os.environ.setdefault("MUJOCO_GL", "glfw" if os.environ.get("DISPLAY") else "egl")
        if importlib.util.find_spec("imageio_ffmpeg") is None:
            fail('--video needs an encoder: pip install "imageio[ffmpeg]"')
    if args.checkpoint is not None and len(args.runs) != 1:
        fail("--checkpoint goes with one run")
    if not args.runs:
        fail("name at least one run folder")
    for run in args.runs:
        try:
            score(args, run.expanduser())
        except (EOFError, ConnectionError):
            sys.unraisablehook = lambda _: (
                None
            )  # gymnasium's clean-up complains of the dead process
            for process in active_children():  # or the others complain, too
                process.terminate()
            message = "an environment process has died, perhaps for want of memory: see --envs"
            fail(message, status=1)
        except OSError as error:
            fail(f"{run}: {error}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
