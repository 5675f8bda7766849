"""qam_offline_to_online.py: its replay buffer, its transitions, and real runs through both phases."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import mujoco
import numpy as np
import pytest
from conftest import DOMAIN, ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import folder_of, rows

import qam_offline_to_online as qam

SCRIPT = "qam_offline_to_online.py"
HORIZON, DATA, CAPACITY = 3, 7, 11  # rows of data; of online steps before the ring begins anew
add, gather = jax.jit(qam.add_transitions), jax.jit(qam.gather_chunks, static_argnums=(2, 3))


def chunk_of_rows(first, ends, masks):
    """Rows first, first + 1, .. as they would be written: the observation is the row's number in time."""
    numbers = np.arange(first, first + HORIZON, dtype=np.float32)
    columns = (numbers[:, None], numbers[:, None], numbers, masks, ends, numbers[:, None] + 0.5)
    return qam.Dataset(*(np.asarray(column, np.float32) for column in columns))


def buffer_of_data():
    """Data: rows -7 .. -1, two episodes."""
    numbers = np.arange(-DATA, 0, dtype=np.float32)
    ends = np.isin(numbers, (-4, -1))
    columns = (numbers[:, None], numbers[:, None], numbers, numbers * 0 + 1, ends, numbers[:, None] + 0.5)
    return qam.make_buffer([qam.Dataset(*(np.asarray(x, np.float32) for x in columns))], {}, CAPACITY)


WRITES = st.lists(st.tuples(st.integers(1, HORIZON), st.sampled_from(["goes on", "cut", "solved"])), max_size=16)


@settings(max_examples=60, deadline=None)
@given(WRITES)
def test_every_chunk_of_the_buffer_is_a_piece_of_one_episode(writes):
    """Random episodes, written piece by piece around the ring; after each piece, every chunk that can be sampled."""
    buffer, num_data = buffer_of_data()
    assert num_data == DATA and len(buffer.rewards) == DATA + CAPACITY
    written, continues = 0, False
    place = {n: n + DATA for n in range(-DATA, 0)}  # number in time -> row
    ends, masks = {n: n in (-4, -1) for n in place}, dict.fromkeys(place, 1.0)
    for count, fate in writes:
        end, mask = np.zeros(HORIZON), np.ones(HORIZON)
        end[count - 1 :], mask[count - 1 :] = fate != "goes on", fate != "solved"  # what lies beyond `count` is dropped
        rows_ = chunk_of_rows(written, end, mask)
        buffer = add(buffer, rows_, count, num_data, written, continues)
        for i in range(count):
            place[written + i], ends[written + i], masks[written + i] = (
                DATA + (written + i) % CAPACITY, bool(end[i]), mask[i],
            )  # fmt: skip
        written, continues = written + count, fate == "goes on"
        held = {row: n for n, row in place.items() if n < 0 or n >= written - CAPACITY}  # row -> number in time
        firsts = np.arange(0, DATA + min(written, CAPACITY) - HORIZON + 1)
        batch = gather(buffer, firsts, HORIZON, 0.5)
        for first, valid, reward, next_, m in zip(
            firsts, batch.valid, batch.rewards, batch.next_observations, batch.masks, strict=True
        ):
            numbers = [held[first]]  # the chunk as it should be cut: up to the episode's end or the write position
            while len(numbers) < HORIZON and not ends[numbers[-1]] and numbers[-1] + 1 != written:
                numbers.append(numbers[-1] + 1)
                assert held[first + len(numbers) - 1] == numbers[-1]  # true of every buffer that is written like this
            assert valid == (len(numbers) == HORIZON)
            assert next_[0] == numbers[-1] + 0.5 and m == min(masks[n] for n in numbers)
            np.testing.assert_allclose(reward, sum(0.5**i * n for i, n in enumerate(numbers)), rtol=1e-6)


def test_rows_are_written_in_place():
    buffer, num_data = buffer_of_data()
    pointers = [array.unsafe_buffer_pointer() for array in buffer]
    write = jax.jit(qam.add_transitions, donate_argnums=0)
    buffer = write(buffer, chunk_of_rows(0, np.zeros(HORIZON), np.ones(HORIZON)), 2, num_data, 0, False)
    assert [array.unsafe_buffer_pointer() for array in buffer] == pointers


def test_samples_come_from_where_they_should():
    plain, balanced = (qam.Args(batch_size=4001, horizon=HORIZON, balanced_sampling=b) for b in (False, True))
    sample = lambda args, online: np.asarray(qam.sample_indices(args, jax.random.key(0), 20, online))
    assert set(sample(plain, 9)) == set(range(20 + 9 - HORIZON + 1))
    np.testing.assert_array_equal(sample(plain, 0), sample(balanced, 0))  # offline
    drawn = sample(balanced, 9)
    assert (drawn >= 20).sum() == 2000 and set(drawn) == {*range(20 - HORIZON + 1), *range(20, 20 + 9 - HORIZON + 1)}
    assert set(sample(balanced, 1)) == {*range(20 - HORIZON + 1), 20}  # fewer online rows than a chunk


def set_state(env, data, row):
    """Put an OGBench environment into the state of a row of a dataset file."""
    env = env.unwrapped
    if hasattr(env, "_data"):  # manipulation
        env._data.qpos[:], env._data.qvel[:] = data["qpos"][row], data["qvel"][row]
        if "button_states" in data:
            env._cur_button_states[:] = data["button_states"][row]
            env._apply_button_states()
        mujoco.mj_forward(env._model, env._data)
        env.pre_step()
        env.post_step()
    else:
        env.set_state(data["qpos"][row].astype(float), data["qvel"][row].astype(float))


@pytest.mark.parametrize("env_id", [f"{DOMAIN}-task4", "scene-play-task1", "cube-double-play-task1"])
@pytest.mark.parametrize("sparse", [False, True])
def test_online_rewards_and_masks_are_those_of_the_relabelled_data(env_id, sparse, dataset_dir, tmp_path_factory):
    """The same states, from collected data: once through load_dataset, once through the environment."""
    name, folder = qam.split_env_id(env_id)[2], dataset_dir
    if DOMAIN not in env_id:
        folder = tmp_path_factory.getbasetemp() / "manipulation"
        if not (folder / f"{name}.npz").exists():
            tool = [sys.executable, ROOT / "tools/collect_dataset.py", name, "--episodes", "1", "--out-dir", folder]
            subprocess.run(tool, check=True, capture_output=True)
    args = qam.Args(env_id=env_id, horizon=1, sparse=sparse)
    env = qam.ChunkedEpisode(qam.split_env_id(env_id)[1], 1)
    data = dict(np.load(folder / f"{name}.npz"))
    if "cube-double" in env_id:  # states in which one cube, and both, are where the task wants them
        env.reset(seed=0)
        data["qpos"][:20, 14:17], data["qpos"][10:20, 21:24] = env.unwrapped._data.mocap_pos
        folder = tmp_path_factory.mktemp("solved")
        np.savez(folder / f"{name}.npz", **data)
    dataset = qam.load_dataset(args, folder / f"{name}.npz", env)
    assert set(np.unique(dataset.rewards)) <= {-1, 0} or not sparse
    kept = np.flatnonzero(~data["terminals"])  # a file's last row of each episode is no transition
    rewards = np.random.default_rng(0).permutation(len(kept))
    chosen = [i for r in np.unique(dataset.rewards) for i in rewards[dataset.rewards[rewards] == r][:15]]
    solved = np.flatnonzero(dataset.masks == 0)[:15]
    for i in {*chosen, *solved}:
        env.reset(seed=int(i))
        set_state(env, data, kept[i])
        transition, count, ended = qam.play(args, env, dataset.observations[i], dataset.actions[i : i + 1])
        assert count == 1 and transition.rewards[0] == dataset.rewards[i], (i, dataset.rewards[i])
        assert transition.masks[0] == dataset.masks[i] and ended == (dataset.masks[i] == 0)
        np.testing.assert_array_equal(transition.actions[0], dataset.actions[i])
    assert len(np.unique(dataset.rewards)) > 1 or sparse
    assert len(solved) or not ("cube" in env_id or DOMAIN in env_id)


def test_time_limit_ends_the_chunk_and_keeps_the_bootstrap():
    env = qam.ChunkedEpisode(qam.split_env_id(f"{DOMAIN}-task4")[1], 4)
    observation, _ = env.reset(seed=0)
    for step in range(0, 1000, 3):
        part, count, ended = qam.play(qam.Args(horizon=4), env, observation, np.zeros((3, 2)))
        observation = part.next_observations[count - 1]
        assert count == (1 if step == 999 else 3) and ended == (step == 999)
    assert part.rewards.shape == (4,) and part.terminals[0] == 1 and part.masks[0] == 1
    assert env.scores["length"] == 1000


ONLINE = "--online-steps 1500 --start-training 40 --eval-every 500 --log-every 100".split()


def run(dataset_dir, run_dir, *flags, **variables):
    line = command(SCRIPT, dataset_dir, run_dir, *ONLINE, *flags)
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


@pytest.fixture(scope="module")
def both_phases(dataset_dir, tmp_path_factory):
    return run(dataset_dir, tmp_path_factory.mktemp("online"))


def states_of(folder):
    return qam.load_checkpoint(folder)["states"]


def test_run_through_both_phases(both_phases):
    evals, metrics = (rows(both_phases / f"{name}.csv") for name in ("eval", "metrics"))
    marks = [(int(row["step"]), row["phase"]) for row in evals]
    assert marks == [(60, "offline"), *((step, "online") for step in (500, 1000, 1500, 1560))]
    assert [int(row["step"]) for row in metrics] == list(range(100, 1501, 100))
    assert all(np.isfinite(float(number)) for row in metrics for number in row.values())
    (episode,) = rows(both_phases / "episodes.csv")
    assert (episode["step"], episode["length"], episode["return"], episode["success"]) == (
        "1060",
        "1000",
        "-1000.0",
        "0.0",
    )
    states = states_of(both_phases)
    assert states["step"] == 60 + 1500 - 40  # an update a step, from step 40 on
    online = qam.Dataset(**states["online"])
    assert len(online.rewards) == 1500 and np.flatnonzero(online.terminals).tolist() == [999, 1499]
    assert (online.masks == 1).all() and np.abs(online.actions).max() < 1
    same_episode = np.flatnonzero(online.terminals[:-1] == 0)
    np.testing.assert_array_equal(online.next_observations[same_episode], online.observations[same_episode + 1])
    line = [sys.executable, ROOT / SCRIPT, "--eval-only", both_phases, "--eval-envs", "1"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0 and "step 1560  seed 1  phase online  success_rate" in done.stdout, done.stderr


def test_overlap_changes_nothing(both_phases, dataset_dir, tmp_path):
    """The same run with every dispatch waited for, and with other marks at which a chunk is interrupted."""
    other = "--eval-every 333 --log-every 7 --checkpoint-every 91".split()
    folder = run(dataset_dir, tmp_path, *other, JAX_CPU_ENABLE_ASYNC_DISPATCH="false")
    jax.tree.map(np.testing.assert_array_equal, states_of(both_phases), states_of(folder))


def test_offline_phase_is_qam_offline(both_phases, dataset_dir, tmp_path):
    """From a finished run of qam_offline.py: the same in the end as with an offline phase of its own."""
    line = command("qam_offline.py", dataset_dir, tmp_path / "offline", "--eval-every", "60")
    assert subprocess.run(line, capture_output=True).returncode == 0
    source = folder_of(tmp_path / "offline")
    folder = run(dataset_dir, tmp_path / "online", "--offline-checkpoint", str(source))
    jax.tree.map(np.testing.assert_array_equal, states_of(both_phases), states_of(folder))
    assert [row["step"] for row in rows(folder / "eval.csv")] == ["60", "500", "1000", "1500", "1560"]
    line = command(SCRIPT, dataset_dir, tmp_path, "--offline-checkpoint", str(source), "--tau", "0.1", "--seed", "5")
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "--seed 1" in done.stderr and "--tau 0.005" in done.stderr
    unfinished = json.loads((source / "args.json").read_text()) | {"offline_steps": 90}
    (source / "args.json").write_text(json.dumps(unfinished))
    line = command(SCRIPT, dataset_dir, tmp_path, "--offline-checkpoint", str(source))
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "finish that run, now at update 60" in done.stderr
    assert "Traceback" not in done.stderr


def test_killed_online_it_loses_no_step_that_was_saved(dataset_dir, tmp_path):
    """kill -9 in the middle of an episode: its steps stay, it ends where it was cut, and a new one begins."""
    flags = "--offline-steps 0 --checkpoint-every 100 --balanced-sampling --utd-ratio 2".split()
    line = command(SCRIPT, dataset_dir, tmp_path / "cut", *ONLINE, *flags)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "cut").glob("*/checkpoint.previous.msgpack")):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    cut = folder_of(tmp_path / "cut")
    saved = states_of(cut)["online"]
    count = len(saved["rewards"])
    assert count % 100 == 0 and 0 < count < 1000
    (cut / "episodes.csv").write_text("step,seed\n77,1\n")  # an episode that ended after the checkpoint
    twin = shutil.copytree(cut, tmp_path / "twin")
    for folder in (cut, twin):
        line = [sys.executable, ROOT / SCRIPT, "--resume", folder, "--dataset-dir", dataset_dir]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    jax.tree.map(np.testing.assert_array_equal, states_of(cut), states_of(twin))
    states = states_of(cut)
    assert states["step"] == 2 * (1500 - 40)
    for name, array in saved.items():
        np.testing.assert_array_equal(states["online"][name][:count], array)
    ends = np.flatnonzero(states["online"]["terminals"])
    assert ends.tolist() == [count - 1, count + 999, 1499][: 3 if count < 500 else 2]
    assert [int(row["step"]) for row in rows(cut / "episodes.csv")] == [end + 1 for end in ends if end - count == 999]
    start = states["online"]["observations"][[0, count]]
    assert np.abs(start[0] - start[1]).max() < 2 and saved["terminals"][-1] == 1  # near the maze's start again
    assert [row["step"] for row in rows(cut / "eval.csv")] == ["500", "1000", "1500"]


def test_bad_flags_end_in_one_sentence(tmp_path, capsys):
    for args, words in (
        (dict(num_seeds=2), "--num-seeds"),
        (dict(online_steps=0), "--online-steps"),
        (dict(offline_steps=-1), "--offline-steps"),
        (dict(utd_ratio=0), "--utd-ratio"),
        (dict(offline_checkpoint=str(tmp_path)), "--offline-checkpoint"),
    ):
        with pytest.raises(SystemExit) as stopped:
            qam.main(qam.Args(env_id=f"{DOMAIN}-task4", **args))
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1
