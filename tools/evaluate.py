"""Score the policies that runs have learned: python tools/evaluate.py RUN...

Each run's args.json names its script, which is loaded: so it serves every algorithm, a file of your
own, too. A line per run and seed goes to standard output. Episodes and noise are those of the run's
own evaluations, and the score does not depend on the number of processes.

Some flags only act, and a run that has learned can act in many ways. --best-of-n 1 4 16
--flow-steps 5 10 scores all six, a line each; -o keeps them as a CSV file, which tools/report.py
draws. A flag by which the run's script does not act is refused.

--behavior scores the flow that imitates the data instead, and keeps the result as behavior.csv in
the run's folder, where tools/report.py finds it. --video records the first episodes as mp4 into
the run's folder, 400 pixels wide for OGBench; their names say who acts and whether it succeeds, or
was cut by --video-steps. It needs `uv pip install "imageio[ffmpeg]"`.
"""

import csv
import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
# What sample_actions may read, and what was learned stays the same: a' of the critic is one draw
# whatever --best-of-n is, a velocity can be followed in more steps or fewer, and guidance is added
# while acting alone. Other flags that acting depends on (--noise-scale of DSRL, --edit-scale,
# --guidance-coef of CGQL, --diffusion-steps) are part of what a run has learned.
ACTING = ("best_of_n", "flow_steps", "guidance_weight")
COLUMNS = ("run", "script", "env_id", "step", "seed", "policy", *ACTING)
COLUMNS += ("success_rate", "return", "length", "episodes")


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders"""
    episodes: int | None = None
    """episodes per seed (None: as many as in the run's own evaluations)"""
    envs: int | None = None
    """environment processes (None: as in the run)"""
    best_of_n: tuple[int, ...] | None = None
    """chunks drawn when acting: each of these numbers (None: as in the run)"""
    flow_steps: tuple[int, ...] | None = None
    """steps from noise to action, likewise"""
    guidance_weight: tuple[float, ...] | None = None
    """of Q's gradient in acting (QGF), likewise"""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """a CSV file to write: a row a line"""
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
    # By its name, so that the environment processes can import it, too.
    sys.path.insert(0, str(found[0].parent))
    sys.modules.pop(path.stem, None)
    return importlib.import_module(path.stem)


def script_args(script, record, args, way):
    """The run's Args, with this evaluation's number of episodes and processes, and way of acting.

    `way`: {flag: value} of those flags of ACTING that are to differ from the run's.
    """
    names = [field.name for field in dataclasses.fields(script.Args)]
    try:
        values = {name: record[name] for name in names if name in record}
        values["hidden_dims"] = tuple(values["hidden_dims"])
        if args.episodes is not None:
            values["eval_episodes"] = args.episodes
        if args.envs is not None:
            values["eval_envs"] = args.envs
        values.update(way)
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
        fail(f"{path} is not there, or damaged ({error!r:.300})")


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


def write_rows(path, rows, columns):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
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


class Run(NamedTuple):
    """What it takes to act as a run does."""

    path: Path
    record: dict  # its args.json
    script: Any  # its module
    args: Any  # its Args
    states: dict  # of its checkpoint
    env: Any
    networks: Any


def open_run(args, path):
    record = read_record(path)
    script = load_script(record)
    run_args = script_args(script, record, args, {})
    states = read_checkpoint(args.checkpoint or path / "checkpoint.msgpack")
    domain, environment_id, _ = script.parse_env_id(run_args.env_id)
    if args.video and domain:
        # OGBench's own are 200 pixels; other environments may not take a size.
        gymnasium.spec(environment_id).kwargs.update(width=400, height=400)
    env = script.ChunkedEpisode(script.make_env(run_args))
    dims = env.observation_space.shape + env.env.action_space.shape  # O, A
    networks = script.make_networks(run_args, *dims)
    return Run(path, record, script, run_args, states, env, networks)


def params_of_seed(states, i):
    """What the script's sample_actions takes: a state's params, and its target_params."""
    params = jax.tree.map(lambda x: x[i], states["params"])
    params["target"] = jax.tree.map(lambda x: x[i], states["target_params"])
    return params


def flag_of(name):
    return "--" + name.replace("_", "-")


def acts_by(run, name):
    """Whether actions change with a flag, with the run's other settings as they are.

    Parameters are drawn at random: what has been learned may end at -1 or 1 whatever the flag is.
    """
    if not hasattr(run.args, name):
        return False
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(0.0, 0.1, x.shape).astype(np.float32)

    params = jax.tree.map(draw, params_of_seed(run.states, 0))
    observations = draw(np.zeros((32, *run.env.observation_space.shape)))
    own = getattr(run.args, name)
    actions = []
    # Far apart: the 33rd of best_of_n draws seldom is the best.
    for value in (own, 2 * own + 1):
        changed = dataclasses.replace(run.args, **{name: value})
        key = jax.random.key(0)
        act = jax.jit(partial(run.script.sample_actions, changed, run.networks))
        actions.append(act(params, observations, key))
    # One draw and three are multiplied in another order: rounding, 1e-6, is no action.
    return not np.allclose(*actions, rtol=0, atol=1e-4)


def given_flags(args):
    """{flag: its values} of the flags of ACTING that are on the command line."""
    given = {}
    for name in ACTING:
        values = getattr(args, name)
        if values == ():
            fail(f"{flag_of(name)} needs one value or more")
        if values is not None:
            given[name] = tuple(dict.fromkeys(values))
    return given


def ways_of_acting(args, path):
    """What is to be scored of a run: dicts {flag: value} of all flags that its script acts by."""
    given = given_flags(args)
    if not given and args.output is None:
        return [{}]
    run = open_run(args, path)
    values = {}
    for name in ACTING:
        if acts_by(run, name):
            values[name] = given.get(name, (getattr(run.args, name),))
        elif name in given:
            script = Path(run.record["script"]).name
            fail(f"{path}: {script} does not act by {flag_of(name)} here: leave out one of the two")
    ways = [dict(zip(values, way, strict=True)) for way in itertools.product(*values.values())]
    for way in ways:
        script_args(run.script, run.record, args, way)  # which says what the script does not take
    return ways


def score(args, path, ways, table):
    """Score one run: each way of acting, each seed; behavior.csv for the behavior flow."""
    run = open_run(args, path)
    file = Path(run.script.__file__)
    if hashlib.sha256(file.read_bytes()).hexdigest() != run.record.get("script_sha256"):
        say(f"{file} was edited since the run")
    if args.behavior and "behavior" not in run.states["params"]:
        fail(f"{path} has no behavior flow: its networks are {', '.join(run.states['params'])}")
    if args.video:
        say_what_rendering_costs(run.env, args, len(run.states["step"]) * len(ways))
    say(
        f"{path}: starting {run.args.eval_envs} processes, {run.args.eval_episodes} episodes a seed"
    )
    envs = run.script.start_eval_envs(run.args)
    rows = []
    for way in ways:
        rows += score_way(args, run, envs, way, table)
    envs.close(terminate=True)
    if args.behavior:
        write_rows(path / "behavior.csv", rows, rows[0])


def score_way(args, run, envs, way, table):
    """A line and a row for each seed, and its videos. `table`: the rows of the file -o."""
    run_args = script_args(run.script, run.record, args, way)
    who = "policy"
    act = jax.jit(partial(run.script.sample_actions, run_args, run.networks))
    if args.behavior:
        who = "behavior"
        act = make_behavior_act(run.script, run_args, run.networks)
    step = steps_done(run.record, run.states)
    asked = [f"{name} {way[name]}" for name in given_flags(args)]
    rows = []
    for i, seed in enumerate(range(run_args.seed, run_args.seed + len(run.states["step"]))):
        params = params_of_seed(run.states, i)
        key = jax.random.wrap_key_data(run.states["key"][i], impl="threefry2x32")
        key = jax.random.fold_in(key, 2**31 - 1)  # as in the script's evaluations
        scores = run.script.evaluate(run_args, act, params, envs, key)
        seconds = scores.pop("wall_seconds")
        words = [f"{name} {value}" for name, value in scores.items()]
        print(" ".join([f"step {step} seed {seed} {who}", *asked, *words]), flush=True)
        rows.append({"step": step, "seed": seed, "phase": who, **scores, "wall_seconds": seconds})
        if args.output is not None:
            names = {"run": run.path.resolve().name, "script": Path(run.record["script"]).stem}
            row = {"step": step, "seed": seed, "policy": who, **way, **scores}
            table.append({**names, "env_id": run_args.env_id, **row})
            write_rows(args.output, table, COLUMNS)
        name = "_".join([who, *asked, f"step_{step}_seed_{seed}"]).replace(" ", "_")
        record_videos(args, run, act, params, key, name)
    return rows


def record_videos(args, run, act, params, key, name):
    """The first episodes of a seed; `name`: what their files' names begin with."""
    num_rows = run.args.eval_episodes
    for episode in range(min(args.video, num_rows)):
        frames = record_episode(run.env, act, params, key, episode, num_rows, args.video_steps)
        end = "success" if run.env.scores[0] > 0 else "no_success"
        if not run.env.ended:  # --video-steps was less
            end = "cut"
        write_video(run.path / "videos" / f"{name}_episode_{episode}_{end}.mp4", frames)


def write_video(path, frames):
    import imageio

    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, frames, fps=20, macro_block_size=8)
    say(path)


def parse_args():
    """The command line; a flag of the scripts that does more than act is refused by name."""
    args, unknown = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    for path in map(Path, [*args.runs, *unknown]):
        for flag in flags:
            name = flag.removeprefix("--").replace("-", "_")
            if (path / "args.json").is_file() and name in read_record(path):
                acting = ", ".join(map(flag_of, ACTING))
                fail(f"{flag} does more than act, so the run keeps its own: there are {acting}")
    # What else is unknown is for tyro to tell.
    return tyro.cli(Args, description=__doc__) if unknown else args


def check_flags(args):
    """Refuse what does not go together."""
    if args.checkpoint is not None and len(args.runs) != 1:
        fail("--checkpoint goes with one run")
    if not args.runs:
        fail("name at least one run folder")
    beside = [flag_of(name) for name in given_flags(args)]
    if args.output is not None:
        beside.append("--output")
    if args.behavior and beside:
        words = "--behavior scores the flow as the run trained it, into behavior.csv of its folder"
        fail(f"{words}: leave out {', '.join(beside)}")


def main(args):
    signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))
    if args.video:
        os.environ.setdefault("MUJOCO_GL", "glfw" if os.environ.get("DISPLAY") else "egl")
        if importlib.util.find_spec("imageio_ffmpeg") is None:
            fail('--video needs an encoder: uv pip install "imageio[ffmpeg]"')
    check_flags(args)
    runs = [run.expanduser() for run in args.runs]
    begun = [run for run in runs if (run / "args.json").exists()]
    waiting = [run for run in begun if not (run / "checkpoint.msgpack").exists()]
    if len(waiting) < len(runs):  # of a single run this is an error
        for run in waiting:
            say(f"{run} is left out: it has no checkpoint yet")
            runs.remove(run)
    # Of all runs before the first is scored: what is refused later would be told minutes later.
    ways = {run: ways_of_acting(args, run) for run in runs}
    table = []
    if args.output is not None:
        args.output = args.output.expanduser()
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_rows(args.output, table, COLUMNS)
        except OSError as error:
            fail(f"--output {args.output} can't be written: {error}")
    for run in runs:
        try:
            score(args, run, ways[run], table)
        except (EOFError, ConnectionError):
            sys.exit(
                "error: an environment process has died, perhaps for want of memory: see --envs"
            )
        except OSError as error:
            fail(f"{run}: {error}")


if __name__ == "__main__":
    main(parse_args())
