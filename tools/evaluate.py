"""Score the policies that runs have learned: python tools/evaluate.py RUN...

Each run's args.json names its script, which is loaded: so it serves every algorithm, a file of your
own, too. A line per run and seed goes to standard output. Episodes and noise are those of the run's
own evaluations, and the score does not depend on the number of processes.

--behavior scores the flow that imitates the data instead, and keeps the result as behavior.csv in
the run's folder, where tools/report.py finds it. --video records the first episodes as mp4 into
the run's folder, 400 pixels wide for OGBench; their names say who acts and whether it succeeds. It
needs `pip install "imageio[ffmpeg]"`.
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
from functools import partial
from pathlib import Path
from typing import Annotated

import flax
import gymnasium
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


def fail(message):
    """Print one sentence and exit with status 2: the user can put it right."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_record(run):
    try:
        record = json.loads((run / "args.json").read_text())
        Path(record["script"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{run} is no run folder: its args.json is missing or damaged ({error!r})")
    return record


def load_script(record):
    """The script as a module: from where it ran or, if it is gone, from this project."""
    path = Path(record["script"])
    places = [path, ROOT / path.name, *ROOT.glob(f"*/{path.name}")]
    found = [place for place in places if place.is_file()]
    if not found:
        fail(f"{path} is gone, and no script of this project has that name")
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != record.get("script_sha256"):
        say(f"{found[0]} was edited since the run")
    # By its name, so that the environment processes can import it, too.
    sys.path.insert(0, str(found[0].parent))
    sys.modules.pop(path.stem, None)
    return importlib.import_module(path.stem)


def script_args(script, record, args):
    """The run's Args, with this evaluation's number of episodes and processes."""
    names = [field.name for field in dataclasses.fields(script.Args)]
    try:
        values = {name: record[name] for name in names if name in record}
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
    try:
        return flax.serialization.msgpack_restore(path.read_bytes())["states"]
    except Exception as error:  # of msgpack, whatever is damaged
        fail(f"{path} is not there, or damaged ({error!r})")


def steps_done(record, states):
    """Updates of the offline phase, and environment steps of the online one."""
    updates = int(states["step"][0])
    rewards = states.get("online", {}).get("rewards", ())
    return min(updates, record["offline_steps"]) + len(rewards)


def make_behavior_act(script, args, networks):
    """As the script's sample_actions, for the behavior flow with one noise per chunk."""

    def act(params, observations, key):
        def behavior(x, t):
            return networks.behavior.apply({"params": params["behavior"]}, observations, x, t)

        shape = (len(observations), networks.chunk_dim)
        if hasattr(args, "diffusion_steps"):
            noise = jax.random.normal(key, (args.diffusion_steps, *shape))
            actions = script.sample_ancestral(behavior, behavior, noise[0], noise[1:])[-1]
        else:
            noise = jax.random.normal(key, shape)
            actions = script.sample_ode(behavior, noise, args.flow_steps)
        return jnp.clip(actions, -1, 1)

    return jax.jit(act)


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def render(env):
    """A frame, or one sentence if there is none."""
    try:
        if getattr(env.unwrapped, "render_mode", None) is None:
            env.unwrapped.render_mode = "rgb_array"
        frame = env.unwrapped.render()
    except Exception as error:  # of a package that is missing, a display, a GPU
        fail(f"{env.spec.id} can't be rendered, so leave out --video: {error!r}")
    if frame is None:
        fail(f"{env.spec.id} can't be rendered, so leave out --video")
    return frame


def say_what_rendering_costs(env, args, num_seeds):
    """Before minutes go by: the time of a frame on this machine."""
    env.reset(seed=0)
    render(env)
    started = time.perf_counter()
    render(env)
    seconds = time.perf_counter() - started
    steps = min(args.video_steps, env.spec.max_episode_steps or args.video_steps)
    total = seconds * steps * args.video * num_seeds
    say(
        f"a frame takes {seconds:.2f} s here: up to {total / 60:.1f} minutes for {args.video}"
        f" episode(s) of {steps} steps; --video-steps records fewer"
    )


def record_episode(env, act, params, key, episode, num_rows, num_steps):
    """Frames of an episode, played as in the evaluation: row `episode` of as many rows."""
    observation, _ = env.reset(seed=episode)
    observations = np.zeros((num_rows, *env.observation_space.shape))
    action_shape = (-1, *env.env.action_space.shape)
    frames = []
    chunk = 0
    while True:
        observations[episode] = observation
        actions = np.asarray(act(params, observations, jax.random.fold_in(key, chunk)))[episode]
        for action in actions.reshape(action_shape):
            observation, _, terminated, truncated, _ = env.step(action)
            frames.append(render(env))
            if terminated or truncated or len(frames) >= num_steps:
                return frames
        chunk += 1


def say(message):
    print(message, file=sys.stderr, flush=True)


def score(args, run):
    """Score one run: a line and, for the behavior flow, a row per seed; then the videos."""
    record = read_record(run)
    script = load_script(record)
    run_args = script_args(script, record, args)
    states = read_checkpoint(args.checkpoint or run / "checkpoint.msgpack")
    step = steps_done(record, states)
    domain, environment_id, _ = script.parse_env_id(run_args.env_id)
    if args.video and domain:
        # OGBench's own are 200 pixels; other environments may not take a size.
        gymnasium.spec(environment_id).kwargs.update(width=400, height=400)
    env = script.ChunkedEpisode(run_args)
    dims = env.observation_space.shape + env.env.action_space.shape  # O, A
    networks = script.make_networks(run_args, *dims)
    who = "policy"
    act = jax.jit(partial(script.sample_actions, run_args, networks))
    if args.behavior:
        who = "behavior"
        if "behavior" not in states["params"]:
            fail(f"{run} has no behavior flow: its networks are {', '.join(states['params'])}")
        act = make_behavior_act(script, run_args, networks)
    if args.video:
        say_what_rendering_costs(env, args, len(states["step"]))

    say(f"{run}: starting {run_args.eval_envs} processes, {run_args.eval_episodes} episodes a seed")
    envs = script.start_eval_envs(run_args)
    rows = []
    for i, seed in enumerate(range(run_args.seed, run_args.seed + len(states["step"]))):
        params = jax.tree.map(lambda x: x[i], states["params"])  # noqa: B023
        params["target"] = jax.tree.map(lambda x: x[i], states["target_params"])  # noqa: B023
        key = jax.random.wrap_key_data(states["key"][i], impl="threefry2x32")
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
            end = "success" if env.scores[0] > 0 else "no_success"
            name = f"{who}_step_{step}_seed_{seed}_episode_{episode}_{end}.mp4"
            write_video(run / "videos" / name, frames)
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
    runs = [run.expanduser() for run in args.runs]
    begun = [run for run in runs if (run / "args.json").exists()]
    waiting = [run for run in begun if not (run / "checkpoint.msgpack").exists()]
    if len(waiting) < len(runs):  # of a single run this is an error
        for run in waiting:
            say(f"{run} is left out: it has no checkpoint yet")
            runs.remove(run)
    for run in runs:
        try:
            score(args, run)
        except (EOFError, ConnectionError):
            sys.exit(
                "error: an environment process has died, perhaps for want of memory: see --envs"
            )
        except OSError as error:
            fail(f"{run}: {error}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
