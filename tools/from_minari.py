# /// script
# requires-python = ">=3.11"
# dependencies = ["minari[arrow,hdf5,hf]>=0.5.4", "gymnasium[mujoco]>=1.1", "numpy>=2.0",
#     "tyro>=1.0.16"]
# ///
"""Write a Minari dataset as a file that the scripts train on: docs/own_data.md.

    python tools/from_minari.py mujoco/hopper/medium-v0

Minari takes the dataset from this machine or downloads it. A script makes an environment by its id
alone. So a dataset whose environment had arguments or wrappers is refused, unless --env-id names
one. Needs `uv pip install "minari[arrow,hdf5,hf]"`, or `uv run` in place of `python`.
"""

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import gymnasium
import numpy as np
import tyro
from gymnasium.spaces import Box
from gymnasium.vector.utils import batch_space, iterate

try:
    import minari
except ImportError:  # main says what to do
    minari = None

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Args:
    dataset_id: Annotated[str, tyro.conf.Positional]
    """as Minari names it, for example mujoco/hopper/medium-v0"""
    out_dir: Path | None = None
    """folder of this dataset alone (None: data/NAME)"""
    env_id: str | None = None
    """environment to train for, ID or MODULE:ID (None: the dataset's)"""


def fail(message):
    """Print one sentence and exit with status 2: the user can put it right."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def load(dataset_id):
    """The dataset; downloaded if it is not on this machine."""
    try:
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # of the name, the network, the server, a package that is missing
        there = ", ".join(minari.list_local_datasets()) or "none"
        fail(f"{dataset_id} can't be loaded; on this machine: {there} ({error!r})")


def check_spaces(dataset):
    """Exits with what the scripts' networks can't take."""
    space = dataset.observation_space
    # A dictionary is flattened by the scripts; one that holds an image would be a long vector.
    parts = space.values() if isinstance(space, gymnasium.spaces.Dict) else [space]
    for part in parts:
        if not isinstance(part, Box) or len(part.shape) != 1:
            fail(f"observations of {dataset.id} hold {part}: scripts take vectors, no images")
    space = dataset.action_space
    if not isinstance(space, Box) or len(space.shape) != 1 or not space.is_bounded():
        fail(f"actions of {dataset.id} are {space}: scripts take vectors with bounds")


def find_env_id(dataset):
    """The id by which gymnasium.make finds the dataset's environment, ID or MODULE:ID."""
    spec = dataset.env_spec
    if spec is None:
        fail(f"{dataset.id} does not name its environment: give --env-id")
    if spec.id in gymnasium.registry:
        return spec.id
    # Another package's: importing it registers its environments.
    package = spec.entry_point.partition(":")[0].partition(".")[0]
    return f"{package}:{spec.id}"


def make_env(env_id, dataset):
    """The environment, whose spaces are those of the dataset."""
    sys.path.append(os.getcwd())  # where the module of MODULE:ID may be
    try:
        env = gymnasium.make(env_id)
    except Exception as error:  # of gymnasium, a package that is missing, the environment
        needs = ", ".join(dataset.storage.metadata.get("requirements", [])) or "no packages"
        fail(f"{env_id} can't be made; the dataset asks for {needs} ({error!r})")
    for name in ("observation_space", "action_space"):
        theirs = getattr(dataset, name)
        ours = getattr(env, name)
        if theirs != ours:
            fail(f"{name} of {dataset.id} is {theirs}, that of {env_id} {ours}: see --env-id")
    return env


def describe(spec):
    """{name: text} of what an environment was made with, besides its id."""
    values = {"max_episode_steps": spec.max_episode_steps, **spec.kwargs}
    values["wrappers"] = [wrapper.name for wrapper in spec.additional_wrappers]
    values.pop("render_mode", None)  # changes pictures alone
    # As text: what was a tuple is a list in the dataset.
    return {name: json.dumps(value, default=str) for name, value in values.items()}


def check_spec(env_id, env, dataset):
    """Exits with what the dataset's environment had and its id alone does not say."""
    ours = describe(env.spec)
    theirs = describe(dataset.env_spec)
    lost = [f"{name} {text}" for name, text in theirs.items() if text != ours.get(name)]
    if lost:
        fail(
            f"{dataset.id} is of {env_id} with {', '.join(lost)}: give --env-id {env_id} to do"
            " without it, or --env-id MODULE:ID to keep it (docs/own_data.md)"
        )


def read_episode(episode, env):
    """{name: array} of an episode's N transitions: (N, O), (N, A) or (N,)."""
    space = env.observation_space
    rows = iterate(batch_space(space, len(episode) + 1), episode.observations)
    observations = np.array([gymnasium.spaces.flatten(space, row) for row in rows])
    low = env.action_space.low
    high = env.action_space.high
    terminals = episode.terminations | episode.truncations
    terminals[-1] = True  # also where a recording just stops
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": 2 * (episode.actions - low) / (high - low) - 1,
        "rewards": episode.rewards,
        "masks": ~episode.terminations,
        "terminals": terminals,
    }


def write(path, arrays):
    """Write the file so that it is there whole or not at all."""
    others = [other.name for other in path.parent.glob("*.npz") if other != path]
    if others:
        fail(f"{path.parent} holds {others}, which would count as the same data: see --out-dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)


def main(args):
    if minari is None:
        fail('Minari is missing: uv pip install "minari[arrow,hdf5,hf]", or start this by uv run')
    dataset = load(args.dataset_id)
    check_spaces(dataset)
    env_id = args.env_id or find_env_id(dataset)
    env = make_env(env_id, dataset)
    if args.env_id is None:
        check_spec(env_id, env, dataset)

    episodes = [read_episode(episode, env) for episode in dataset]
    arrays = {}
    for name in episodes[0]:
        arrays[name] = np.concatenate([episode[name] for episode in episodes], dtype=np.float32)
    beyond = np.abs(arrays["actions"]) > 1 + 1e-5
    if beyond.any():
        print(f"clipped: {beyond.mean():.2%} of the actions' numbers were beyond the bounds")
    arrays["actions"] = np.clip(arrays["actions"], -1, 1)

    name = dataset.id.replace("/", "-")
    out_dir = args.out_dir or Path("data") / name
    write(out_dir / f"{name}.npz", arrays)
    returns = np.sort([episode["rewards"].sum() for episode in episodes])
    best = returns[-max(1, len(returns) // 5) :]
    print(f"{out_dir / name}.npz: {len(episodes)} episodes, {len(arrays['rewards'])} transitions")
    print(f"return of an episode: mean {returns.mean():.1f}, best fifth {best.mean():.1f}")
    line = ["python", os.path.relpath(ROOT / "variants/trqam.py"), "--env-id", env_id]
    print(f"to train: {shlex.join([*line, '--dataset-dir', str(out_dir)])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as error:  # of the dataset's file or of --out-dir
        fail(str(error))
