"""Collect an OGBench dataset with the package's own scripted policies.

OGBench's manipulation and pointmaze datasets were made by scripted policies that the package ships. This program runs
them again, so that the same data can be had without the download server:

    python tools/collect_dataset.py cube-double-play                     the official size, into ~/.ogbench/collected
    python tools/collect_dataset.py cube-double-play --episodes 100      a small set in minutes

It writes NAME.npz and NAME-val.npz with the official fields and types, and NAME.json: the recipe, the versions, and
figures that show whether the data is sound. Every episode has its own seed, so the number of workers does not change
the data, and an interrupted collection goes on where it stopped when the same command is given again. A set with fewer
episodes gives way to one with more.

Recipes: OGBench (arXiv 2410.20092), appendix on datasets. Antmaze, humanoidmaze and antsoccer data was made by trained
experts that the package does not ship: for these only the official files serve.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import gymnasium
import mujoco
import numpy as np
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

COLLECTED_DIR = Path("~/.ogbench/collected")  # where the training scripts look
MANIPULATION_EPISODES = {  # episodes of the official training sets, 1001 steps each
    "cube-single": 1000,
    "cube-double": 1000,
    "cube-triple": 3000,
    "cube-quadruple": 5000,
    "cube-octuple": 5000,  # the official set has 100M steps; this size is our choice
    "scene": 1000,
    "puzzle-3x3": 1000,
    "puzzle-4x4": 1000,
    "puzzle-4x5": 3000,
    "puzzle-4x6": 5000,
}
P_STACK = {  # range of an episode's probability that a new target is on top of another cube
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
NOISY_ACTION_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])  # of x, y, z, yaw, gripper, times the episode's xi
POINTMAZE_NOISE = 0.5
STITCH_CELLS = 4  # from start to goal


@dataclasses.dataclass
class Args:
    name: Annotated[str, tyro.conf.Positional]
    """dataset name: cube-double-play, scene-noisy, puzzle-3x3-play, pointmaze-medium-navigate, ... (-v0 may follow)"""
    episodes: int | None = None
    """training episodes, at least 1; the validation set has a tenth, at least 1 (None: the official number)"""
    seed: int = 0
    """seed of the whole set, 0 or more"""
    workers: int = os.cpu_count() or 1
    """processes, at least 1; does not change the data"""
    out_dir: Path = COLLECTED_DIR
    """folder for the files"""
    overwrite: bool = False
    """replace a finished set of the same name and at least as many episodes"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes one dataset. `domain` is OGBench's environment, `kind` is play, noisy, navigate or stitch."""

    domain: str
    kind: str
    episodes: int  # official number of training episodes
    steps: int  # of an episode

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.kind}-v0"


def fail(message: str) -> None:
    """Print one sentence and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def recipe_names() -> list[str]:
    """Names of all sets that can be collected, without -v0."""
    manipulation = [f"{domain}-{kind}" for domain in MANIPULATION_EPISODES for kind in ("play", "noisy")]
    mazes = [
        f"pointmaze-{size}-{kind}"
        for size in ("medium", "large", "giant", "teleport")
        for kind in ("navigate", "stitch")
    ]
    return manipulation + mazes


def find_recipe(name: str) -> Recipe | None:
    """The recipe of a dataset name (with or without -v0), or None if the package holds no policy for it."""
    name = name.removesuffix("-v0")
    if name not in recipe_names():
        return None
    domain, kind = name.rsplit("-", 1)
    if domain in MANIPULATION_EPISODES:
        return Recipe(domain, kind, MANIPULATION_EPISODES[domain], 1001)
    if kind == "stitch":
        return Recipe(domain, kind, 5000, 201)
    return Recipe(domain, kind, *((500, 2001) if domain == "pointmaze-giant" else (1000, 1001)))


def make_environment(recipe: Recipe) -> gymnasium.Env:
    """The environment in which the recipe's episodes are made."""
    mode = {} if recipe.domain.startswith("pointmaze") else {"mode": "data_collection"}
    return gymnasium.make(f"{recipe.domain}-v0", terminate_at_goal=False, max_episode_steps=recipe.steps, **mode)


def make_oracles(env: gymnasium.Env, recipe: Recipe) -> dict:
    """One scripted policy per kind of target of a manipulation environment, by the target's name."""
    closed = {"gripper_always_closed": recipe.domain.startswith("puzzle")}
    if recipe.kind == "play":
        options = {"env": env, "noise": 0.1, "noise_smoothing": 0.5}
        cube, button, drawer, window = CubePlanOracle, ButtonPlanOracle, DrawerPlanOracle, WindowPlanOracle
        cube_options = {}
    else:
        options = {"env": env, "min_norm": 0.4}
        cube, button, drawer, window = CubeMarkovOracle, ButtonMarkovOracle, DrawerMarkovOracle, WindowMarkovOracle
        cube_options = {"max_step": 100} if recipe.domain == "scene" else {}  # the oracle's own reset sets 200 again
    if recipe.domain.startswith("cube"):
        return {"cube": cube(**options)}
    if recipe.domain.startswith("puzzle"):
        return {"button": button(**closed, **options)}
    return {
        "cube": cube(**cube_options, **options),
        "button": button(**closed, **options),
        "drawer": drawer(**options),
        "window": window(**options),
    }


def collect_manipulation_episode(env: gymnasium.Env, recipe: Recipe, seed: int) -> dict:
    """One episode of a play or noisy set: (steps, ...) arrays by field, values from before each step."""
    rng = np.random.default_rng(seed)  # for what is drawn here; the oracles draw from numpy's global generator
    p_stack = rng.uniform(*P_STACK.get(recipe.domain, (0.5, 0.5)))
    noise_scale = rng.uniform(0.0, 0.1) * NOISY_ACTION_SCALE
    p_random = 0.2 if recipe.domain.startswith("puzzle") else 0.1
    oracles = make_oracles(env, recipe)
    observation, info = env.reset(seed=seed)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    episode = {"observations": [], "actions": [], "terminals": [], "qpos": [], "qvel": [], "button_states": []}
    done = False
    while not done:
        if recipe.kind == "noisy" and rng.random() < p_random:
            action = rng.uniform(-1.0, 1.0, size=5)
        else:
            action = np.array(oracle.select_action(observation, info))
            if recipe.kind == "noisy":
                action = action + rng.normal(0.0, noise_scale)
        action = np.clip(action, -1.0, 1.0)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        episode["observations"].append(observation)
        episode["actions"].append(action)
        episode["terminals"].append(done)
        episode["qpos"].append(info["prev_qpos"])
        episode["qvel"].append(info["prev_qvel"])
        if "prev_button_states" in info:
            episode["button_states"].append(info["prev_button_states"])
        observation = next_observation
        if oracle.done:
            observation_of_target, info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(observation_of_target, info)
    return episode


def find_cells(maze_map: np.ndarray) -> tuple[list, list]:
    """Free cells of a maze, and those of them that are no straight corridor ("vertex cells"), as (row, column)."""
    free = [(int(i), int(j)) for i, j in zip(*np.where(maze_map == 0), strict=True)]
    vertices = []
    for i, j in free:
        up, down, left, right = (maze_map[i - 1, j], maze_map[i + 1, j], maze_map[i, j - 1], maze_map[i, j + 1])
        vertical = up == 0 and down == 0 and left == 1 and right == 1
        horizontal = left == 0 and right == 0 and up == 1 and down == 1
        if not (vertical or horizontal):
            vertices.append((i, j))
    return free, vertices


def collect_pointmaze_episode(env: gymnasium.Env, recipe: Recipe, seed: int) -> dict:
    """One episode of a navigate or stitch set: (steps, ...) arrays by field, values from before each step."""
    rng = np.random.default_rng(seed)
    maze = env.unwrapped
    free, vertices = find_cells(maze.maze_map)
    start = free[rng.integers(len(free))]
    if recipe.kind == "navigate":
        goal = vertices[rng.integers(len(vertices))]
    else:
        _, distances = maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(start))
        reachable = [cell for cell in free if 0 <= distances[cell] <= STITCH_CELLS]
        farthest = max(distances[cell] for cell in reachable)
        goals = [cell for cell in reachable if distances[cell] == farthest]
        goal = goals[rng.integers(len(goals))]
    observation, _ = env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
    episode = {"observations": [], "actions": [], "terminals": [], "qpos": [], "qvel": []}
    done = False
    while not done:
        xy = maze.get_xy()
        subgoal, _ = maze.get_oracle_subgoal(xy, maze.cur_goal_xy)
        direction = (subgoal - xy) / (np.linalg.norm(subgoal - xy) + 1e-6)
        action = np.clip(direction + rng.normal(0.0, POINTMAZE_NOISE, size=2), -1.0, 1.0)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"] and recipe.kind == "navigate":
            goal = vertices[rng.integers(len(vertices))]
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
        episode["observations"].append(observation)
        episode["actions"].append(action)
        episode["terminals"].append(done)
        episode["qpos"].append(info["prev_qpos"])
        episode["qvel"].append(info["prev_qvel"])
        observation = next_observation
    return episode


def is_sound(episode: dict, recipe: Recipe) -> bool:
    """False for the rare scene episode in which the cube slipped out of reach (OGBench leaves these out too)."""
    if recipe.domain != "scene":
        return True
    y, z = np.array(episode["qpos"])[:, 15], np.array(episode["qpos"])[:, 16]
    return not np.any((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08))))


def collect_episode(env: gymnasium.Env, recipe: Recipe, seed: int, split: int, index: int) -> dict:
    """Episode `index` of split 0 (train) or 1 (validation), a function of its arguments alone.

    Returns: by field, (steps, ...) arrays in the official types: float32, terminals bool, button_states int64.
    """
    collect = collect_pointmaze_episode if recipe.domain.startswith("pointmaze") else collect_manipulation_episode
    attempt = 0
    while True:
        episode_seed = int(np.random.SeedSequence([seed, split, index, attempt]).generate_state(1)[0])
        np.random.seed(episode_seed)  # oracles and mazes draw from here
        env.action_space.seed(episode_seed)
        episode = collect(env, recipe, episode_seed)
        if is_sound(episode, recipe):
            break
        attempt += 1
    dtypes = {"terminals": bool, "button_states": np.int64}
    return {k: np.array(v).astype(dtypes.get(k, np.float32)) for k, v in episode.items() if len(v)}


def write_npz(path: Path, arrays: dict, compressed: bool = False) -> None:
    """Write an npz file so that it appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def start_worker(recipe: Recipe) -> None:
    """Give a worker process its environment."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    global worker_env
    worker_env = make_environment(recipe)


def run_worker(job: tuple) -> tuple[int, int]:
    """Collect one episode into the folder of parts; returns (split, index)."""
    recipe, seed, parts, split, index = job
    write_npz(part_path(parts, split, index), collect_episode(worker_env, recipe, seed, split, index))
    return split, index


def part_path(parts: Path, split: int, index: int) -> Path:
    return parts / f"{'val' if split else 'train'}_{index:05d}.npz"


def assemble(parts: Path, split: int, num_episodes: int) -> dict:
    """All episodes of one split, one after the other in order of their index: by field, (episodes * steps, ...)."""
    episodes = []
    for index in range(num_episodes):
        with np.load(part_path(parts, split, index)) as part:
            episodes.append({k: part[k] for k in part.files})
    return {k: np.concatenate([episode[k] for episode in episodes]) for k in episodes[0]}


def describe(recipe: Recipe, arrays: dict) -> dict:
    """Figures that show whether a set is sound: ranges by field, successes by task, contact and movement."""
    report = {"steps": int(len(arrays["terminals"])), "episodes": int(arrays["terminals"].sum()), "ranges": {}}
    for field, values in arrays.items():
        report["ranges"][field] = {"shape": list(values.shape), "min": float(values.min()), "max": float(values.max())}
        report["ranges"][field] |= {"mean": round(float(values.mean()), 5), "finite": bool(np.isfinite(values).all())}
    report["tasks"] = {}
    for task in range(1, 6):
        environment_id = f"{recipe.domain}-singletask-task{task}-v0"
        labelled = dict(arrays)
        relabel_dataset(environment_id, gymnasium.make(environment_id), labelled)
        success = labelled["masks"] == 0
        begins = success & ~np.concatenate([[False], (success & ~arrays["terminals"])[:-1]])
        report["tasks"][f"task{task}"] = {"share_of_steps": float(success.mean()), "times_reached": int(begins.sum())}
    inside = ~arrays["terminals"][:-1]  # row i and row i + 1 belong to one episode
    if recipe.domain.startswith("pointmaze"):
        moved = np.linalg.norm(np.diff(arrays["qpos"], axis=0), axis=1)[inside]
        asked = 0.2 * np.linalg.norm(arrays["actions"], axis=1)[:-1][inside]
        report["share_of_steps_held_by_a_wall"] = float((moved < 0.5 * asked).mean())
    else:
        report["share_of_steps_in_contact"] = float((arrays["observations"][:, 18] > 0.1).mean())  # the gripper's
        moved = np.abs(np.diff(arrays["qpos"][:, 14:], axis=0)).max(axis=1)[inside]
        report["share_of_steps_moving_an_object"] = float((moved > 1e-3).mean())  # metres or radians a step
    return report


def collect(args: Args) -> Path:
    """Collect the set that `args` names; returns the path of the training file. Exits with 2 on bad arguments."""
    recipe = find_recipe(args.name)
    if recipe is None:
        can = "cube-*, scene and puzzle-* (play, noisy), pointmaze-* (navigate, stitch)"
        fail(f"OGBench ships no policy that collects '{args.name}'; it does for {can}")
    episodes = recipe.episodes if args.episodes is None else args.episodes
    for flag, value, least in (("--episodes", episodes, 1), ("--workers", args.workers, 1), ("--seed", args.seed, 0)):
        if value < least:
            fail(f"{flag} must be at least {least}, not {value}")
    counts = (episodes, max(episodes // 10, 1))
    out_dir = args.out_dir.expanduser()
    path, val_path = out_dir / f"{recipe.name}.npz", out_dir / f"{recipe.name}-val.npz"
    try:
        there = json.loads(path.with_suffix(".json").read_text())["episodes"]
    except (OSError, ValueError, KeyError, TypeError):
        there = float("inf")  # not known: not ours to replace
    if path.exists() and there >= episodes and not args.overwrite:
        fail(f"{path} is already there; give --overwrite to replace it, or another --out-dir")
    if episodes < recipe.episodes:
        print(f"{episodes} episodes of {recipe.name} instead of the official {recipe.episodes}: expect lower success.")
        print(f"For a set of the official size: python tools/collect_dataset.py {recipe.name[:-3]}", flush=True)
    versions = {"ogbench": package_version("ogbench"), "mujoco": mujoco.__version__, "numpy": np.__version__}
    versions["gymnasium"] = gymnasium.__version__
    settings = {"recipe": dataclasses.asdict(recipe), "seed": args.seed, "versions": versions}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    parts = out_dir / f".{recipe.name}.{digest}.parts"  # an episode a file, until all are there
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out-dir {out_dir} can't be written ({error.strerror}); choose another folder")
    jobs = [(recipe, args.seed, parts, split, index) for split in (0, 1) for index in range(counts[split])]
    missing = [job for job in jobs if not part_path(*job[2:]).exists()]
    if len(missing) < len(jobs):
        print(f"going on: {len(jobs) - len(missing)} of {len(jobs)} episodes are there")
    os.environ["PYTHONWARNINGS"] = "ignore"  # the libraries warn about missing displays in each worker
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # inherited by the workers: a process a core, one thread each
    started = time.time()
    context = multiprocessing.get_context("spawn")
    try:
        with context.Pool(min(args.workers, max(len(missing), 1)), start_worker, (recipe,)) as pool:
            bar = tqdm.tqdm(total=len(missing) * recipe.steps, unit="step", unit_scale=True, desc=recipe.name)
            for _ in pool.imap_unordered(run_worker, missing):
                bar.update(recipe.steps)
            bar.close()
        seconds = time.time() - started
        train = assemble(parts, 0, counts[0])
        report = settings | {"episodes": counts[0], "steps_per_second": round(len(missing) * recipe.steps / seconds, 1)}
        report |= {"workers": args.workers, "report": describe(recipe, train)}
        path.with_suffix(".json").unlink(missing_ok=True)
        write_npz(val_path, assemble(parts, 1, counts[1]))
        write_npz(path, train)
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        fail(f"writing to {out_dir} failed ({error.strerror}); free some space and give the same command again")
    shutil.rmtree(parts)
    print_report(path, report)
    return path


def package_version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def print_report(path: Path, report: dict) -> None:
    """Print what was collected and what shows that it is sound."""
    figures = report["report"]
    print(
        f"{path}: {figures['episodes']} episodes, {figures['steps']} steps, {report['steps_per_second']} steps a second"
    )
    for field, r in figures["ranges"].items():
        shape, finite = "x".join(map(str, r["shape"])), "" if r["finite"] else "  NOT FINITE"
        print(f"  {field:14s} {shape:>14s}  from {r['min']:.4g} to {r['max']:.4g}, mean {r['mean']:.4g}{finite}")
    for task, r in figures["tasks"].items():
        print(f"  {task}: solved in {100 * r['share_of_steps']:.2f} % of the steps, reached {r['times_reached']} times")
    for key in (key for key in figures if key.startswith("share")):
        print(f"  {re.sub('_', ' ', key)}: {100 * figures[key]:.1f} %")


if __name__ == "__main__":
    collect(tyro.cli(Args, description=__doc__))
