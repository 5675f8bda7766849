"""qam_offline_to_online.py: its replay buffer, its transitions, and runs through both phases."""

import json
import shutil
import subprocess
import sys

import jax
import mujoco
import numpy as np
import pytest
from conftest import DOMAIN, ROOT, command, folder_of, read_rows, read_states, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from refusals import parse, refusal

import qam_offline_to_online as qam

SCRIPT = "qam_offline_to_online.py"
TASK = f"{DOMAIN}-task4"
KEY = jax.random.key(0)

# ------------------------------------------------------------------------------------ the buffer

HORIZON = 3
NUM_DATA = 7
CAPACITY = 30


def rows_of(first, episode, count, ended):
    """Rows first, first + 1, .. of an episode. An observation is (episode, row)."""
    rows = np.arange(first, first + count, dtype=np.float32)
    ones = np.ones(count, np.float32)
    ends = np.zeros(count, np.float32)
    ends[-1] = ended
    return qam.Dataset(
        observations=np.stack([episode * ones, rows], axis=1),
        actions=rows[:, None],
        rewards=ones,
        masks=ones,
        terminals=ends,
        next_observations=np.stack([episode * ones, rows + 1], axis=1),
    )


def buffer_of_data():
    """Two episodes of data, and empty rows."""
    parts = [
        rows_of(0, episode=1, count=4, ended=True),
        rows_of(4, episode=2, count=3, ended=True),
        rows_of(0, episode=0, count=CAPACITY, ended=False),
    ]
    return jax.device_put(jax.tree.map(lambda *columns: np.concatenate(columns), *parts))


def check_chunks(buffer, starts, num_rows):
    """Each is cut where its episode ends, and before the last row that is written."""
    batch = qam.gather_chunks(buffer, starts, HORIZON, 1.0)
    episode, row = batch.observations.T
    last_episode, row_after_last = batch.next_observations.T
    assert_array_equal(row, starts)
    assert_array_equal(last_episode, episode)
    assert row_after_last.max() <= num_rows
    length = row_after_last - row
    assert_array_equal(batch.rewards, length)
    assert_array_equal(batch.valid, length == HORIZON)


PIECES = st.lists(st.tuples(st.integers(1, HORIZON), st.booleans()), min_size=1, max_size=10)


@settings(max_examples=30, deadline=None)
@given(PIECES, st.integers(0, 2**31 - 1))
def test_every_sampled_chunk_is_a_piece_of_one_episode(pieces, seed):
    """Random episodes, written piece by piece; samples after each piece."""
    buffer = buffer_of_data()
    num_online = 0
    episode = 3
    for count, ended in pieces:
        position = NUM_DATA + num_online
        rows = rows_of(position, episode, count, ended)
        buffer = qam.add_transitions(buffer, rows, position)
        num_online += count
        episode += ended
        for balanced in (False, True):
            args = qam.Args(batch_size=64, horizon=HORIZON, balanced_sampling=balanced)
            starts = qam.sample_starts(args, jax.random.key(seed), NUM_DATA, num_online)
            check_chunks(buffer, starts, NUM_DATA + num_online)


def sampled(balanced, num_online):
    args = qam.Args(batch_size=4001, horizon=HORIZON, balanced_sampling=balanced)
    return qam.sample_starts(args, KEY, 20, num_online).tolist()


def test_samples_come_from_everywhere():
    assert set(sampled(False, 9)) == {*range(20 + 9 - HORIZON + 1)}
    assert set(sampled(False, 0)) == {*range(20 - HORIZON + 1)}


def test_balanced_samples_are_half_online():
    starts = sampled(True, 9)
    assert set(starts[:2000]) == {*range(20, 20 + 9 - HORIZON + 1)}
    assert set(starts[2000:]) == {*range(20 - HORIZON + 1)}
    # Fewer online rows than a chunk has.
    assert set(sampled(True, HORIZON - 1)) == {*range(20 - HORIZON + 1)}


# --------------------------------------------------------------------------------- transitions


def set_state(env, data, row):
    """Put an OGBench environment into the state of a row of a dataset file."""
    env = env.unwrapped
    qpos = data["qpos"][row].astype(float)
    qvel = data["qvel"][row].astype(float)
    if not hasattr(env, "_data"):  # a maze
        env.set_state(qpos, qvel)
        return
    env._data.qpos[:] = qpos
    env._data.qvel[:] = qvel
    if "button_states" in data:
        env._cur_button_states[:] = data["button_states"][row]
        env._apply_button_states()
    mujoco.mj_forward(env._model, env._data)
    env.pre_step()
    env.post_step()


def put_cubes_on_their_targets(args, data):
    """One in the first 20 rows, both in the last ten of them: such states are rare."""
    env = qam.make_env(args)
    env.reset(seed=0)
    first, second = env.unwrapped._data.mocap_pos
    data["qpos"][:20, 14:17] = first
    data["qpos"][10:20, 21:24] = second


def some_rows(dataset):
    """Some of every reward, and some that solve the task."""
    chosen = set()
    shuffled = np.random.default_rng(0).permutation(len(dataset.rewards))
    for reward in np.unique(dataset.rewards):
        of_reward = shuffled[dataset.rewards[shuffled] == reward]
        chosen.update(of_reward[:15].tolist())
    solved = np.flatnonzero(dataset.masks == 0)
    chosen.update(solved[:15].tolist())
    return chosen


@pytest.fixture(scope="module")
def path_of(dataset_dir, tmp_path_factory):
    """path_of(args): a collected dataset of the domain, in which the task is solved at times."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(dataset_dir / f"{DOMAIN}-v0.npz", folder)

    def path_of(args):
        domain, _, name = qam.parse_env_id(args.env_id)
        path = folder / f"{name}.npz"
        if path.exists():
            return path
        tool = ROOT / "tools/collect_dataset.py"
        line = [sys.executable, tool, domain, "--episodes", "1", "--out-dir", folder]
        subprocess.run(line, check=True, capture_output=True)
        if domain.startswith("cube-double"):
            data = dict(np.load(path))
            put_cubes_on_their_targets(args, data)
            np.savez(path, **data)
        return path

    return path_of


@pytest.mark.parametrize(
    "env_id, sparse",
    [
        (TASK, False),
        (TASK, True),
        pytest.param("scene-play-task1", True, marks=pytest.mark.slow),
        pytest.param("cube-double-play-task1", False, marks=pytest.mark.slow),
    ],
)
def test_online_rewards_and_masks_are_those_of_the_relabelled_data(env_id, sparse, path_of):
    """The same states, through load_dataset and through the environment."""
    args = qam.Args(env_id=env_id, horizon=1, sparse=sparse)
    env = qam.ChunkedEpisode(qam.make_env(args))
    path = path_of(args)
    data = dict(np.load(path))
    dataset = qam.load_dataset(args, path, qam.make_env(args))
    # A file's last row of an episode is no transition.
    rows = np.flatnonzero(~data["terminals"])
    for i in some_rows(dataset):
        env.reset(seed=i)
        set_state(env, data, rows[i])
        played, ended = qam.play(args, env, dataset.observations[i], dataset.actions[i : i + 1])
        assert played.rewards == dataset.rewards[i]
        assert played.masks == dataset.masks[i]
        assert ended == (dataset.masks[i] == 0)
        assert_array_equal(played.actions[0], dataset.actions[i])
    assert len(np.unique(dataset.rewards)) > 1 or sparse
    assert 0 in dataset.masks or env_id.startswith("scene")


def test_time_limit_ends_the_chunk_and_keeps_the_bootstrap():
    args = qam.Args(env_id=TASK, horizon=4)
    env = qam.ChunkedEpisode(qam.make_env(args))
    observation, _ = env.reset(seed=0)
    for _ in range(333):
        rows, ended = qam.play(args, env, observation, np.zeros((3, 2)))
        assert len(rows.rewards) == 3
        assert not ended
        observation = rows.next_observations[-1]
    rows, ended = qam.play(args, env, observation, np.zeros((3, 2)))
    assert ended
    assert (rows.terminals.tolist(), rows.masks.tolist()) == ([1.0], [1.0])
    assert env.scores.tolist() == [0.0, -1000.0, 1000.0]


# -------------------------------------------------------------------------------------- real runs

FLAGS = (
    "--online-steps 1500 --start-training 40 --eval-every 500 --log-every 100 "
    "--checkpoint-minutes 1"
).split()


@pytest.fixture(scope="module")
def both_phases(dataset_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("online")
    done = run(SCRIPT, dataset_dir, run_dir, *FLAGS)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


def test_evaluations_and_metrics_of_both_phases(both_phases):
    evals = read_rows(both_phases / "eval.csv")
    marks = [(row["step"], row["phase"]) for row in evals]
    online = [(step, "online") for step in ("500", "1000", "1500", "1560")]
    assert marks == [("60", "offline"), *online]
    metrics = read_rows(both_phases / "metrics.csv")
    assert [row["step"] for row in metrics] == [str(step) for step in range(200, 1501, 100)]
    numbers = [float(value) for row in metrics for value in row.values()]
    assert np.isfinite(numbers).all()
    (episode,) = read_rows(both_phases / "episodes.csv")
    scores = (episode["step"], episode["success"], episode["return"], episode["length"])
    assert scores == ("1060", "0.0", "-1000.0", "1000.0")


def test_states_after_both_phases(both_phases):
    """An update per environment step from step 40 on, by the chunk; every step in the buffer."""
    states = read_states(both_phases)
    called_for = 60 + 1500 - 40
    assert called_for - 2 * 4 <= states["step"] <= called_for
    online = qam.Dataset(**states["online"])
    assert len(online.rewards) == 1500
    assert np.flatnonzero(online.terminals).tolist() == [999, 1499]
    assert (online.masks == 1).all()
    assert np.abs(online.actions).max() < 1
    goes_on = np.flatnonzero(online.terminals[:-1] == 0)
    assert_array_equal(online.next_observations[goes_on], online.observations[goes_on + 1])


def test_from_an_offline_checkpoint_it_ends_as_with_its_own_offline_phase(
    both_phases, finished_run, tmp_path
):
    line = [sys.executable, ROOT / SCRIPT, "--offline-checkpoint", finished_run]
    line += ["--run-dir", tmp_path, *FLAGS]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    jax.tree.map(assert_array_equal, read_states(folder), read_states(both_phases))
    steps = [row["step"] for row in read_rows(folder / "eval.csv")]
    assert steps == ["60", "500", "1000", "1500", "1560"]


def test_offline_checkpoint_that_does_not_fit(finished_run, tmp_path, capsys):
    source = str(finished_run)
    flags = ("--offline-checkpoint", source)
    assert "has tau" in refusal(capsys, parse, qam, *flags, "--tau", "0.1")
    args = parse(qam, *flags, "--seed", "5")
    assert "no seed 5" in refusal(capsys, qam.restore_run, args, None, source)
    # It would be overwritten by a run of one seed, which the offline script can't go on with.
    assert "give it to --offline-checkpoint" in refusal(capsys, parse, qam, "--resume", source)


def test_offline_checkpoint_of_an_unfinished_run(finished_run, dataset_dir, tmp_path):
    source = shutil.copytree(finished_run, tmp_path / "source")
    saved = json.loads((source / "args.json").read_text())
    saved["offline_steps"] = 90
    (source / "args.json").write_text(json.dumps(saved))
    line = [sys.executable, ROOT / SCRIPT, "--offline-checkpoint", source]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "finish that run first, now at 60" in done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--online-steps 0", "--online-steps must be positive"),
        ("--offline-steps -1", "--offline-steps must be positive"),
        ("--utd-ratio 0", "--utd-ratio must be positive"),
        ("--start-training -1", "--start-training must be positive"),
        ("--offline-checkpoint /nowhere", "/nowhere"),
    ],
)
def test_bad_flags_are_named(flags, words, capsys):
    assert words in refusal(capsys, parse, qam, *flags.split())


def test_several_seeds_are_refused(dataset_dir, tmp_path):
    line = command(SCRIPT, dataset_dir, tmp_path, "--num-seeds", "2")
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--num-seeds must be 1" in done.stderr
