"""Environments that are not OGBench's: docs/own_data.md, and one with dicts that a module makes."""

import json
import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from conftest import ROOT, TINY, folder_of, read_rows
from refusals import refusal

import qam_offline as qam

PENDULUM = "Pendulum-v1"

# Observations are a dict, and actions go from -2 to 0.5; it ends early at the goal.
MODULE = """
import gymnasium
import numpy as np

class Reach(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(
        {
            "where": gymnasium.spaces.Box(-9, 9, (2,)),
            "goal": gymnasium.spaces.Box(-9, 9, (1,)),
        }
    )
    action_space = gymnasium.spaces.Box(-2.0, 0.5, (2,))

    def observe(self):
        return {"where": self.where.astype(np.float32), "goal": np.ones(1, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.where = self.np_random.uniform(-1, 1, 2)
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.where = np.clip(self.where + action + 0.75, -9, 9)
        return self.observe(), float(-np.abs(self.where).sum()), False, False, {}

gymnasium.register("Reach-v0", entry_point=Reach, max_episode_steps=20)
"""
REACH = "reach_module:Reach-v0"


def block(language):
    """The page's only code block of a language."""
    page = (ROOT / "docs/own_data.md").read_text()
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return text


def execute(folder, *line):
    """Run a command there; it has to succeed."""
    line = [str(word) for word in (sys.executable, *line)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """What a reader has after the first section."""
    folder = tmp_path_factory.mktemp("pendulum")
    (folder / "data").mkdir()
    (folder / "data/make_data.py").write_text(block("python"))
    execute(folder, "data/make_data.py")
    return folder


@pytest.fixture(scope="module")
def reach(tmp_path_factory):
    """A module with an environment, and data of random actions."""
    folder = tmp_path_factory.mktemp("reach")
    (folder / "reach_module.py").write_text(MODULE)
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        env = qam.make_env(qam.Args(env_id=REACH))
        np.savez(folder / "data/a.npz", **random_episodes(env, 30))
        np.savez(folder / "data/b.npz", **random_episodes(env, 20))
    return folder


def random_episodes(env, count):
    """{field: array} of episodes of random actions from -1 to 1."""
    rng = np.random.default_rng(count)
    rows = []
    for episode in range(count):
        observation, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            action = rng.uniform(-1, 1, env.action_space.shape)
            following, reward, _, truncated, _ = env.step(action.astype(np.float32))
            rows.append((observation, action, reward, 1.0, truncated, following))
            observation = following
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    names = ("observations", "actions", "rewards", "masks", "terminals", "next_observations")
    return dict(zip(names, columns, strict=True))


def test_ends_in_timeouts_are_not_overlooked(pendulum, tmp_path, capsys):
    arrays = dict(np.load(pendulum / "data/pendulum.npz"))
    np.savez(tmp_path / "d4rl.npz", **arrays, timeouts=arrays["terminals"])
    args = qam.Args(env_id=PENDULUM)
    path = tmp_path / "d4rl.npz"
    sentence = refusal(capsys, qam.load_dataset, args, path, qam.make_env(args))
    assert "timeouts" in sentence
    assert "terminals" in sentence


def test_data_are_what_the_page_says(pendulum):
    data = np.load(pendulum / "data/pendulum.npz")
    shapes = {name: data[name].shape for name in data.files}
    assert shapes["observations"] == shapes["next_observations"] == (40_000, 3)
    assert shapes["actions"] == (40_000, 1)
    assert np.abs(data["actions"]).max() == 1
    assert data["terminals"].sum() == 200
    assert data["terminals"][-1] == 1
    inside = data["terminals"][:-1] == 0
    following = data["observations"][1:]
    np.testing.assert_array_equal(data["next_observations"][:-1][inside], following[inside])


@pytest.mark.slow
def test_its_policy_beats_its_data(pendulum):
    """The page's command, but shorter: the bound of 2 is rescaled, and the return counts."""
    flags = "--hidden-dims 64 64 --num-critics 2 --flow-steps 5 --tau 0.02 --learning-rate 1e-3"
    flags += " --offline-steps 3000 --eval-every 3000 --eval-episodes 8 --eval-envs 2"
    line = [ROOT / "variants/trqam.py", "--env-id", PENDULUM, "--dataset-dir", "data"]
    done = execute(pendulum, *line, *flags.split())
    assert "data: from --dataset-dir, 200 episodes" in done.stdout
    (row,) = read_rows(folder_of(pendulum / "runs") / "eval.csv")
    data = np.load(pendulum / "data/pendulum.npz")
    returns = np.sort(data["rewards"].reshape(200, 200).sum(axis=1))
    assert float(row["return"]) > returns[-40:].mean()
    assert (row["success_rate"], row["length"]) == ("0.0", "200.0")


TINY_REACH = [*TINY, "--dataset-dir", "data", "--flow-steps", "2", "--eval-every", "60"]


@pytest.fixture(scope="module")
def reach_run(reach):
    """The folder of an offline run."""
    flags = ["--env-id", REACH, *TINY_REACH, "--run-dir", "offline"]
    execute(reach, ROOT / "qam_offline.py", *flags)
    return folder_of(reach / "offline")


def test_a_modules_environment_with_dicts_shards_and_bounds_of_its_own(reach_run):
    run = reach_run
    assert ":" not in run.name
    (row,) = read_rows(run / "eval.csv")
    assert row["length"] == "20.0"
    record = json.loads((run / "args.json").read_text())
    assert [path.rpartition("/")[2] for path in record["data"]["path"]] == ["a.npz", "b.npz"]


@pytest.mark.slow
def test_one_run_acts_in_many_ways(reach, reach_run):
    """A line and a row each; the run's own way scores what it did, and is the CSV's only such."""
    flags = "--best-of-n 1 3 --flow-steps 2 4 -o kept/acting.csv".split()
    done = execute(reach, ROOT / "tools/evaluate.py", reach_run, *flags)
    pattern = r"step 60 seed 1 policy best_of_n (\d) flow_steps (\d) success_rate .* episodes 2"
    assert re.findall(pattern, done.stdout) == [("1", "2"), ("1", "4"), ("3", "2"), ("3", "4")]
    rows = read_rows(reach / "kept/acting.csv")
    (own,) = read_rows(reach_run / "eval.csv")
    for name in ("step", "seed", "success_rate", "return", "length", "episodes"):
        assert rows[0][name] == own[name]
    assert len({row["return"] for row in rows}) == 4
    told = [rows[3][name] for name in ("run", "script", "env_id", "policy", "guidance_weight")]
    assert told == [reach_run.name, "qam_offline", REACH, "policy", ""]
    assert (rows[3]["best_of_n"], rows[3]["flow_steps"]) == ("3", "4")


@pytest.mark.slow
def test_it_goes_online(reach):
    flags = ["--online-steps", "60", "--start-training", "20", "--run-dir", "online"]
    flags += ["--env-id", REACH, *TINY_REACH]
    execute(reach, ROOT / "qam_offline_to_online.py", *flags)
    rows = read_rows(folder_of(reach / "online") / "episodes.csv")
    assert [row["step"] for row in rows] == ["80", "100", "120"]


@pytest.mark.slow
def test_it_is_scored_drawn_and_swept(reach, reach_run):
    """And a video of it, which can't be had, is one sentence."""
    done = execute(reach, ROOT / "tools/evaluate.py", reach_run, "--episodes", "3")
    assert re.fullmatch(r"step 60 seed 1 policy .* length 20.0 episodes 3\n", done.stdout)
    execute(reach, ROOT / "tools/report.py", reach_run, "-o", "report")
    line = [sys.executable, ROOT / "tools/evaluate.py", reach_run, "--video", "1"]
    done = subprocess.run(line, cwd=reach, capture_output=True, text=True)
    assert done.returncode == 2
    assert "can't be rendered" in done.stderr
    assert "Traceback" not in done.stderr

    words = ["--scripts", ROOT / "qam_offline.py", "--tasks", REACH, "--seeds", "1"]
    execute(reach, ROOT / "tools/sweep.py", "plan", "sweep", *words, *TINY_REACH)
    execute(reach, ROOT / "tools/sweep.py", "run", "sweep")


def without(name):
    def damage(arrays):
        del arrays[name]

    return damage


def wide(arrays):
    arrays["actions"] = arrays["actions"].repeat(2, axis=1)


def not_finite(arrays):
    arrays["rewards"][7] = np.nan


def no_end(arrays):
    arrays["terminals"][-1] = 0


def too_large(arrays):
    arrays["actions"] *= 2


@pytest.mark.parametrize(
    "damage, word",
    [
        (without("rewards"), "rewards"),
        (without("next_observations"), "next_observations"),
        (wide, "actions"),
        (not_finite, "rewards"),
        (no_end, "terminals"),
        (too_large, "actions"),
    ],
)
def test_bad_data_is_named_by_its_field(damage, word, pendulum, tmp_path, capsys):
    arrays = dict(np.load(pendulum / "data/pendulum.npz"))
    damage(arrays)
    np.savez(tmp_path / "data.npz", **arrays)
    args = qam.Args(env_id=PENDULUM)
    env = qam.make_env(args)
    sentence = refusal(capsys, qam.load_dataset, args, tmp_path / "data.npz", env)
    assert re.search(rf"\b{word}\b", sentence.partition("data.npz")[2])


def test_no_folder_of_data(capsys):
    args = qam.Args(env_id=PENDULUM)
    sentence = refusal(capsys, qam.find_dataset, args)
    assert "--dataset-dir" in sentence
    assert "collect_dataset" not in sentence


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("Pendulm-v1", "Did you mean"),
        ("cube-duble-play", "cube-double"),
        ("scene-play-task9", "task1"),
        ("no_such_module:MyEnv-v0", "no_such_module"),
        ("CartPole-v1", "Box"),
        ("Picture-v0", "observations must be vectors"),
    ],
)
def test_environments_that_do_not_serve(env_id, words, capsys):
    gymnasium.register("Picture-v0", entry_point=Picture)
    assert words in refusal(capsys, qam.make_env, qam.Args(env_id=env_id))


class Picture(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (4, 4, 3))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))


def test_bounds_are_rescaled():
    env = qam.make_env(qam.Args(env_id=PENDULUM))
    assert isinstance(env, gymnasium.wrappers.RescaleAction)
    np.testing.assert_array_equal(env.action_space.low, [-1])
    np.testing.assert_array_equal(env.action_space.high, [1])
