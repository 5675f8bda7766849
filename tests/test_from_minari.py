"""tools/from_minari.py, on datasets that Minari's own collector records here."""

import shlex
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from conftest import ROOT, TINY, folder_of, read_rows
from refusals import refusal
from test_own_data import MODULE, execute

minari = pytest.importorskip("minari", reason='needs uv pip install "minari[hdf5]"')
h5py = pytest.importorskip("h5py", reason='needs uv pip install "minari[hdf5]"')
sys.path.append(str(ROOT / "tools"))
import from_minari as tool  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402

MODULES = "minari_module:Minari/Reach-v0"
PENDULUM = "InvertedPendulum-v5"  # its actions go from -3 to 3


class Picture(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 1, (4, 4, 3))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((4, 4, 3), np.float32), {}

    def step(self, action):
        return np.zeros((4, 4, 3), np.float32), 0.0, True, False, {}


def record(env, name, episodes=3, length=12):
    """Make a dataset of random actions: rows (s, a, r, terminated, ended, s') as they were."""
    env = minari.DataCollector(env)
    env.action_space.seed(0)
    rows = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        for step in range(length):
            action = env.action_space.sample()
            following, reward, terminated, _, _ = env.step(action)
            ended = terminated or step == length - 1
            rows.append((observation, action, reward, terminated, ended, following))
            observation = following
            if ended:
                break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody is named as its author
        env.create_dataset(name)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, where Minari keeps its datasets, and with an environment's module."""
    folder = tmp_path_factory.mktemp("minari")
    # Under a name of its own; Minari can't write down a class.
    module = MODULE.replace("Reach-v0", "Minari/Reach-v0")
    module = module.replace("entry_point=Reach", 'entry_point="minari_module:Reach"')
    (folder / "minari_module.py").write_text(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield folder


def test_every_array_is_what_was_played(folder, capsys):
    rows = record(gymnasium.make(PENDULUM), "pendulum/random-v0", episodes=20, length=7)
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    observations, actions, rewards, terminated, ended, following = columns
    assert 0 < terminated.sum() < ended.sum() == 20

    tool.main(tool.Args("pendulum/random-v0"))
    data = np.load("data/pendulum-random-v0/pendulum-random-v0.npz")
    np.testing.assert_array_equal(data["observations"], observations)
    np.testing.assert_array_equal(data["next_observations"], following)
    np.testing.assert_allclose(data["actions"], actions / 3, atol=1e-6)
    np.testing.assert_array_equal(data["rewards"], rewards)
    np.testing.assert_array_equal(data["masks"], 1 - terminated)
    np.testing.assert_array_equal(data["terminals"], ended)
    assert all(array.dtype == np.float32 for array in data.values())
    assert f"20 episodes, {len(rows)} transitions" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dataset_of_dicts_is_trained_on_and_scored(folder):
    """The environment is a module's, its observations are dicts; the command is the printed one."""
    rows = record(gymnasium.make(MODULES), "reach/random-v0", 4, 20)
    done = execute(folder, ROOT / "tools/from_minari.py", "reach/random-v0", "--out-dir", "reach")
    data = np.load(folder / "reach/reach-random-v0.npz")
    expected = [[*s["goal"], *s["where"]] for s, *_ in rows]  # the keys in alphabetical order
    np.testing.assert_allclose(data["observations"], expected)

    _, _, command = done.stdout.strip().rpartition("to train: ")
    _, *line = shlex.split(command)
    assert line[1:3] == ["--env-id", MODULES]
    flags = [*TINY, "--flow-steps", "2", "--eval-every", "60"]
    execute(folder, *line, *flags)
    run = folder_of(folder / "runs")
    (row,) = read_rows(run / "eval.csv")
    done = execute(folder, ROOT / "tools/evaluate.py", run)
    assert f"return {row['return']} length 20.0" in done.stdout


def test_a_log_without_ends_and_with_actions_beyond_the_bounds(folder, capsys):
    """Not of an environment that was played: Minari takes logs as they are."""
    episode = EpisodeBuffer(
        observations=np.arange(12.0).reshape(3, 4),
        actions=np.array([[9.0], [-1.5]], np.float32),
        rewards=[5.0, 7.0],
        terminations=[False, False],
        truncations=[False, False],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("pendulum/log-v0", [episode, episode], env=PENDULUM)
    tool.main(tool.Args("pendulum/log-v0"))
    data = np.load("data/pendulum-log-v0/pendulum-log-v0.npz")
    np.testing.assert_array_equal(data["terminals"], [0, 1, 0, 1])
    np.testing.assert_array_equal(data["masks"], [1, 1, 1, 1])
    np.testing.assert_allclose(data["actions"], [[1], [-0.5], [1], [-0.5]])
    assert "clipped: 50.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, make, words",
    [
        ("discrete", lambda: gymnasium.make("CartPole-v1"), "Discrete(2)"),
        ("picture", Picture, "no images"),
        ("gravity", lambda: gymnasium.make("Pendulum-v1", g=5.0), "with g 5.0: give --env-id"),
        ("limit", lambda: gymnasium.make(PENDULUM, max_episode_steps=7), "max_episode_steps 7"),
        (
            "wrapped",
            lambda: gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1, 1),
            "Box(-2.0, 2.0",
        ),
        (
            "normalized",
            lambda: gymnasium.wrappers.NormalizeReward(gymnasium.make("Pendulum-v1")),
            'wrappers ["NormalizeReward"]',
        ),
    ],
)
def test_what_the_id_alone_would_lose_is_named(name, make, words, folder, capsys):
    record(make(), f"odd/{name}-v0")
    assert words in refusal(capsys, tool.main, tool.Args(f"odd/{name}-v0"))
    assert not list(folder.glob(f"data/*{name}*"))


def test_env_id_takes_the_data_for_another_environment(folder, capsys):
    record(gymnasium.make("Pendulum-v1", g=5.0), "odd/moon-v0")
    tool.main(tool.Args("odd/moon-v0", env_id="Pendulum-v1"))
    assert "--env-id Pendulum-v1 --dataset-dir data/odd-moon-v0" in capsys.readouterr().out
    sentence = refusal(capsys, tool.main, tool.Args("odd/moon-v0", env_id=PENDULUM))
    assert "observation_space" in sentence


def test_an_unknown_id_lists_what_is_there(folder, capsys):
    record(gymnasium.make("Pendulum-v1"), "known/pendulum-v0")
    for name in ("known/pendulm-v0", "pendulum"):
        assert "known/pendulum-v0" in refusal(capsys, tool.main, tool.Args(name))


def test_a_folder_with_other_data_is_left_alone(folder, capsys):
    record(gymnasium.make("Pendulum-v1"), "second/pendulum-v0")
    (folder / "full").mkdir()
    np.savez(folder / "full/first.npz", rewards=[1])
    args = tool.Args("second/pendulum-v0", out_dir=folder / "full")
    assert "first.npz" in refusal(capsys, tool.main, args)
    assert [path.name for path in folder.glob("full/*")] == ["first.npz"]
