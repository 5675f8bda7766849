"""Collect an OGBench dataset with the package's own scripted policies.

OGBench's manipulation and pointmaze datasets were made by scripted policies that the package ships.
This program runs them again, so that the same data can be had without the download server:

    python tools/collect_dataset.py cube-double-play                   the official size
    python tools/collect_dataset.py cube-double-play --episodes 100    a small set in minutes
    python tools/collect_dataset.py cube-double-play --download        the official file, if it can
                                                                       be had, else 100 episodes

It writes NAME.npz and NAME-val.npz with the official fields and types into ~/.ogbench/collected,
and NAME.json: the recipe, the versions, and figures that show whether the data is sound. Every
episode has its own seed, so the number of workers does not change the data, and an interrupted
collection goes on where it stopped when the same command is given again. A set with fewer episodes
gives way to one with more. Of several processes that want the same set at once, one collects it.
A downloaded file goes into ~/.ogbench/data, where OGBench itself keeps it.

Recipes: OGBench (arXiv 2410.20092), appendix on datasets. Antmaze, humanoidmaze and antsoccer data
was made by trained experts that the package does not ship: for these only the official files serve.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TextIO

import gymnasium
import numpy as np
import ogbench
import tqdm
import tyro
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle
from ogbench.relabel_utils import relabel_dataset

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Where the training scripts look.
COLLECTED_DIR = Path("~/.ogbench/collected")
OFFICIAL_DIR = Path("~/.ogbench/data")
SECONDS_WITHOUT_AN_ANSWER = 20  # of the download server, then it is given up
# Episodes of the official training sets, 1001 steps each. The official set of cube-octuple has 100M
# steps; the size here is our choice.
MANIPULATION_EPISODES = {
    "cube-single": 1000,
    "cube-double": 1000,
    "cube-triple": 3000,
    "cube-quadruple": 5000,
    "cube-octuple": 5000,
    "scene": 1000,
    "puzzle-3x3": 1000,
    "puzzle-4x4": 1000,
    "puzzle-4x5": 3000,
    "puzzle-4x6": 5000,
}
POINTMAZES = ("pointmaze-medium", "pointmaze-large", "pointmaze-giant", "pointmaze-teleport")
# Range of an episode's probability that a new target is on top of another cube.
P_STACK = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
# Of x, y, z, yaw, gripper; an episode multiplies them by a number of its own.
NOISY_ACTION_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
POINTMAZE_NOISE = 0.5
STITCH_CELLS = 4  # from start to goal
SPLITS = ("train", "val")
SECONDS_BETWEEN_LINES = 20  # of progress, where there is no terminal for a bar


def available_cores() -> int:
    """Cores that this process may use; a scheduler may allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass
class Args:
    name: Annotated[str, tyro.conf.Positional]
    """cube-double-play, scene-noisy, pointmaze-medium-navigate, ... (-v0 may follow)"""
    episodes: int | None = None
    """training episodes, at least 1; validation has a tenth (None: the official number; with
    --download, 100)"""
    seed: int = 0
    """seed of the whole set, 0 or more"""
    workers: int = available_cores()
    """processes, at least 1; does not change the data"""
    out_dir: Path = COLLECTED_DIR
    """folder for the files"""
    overwrite: bool = False
    """replace a finished set of the same name and at least as many episodes"""
    download: bool = False
    """fetch OGBench's own file into ~/.ogbench/data, and collect only if that fails"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes one dataset."""

    domain: str  # OGBench's environment
    kind: str  # play, noisy, navigate or stitch
    episodes: int  # official number of training episodes
    steps: int  # of an episode

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.kind}-v0"

    @property
    def is_maze(self) -> bool:
        return self.domain in POINTMAZES

    @property
    def is_puzzle(self) -> bool:
        return self.domain.startswith("puzzle")


def fail(message: str, status: int = 2) -> None:
    """Print one sentence and exit: 2 for what the user can put right, 1 for what broke."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------ recipes


def find_recipe(name: str) -> Recipe:
    """The recipe of a dataset name, with or without -v0. Exits with 2 where there is none."""
    domain, _, kind = name.removesuffix("-v0").rpartition("-")
    if domain in MANIPULATION_EPISODES and kind in ("play", "noisy"):
        return Recipe(domain, kind, MANIPULATION_EPISODES[domain], 1001)
    if domain in POINTMAZES and kind == "stitch":
        return Recipe(domain, kind, 5000, 201)
    if domain == "pointmaze-giant" and kind == "navigate":
        return Recipe(domain, kind, 500, 2001)
    if domain in POINTMAZES and kind == "navigate":
        return Recipe(domain, kind, 1000, 1001)
    can = "cube-*, scene and puzzle-* (play, noisy), pointmaze-* (navigate, stitch)"
    fail(f"OGBench ships no policy that collects '{name}'; it does for {can}")


# An environment is expensive to make and a process needs one: it makes it once.
@functools.cache
def make_environment(recipe: Recipe) -> gymnasium.Env:
    """The environment in which the recipe's episodes are made."""
    options = {"terminate_at_goal": False, "max_episode_steps": recipe.steps}
    if not recipe.is_maze:
        options["mode"] = "data_collection"
    return gymnasium.make(f"{recipe.domain}-v0", **options)


def make_oracles(env: gymnasium.Env, recipe: Recipe) -> dict:
    """A scripted policy for each kind of target of a manipulation environment, by its name."""
    closed = recipe.is_puzzle
    if recipe.kind == "play":
        options = {"env": env, "noise": 0.1, "noise_smoothing": 0.5}
        return {
            "cube": CubePlanOracle(**options),
            "button": ButtonPlanOracle(gripper_always_closed=closed, **options),
            "drawer": DrawerPlanOracle(**options),
            "window": WindowPlanOracle(**options),
        }
    options = {"env": env, "min_norm": 0.4}
    cube_options = {}
    if recipe.domain == "scene":
        # As OGBench has it, though the oracle's own reset sets 200 again.
        cube_options["max_step"] = 100
    return {
        "cube": CubeMarkovOracle(**cube_options, **options),
        "button": ButtonMarkovOracle(gripper_always_closed=closed, **options),
        "drawer": DrawerMarkovOracle(**options),
        "window": WindowMarkovOracle(**options),
    }


# ----------------------------------------------------------------------------------------- episodes


def new_episode() -> dict:
    """By field of the dataset, the values of the steps so far."""
    fields = ("observations", "actions", "terminals", "qpos", "qvel", "button_states")
    return {field: [] for field in fields}


def add_step(episode: dict, observation, action, done: bool, info: dict) -> None:
    """Append a step: what the agent saw and did, and the simulator's state from before the step."""
    episode["observations"].append(observation)
    episode["actions"].append(action)
    episode["terminals"].append(done)
    episode["qpos"].append(info["prev_qpos"])
    episode["qvel"].append(info["prev_qvel"])
    if "prev_button_states" in info:
        episode["button_states"].append(info["prev_button_states"])


def collect_manipulation_episode(env: gymnasium.Env, recipe: Recipe, seed: int) -> dict:
    """An episode of a play or noisy set."""
    # For what is drawn here; the oracles draw from numpy's global generator.
    rng = np.random.default_rng(seed)
    noisy = recipe.kind == "noisy"
    p_stack = rng.uniform(*P_STACK.get(recipe.domain, (0.5, 0.5)))
    noise_scale = rng.uniform(0.0, 0.1) * NOISY_ACTION_SCALE
    p_random = 0.2 if recipe.is_puzzle else 0.1
    oracles = make_oracles(env, recipe)
    observation, info = env.reset(seed=seed)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    episode = new_episode()
    done = False
    while not done:
        if noisy and rng.random() < p_random:
            action = rng.uniform(-1.0, 1.0, size=5)
        else:
            action = np.array(oracle.select_action(observation, info))
            if noisy:
                action = action + rng.normal(0.0, noise_scale)
        action = np.clip(action, -1.0, 1.0)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        add_step(episode, observation, action, done, info)
        observation = next_observation
        if oracle.done:
            # What this returns is for the oracle; the agent's next observation is the step's.
            first_observation, info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(first_observation, info)
    return episode


def is_corridor(maze_map: np.ndarray, row: int, column: int) -> bool:
    """Is a free cell part of a straight corridor, with walls on two sides that face each other?"""
    free = maze_map == 0
    up_and_down = [free[row - 1, column], free[row + 1, column]]
    left_and_right = [free[row, column - 1], free[row, column + 1]]
    vertical = all(up_and_down) and not any(left_and_right)
    horizontal = all(left_and_right) and not any(up_and_down)
    return vertical or horizontal


def draw_cell(rng: np.random.Generator, cells: list) -> tuple[int, int]:
    return cells[rng.integers(len(cells))]


def stitch_goals(maze, free: list, start: tuple[int, int]) -> list:
    """The cells that a stitch episode from `start` may have as its goal."""
    xy = maze.ij_to_xy(start)
    _, distances = maze.get_oracle_subgoal(xy, xy)
    reachable = [cell for cell in free if 0 <= distances[cell] <= STITCH_CELLS]
    farthest = max(distances[cell] for cell in reachable)
    return [cell for cell in reachable if distances[cell] == farthest]


def collect_pointmaze_episode(env: gymnasium.Env, recipe: Recipe, seed: int) -> dict:
    """An episode of a navigate or stitch set."""
    rng = np.random.default_rng(seed)
    maze = env.unwrapped
    free = [tuple(cell) for cell in np.argwhere(maze.maze_map == 0).tolist()]
    vertices = [cell for cell in free if not is_corridor(maze.maze_map, *cell)]
    start = draw_cell(rng, free)
    goals = vertices if recipe.kind == "navigate" else stitch_goals(maze, free, start)
    task = {"init_ij": start, "goal_ij": draw_cell(rng, goals)}
    observation, _ = env.reset(seed=seed, options={"task_info": task})
    episode = new_episode()
    done = False
    while not done:
        xy = maze.get_xy()
        subgoal, _ = maze.get_oracle_subgoal(xy, maze.cur_goal_xy)
        direction = (subgoal - xy) / (np.linalg.norm(subgoal - xy) + 1e-6)
        noise = rng.normal(0.0, POINTMAZE_NOISE, size=2)
        action = np.clip(direction + noise, -1.0, 1.0)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"] and recipe.kind == "navigate":
            goal = draw_cell(rng, vertices)
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
        add_step(episode, observation, action, done, info)
        observation = next_observation
    return episode


def is_sound(episode: dict, recipe: Recipe) -> bool:
    """False where a scene's cube slipped out of reach, which is rare; OGBench drops these, too."""
    if recipe.domain != "scene":
        return True
    qpos = np.array(episode["qpos"])
    y = qpos[:, 15]
    z = qpos[:, 16]
    too_far = y >= 0.29
    too_near = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not np.any(too_far | too_near)


def collect_episode(recipe: Recipe, seed: int, split: int, index: int) -> dict:
    """Episode `index` of split 0 (train) or 1 (validation), a function of its arguments alone.

    Returns: by field, (steps, ...) arrays in the official types.
    """
    env = make_environment(recipe)
    collect = collect_pointmaze_episode if recipe.is_maze else collect_manipulation_episode
    attempt = 0
    episode = None
    while episode is None or not is_sound(episode, recipe):
        sequence = np.random.SeedSequence([seed, split, index, attempt])
        episode_seed = int(sequence.generate_state(1)[0])
        # The oracles and the mazes draw from numpy's global generator.
        np.random.seed(episode_seed)
        env.action_space.seed(episode_seed)
        episode = collect(env, recipe, episode_seed)
        attempt += 1
    dtypes = {"terminals": bool, "button_states": np.int64}
    arrays = {}
    for field, values in episode.items():
        if len(values):
            arrays[field] = np.array(values).astype(dtypes.get(field, np.float32))
    return arrays


# -------------------------------------------------------------------------- workers and their parts


def part_path(parts: Path, split: int, index: int) -> Path:
    return parts / f"{SPLITS[split]}_{index:05d}.npz"


def temporary_path(parts: Path, name: str) -> Path:
    """A name that no other process uses: a worker may outlive a collector that was killed."""
    return parts / f"{name}.{os.getpid()}.tmp"


def write_npz(path: Path, arrays: dict) -> None:
    """Write an npz file, and wait until it is on the disk."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def start_worker() -> None:
    """Called once in each worker."""
    # Ctrl-C reaches all processes of a terminal; the collector decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_collector, daemon=True).start()


def end_with_the_collector() -> None:
    """A worker would wait for jobs for ever when the collector is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run_worker(recipe: Recipe, seed: int, parts: Path, job: tuple[int, int]) -> None:
    """Collect the episode (split, index) into the folder of parts."""
    path = part_path(parts, *job)
    temporary = temporary_path(parts, path.name)
    write_npz(temporary, collect_episode(recipe, seed, *job))
    os.replace(temporary, path)


def run_workers(recipe: Recipe, seed: int, parts: Path, jobs: list, workers: int) -> float:
    """Collect the episodes `jobs`; returns the steps a second."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # each worker would warn about a missing display
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # inherited by the workers: one thread each
    context = multiprocessing.get_context("spawn")
    collect = functools.partial(run_worker, recipe, seed, parts)
    total = len(jobs) * recipe.steps
    started = time.perf_counter()
    last_line = started
    rate = 0.0
    # disable=None: a bar for a terminal alone. A log gets a line now and then instead.
    bar = tqdm.tqdm(total=total, unit="step", unit_scale=True, desc=recipe.name, disable=None)
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        for done, _ in enumerate(pool.map(collect, jobs), start=1):
            bar.update(recipe.steps)
            now = time.perf_counter()
            # A coarse clock may not have moved yet.
            rate = done * recipe.steps / max(now - started, 1e-3)
            if bar.disable and now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                minutes = (total / rate - (now - started)) / 60
                words = f"{done} of {len(jobs)} episodes, {rate:.0f} steps a second"
                print(f"{recipe.name}: {words}, {minutes:.0f} minutes left", flush=True)
    bar.close()
    return round(rate, 1)


def assemble(parts: Path, split: int, num_episodes: int) -> dict:
    """All episodes of a split, one after the other: by field, (episodes * steps, ...) arrays."""
    episodes = []
    for index in range(num_episodes):
        with np.load(part_path(parts, split, index)) as part:
            episodes.append({field: part[field] for field in part.files})
    arrays = {}
    for field in episodes[0]:
        arrays[field] = np.concatenate([episode[field] for episode in episodes])
    return arrays


# --------------------------------------------------------------------------------------- the report


def describe_field(values: np.ndarray) -> dict:
    return {
        "shape": list(values.shape),
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": round(float(values.mean()), 5),
        "finite": bool(np.isfinite(values).all()),
    }


def describe_task(recipe: Recipe, task: int, arrays: dict) -> dict:
    """How often the data solves a task of the domain."""
    environment_id = f"{recipe.domain}-singletask-task{task}-v0"
    labelled = dict(arrays)
    relabel_dataset(environment_id, gymnasium.make(environment_id), labelled)
    success = labelled["masks"] == 0
    # Solved in the step before, in the same episode.
    still = np.zeros_like(success)
    still[1:] = success[:-1] & ~arrays["terminals"][:-1]
    times = int((success & ~still).sum())
    return {"share_of_steps": float(success.mean()), "times_reached": times}


def describe(recipe: Recipe, arrays: dict) -> dict:
    """Figures that show whether a set is sound: ranges, successes by task, contact and movement."""
    terminals = arrays["terminals"]
    report = {"steps": len(terminals), "episodes": int(terminals.sum())}
    report["ranges"] = {field: describe_field(values) for field, values in arrays.items()}
    report["tasks"] = {}
    for task in range(1, 6):
        report["tasks"][f"task{task}"] = describe_task(recipe, task, arrays)
    inside = ~terminals[:-1]  # row i and row i + 1 belong to one episode
    if recipe.is_maze:
        moved = np.linalg.norm(np.diff(arrays["qpos"], axis=0), axis=1)[inside]
        # A step of an action of length 1 is 0.2 long where no wall is in the way.
        asked = 0.2 * np.linalg.norm(arrays["actions"], axis=1)[:-1][inside]
        held = moved < 0.5 * asked
        report["share_of_steps_held_by_a_wall"] = float(held.mean())
        return report
    contact = arrays["observations"][:, 18] > 0.1  # the gripper's
    report["share_of_steps_in_contact"] = float(contact.mean())
    # The arm's 14 joints come first, the objects after them; metres or radians a step.
    moved = np.abs(np.diff(arrays["qpos"][:, 14:], axis=0)).max(axis=1)[inside]
    report["share_of_steps_moving_an_object"] = float((moved > 1e-3).mean())
    return report


def print_report(path: Path, report: dict) -> None:
    """Print what was collected and what shows that it is sound."""
    figures = report["report"]
    rate = report["steps_per_second"]
    size = f"{figures['episodes']} episodes, {figures['steps']} steps"
    print(f"{path}: {size}, {rate} steps a second")
    for field, values in figures["ranges"].items():
        shape = "x".join(map(str, values["shape"]))
        span = f"from {values['min']:.4g} to {values['max']:.4g}, mean {values['mean']:.4g}"
        warning = "" if values["finite"] else "  NOT FINITE"
        print(f"  {field:14s} {shape:>14s}  {span}{warning}")
    for task, values in figures["tasks"].items():
        share = 100 * values["share_of_steps"]
        times = values["times_reached"]
        print(f"  {task}: solved in {share:.2f} % of the steps, reached {times} times")
    for key, value in figures.items():
        if key.startswith("share"):
            print(f"  {key.replace('_', ' ')}: {100 * value:.1f} %")


# -------------------------------------------------------------------------------- the official file


def download(name: str, path: Path) -> bool:
    """Fetch OGBench's training file NAME.npz. It takes its name only if it has arrived whole."""
    part = Path(f"{path}.{os.getpid()}.part")
    socket.setdefaulttimeout(SECONDS_WITHOUT_AN_ANSWER)
    bar = tqdm.tqdm(desc=f"downloading {name}.npz", unit="B", unit_scale=True)

    def show(blocks: int, block_size: int, size: int) -> None:
        bar.total = size
        bar.update(blocks * block_size - bar.n)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(f"{ogbench.utils.DATASET_URL}/{name}.npz", part, show)
        zipfile.ZipFile(part).close()  # a page that asks for a password is no zip file
        os.replace(part, path)
    except Exception as error:  # of the network, the server, the disk or zipfile
        part.unlink(missing_ok=True)
        bar.write(f"{name}.npz can't be downloaded: {error!r}")
    bar.close()
    return path.exists()


def is_official_there(name: str) -> bool:
    """Is OGBench's own file where OGBench keeps it? It is downloaded if it can be."""
    try:
        folder = OFFICIAL_DIR.expanduser()
    except RuntimeError:
        fail("there is no home folder for the dataset; --out-dir names another to collect into")
    name = f"{name.removesuffix('-v0')}-v0"
    path = folder / f"{name}.npz"
    there = path.exists() or download(name, path)
    if there:
        print(f"{path} is there")
    return there


# ------------------------------------------------------------------------------------------ the set


def lock(path: Path, name: str) -> TextIO:
    """Wait until no other process collects into the lock file's folder; keep the returned file."""
    file = open(path, "a")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another process collects {name} into {path.parent}; waiting for it", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f"{path.parent} has no locks ({error.strerror}): collect {name} once at a time")
    return file


def is_finished(path: Path, args: Args, episodes: int) -> bool:
    """Is a set there that will do? Exits with 2 where it is not ours to replace."""
    if args.overwrite or not path.exists():
        return False
    remedy = "give --overwrite to replace it, or another --out-dir"
    try:
        saved = json.loads(path.with_suffix(".json").read_text())
        there = int(saved["episodes"])
        seed = int(saved["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{path} is already there, and not known to be this program's; {remedy}")
    if there < episodes:
        return False
    if seed != args.seed:
        fail(f"{path} is already there, with {there} episodes of seed {seed}; {remedy}")
    print(f"{path} is already there, with {there} episodes; --overwrite makes it anew")
    return True


def publish(path: Path, parts: Path, counts: tuple[int, int], report: dict, recipe: Recipe) -> None:
    """Make the set's files of the parts. Each appears whole or not at all."""
    train = assemble(parts, 0, counts[0])
    report["report"] = describe(recipe, train)
    names = (f"{path.stem}-val.npz", path.name, f"{path.stem}.json")
    temporary = [temporary_path(parts, name) for name in names]
    write_npz(temporary[0], assemble(parts, 1, counts[1]))
    write_npz(temporary[1], train)
    temporary[2].write_text(json.dumps(report, indent=1) + "\n")
    for i in range(3):
        os.replace(temporary[i], path.with_name(names[i]))
    # A worker that has outlived a killed collector may still write here.
    shutil.rmtree(parts, ignore_errors=True)


def collect_set(args: Args, recipe: Recipe, path: Path, episodes: int) -> None:
    """Collect what is missing of the set, and write its files."""
    versions = {name: version(name) for name in ("ogbench", "mujoco", "numpy", "gymnasium")}
    settings = {"recipe": dataclasses.asdict(recipe), "seed": args.seed, "versions": versions}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    # An episode a file, until all are there. Parts of other settings are in another folder.
    parts = path.parent / f".{recipe.name}.{digest}.parts"
    parts.mkdir(exist_ok=True)
    counts = (episodes, max(episodes // 10, 1))
    jobs = [(split, index) for split in (0, 1) for index in range(counts[split])]
    print(f"{counts[0]} episodes, and {counts[1]} for validation", flush=True)
    missing = [job for job in jobs if not part_path(parts, *job).exists()]
    if len(missing) < len(jobs):
        there = len(jobs) - len(missing)
        print(f"going on: {there} of {len(jobs)} episodes are there", flush=True)
    workers = min(args.workers, max(len(missing), 1))
    rate = run_workers(recipe, args.seed, parts, missing, workers)
    own = {"episodes": episodes, "steps_per_second": rate, "workers": args.workers}
    report = {**settings, **own}
    publish(path, parts, counts, report, recipe)
    print_report(path, report)


def main(args: Args) -> None:
    if args.download and is_official_there(args.name):
        return
    recipe = find_recipe(args.name)
    default = 100 if args.download else recipe.episodes  # a run that waits needs data soon
    episodes = default if args.episodes is None else args.episodes
    limits = (("--episodes", episodes, 1), ("--workers", args.workers, 1), ("--seed", args.seed, 0))
    for flag, value, least in limits:
        if value < least:
            fail(f"{flag} must be at least {least}, not {value}")
    out_dir = args.out_dir.expanduser()
    path = out_dir / f"{recipe.name}.npz"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock_file = lock(out_dir / f".{recipe.name}.lock", recipe.name)
    except OSError as error:
        fail(f"--out-dir {out_dir} can't be written ({error.strerror}); choose another folder")
    with lock_file:
        if is_finished(path, args, episodes):
            return
        if episodes < recipe.episodes:
            size = f"{episodes} episodes of {recipe.name} instead of the official {recipe.episodes}"
            print(f"{size}: expect lower success")
            command = f"python tools/collect_dataset.py {recipe.domain}-{recipe.kind}"
            print(f"for a set of the official size: {command}", flush=True)
        try:
            collect_set(args, recipe, path, episodes)
        except BrokenProcessPool:
            fail("a worker was killed, perhaps for memory; go on with fewer --workers", 1)
        except OSError as error:
            words = f"writing to {out_dir} failed ({error.strerror})"
            fail(f"{words}; free some space and give the same command again")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        words = "the same command goes on where it stopped (episodes are kept in a hidden folder)"
        print(f"\ninterrupted; {words}", file=sys.stderr)
        sys.exit(130)
