"""Runs that are killed, stopped and resumed, by their command lines alone.

A run that was stopped at any moment ends with the same bits as one that never was.
"""

import shutil
import signal

import numpy as np
import pytest
from conftest import folder_of, read_rows, resume, run
from stopping import (
    BOTH_PHASES,
    add_later_rows,
    assert_same_rows,
    assert_same_states,
    check_stopped,
    go_on,
    has_checkpoint,
    has_learned,
    has_online_rows,
    online_rows,
    start,
    stop,
    wait_for,
)

OFFLINE = "qam_offline.py"
ONLINE = "qam_offline_to_online.py"

# Long enough to be stopped on the way: there are two seconds or more after the first checkpoint.
LONG = "--offline-steps 5000 --log-every 50 --eval-every 1250".split()


@pytest.fixture(scope="module")
def never_stopped(dataset_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("never_stopped")
    done = run(OFFLINE, dataset_dir, run_dir, *LONG)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_ends_as_if_it_had_not_been(never_stopped, dataset_dir, tmp_path, how):
    run_dir = tmp_path / "stopped"
    process = start(OFFLINE, dataset_dir, run_dir, *LONG)
    wait_for(has_learned, run_dir, process)
    printed = stop(process, how, longest_wait=1.0)
    check_stopped(process, how, printed, run_dir)
    stopped = folder_of(run_dir)
    if how == signal.SIGKILL:
        add_later_rows(stopped)
    done = go_on(how, printed, stopped)
    assert done.returncode == 0, done.stderr
    assert_same_states(never_stopped, stopped)
    assert_same_rows(never_stopped, stopped, "metrics.csv", "eval.csv")


def test_stopped_before_the_first_update(finished_run, dataset_dir, tmp_path):
    """By Ctrl-C, which the processes of the evaluation, too, get while they start."""
    run_dir = tmp_path / "stopped"
    process = start(OFFLINE, dataset_dir, run_dir)
    wait_for(has_checkpoint, run_dir, process)
    printed = stop(process, signal.SIGINT, longest_wait=1.0)
    assert process.returncode == 128 + signal.SIGINT  # those processes may print tracebacks
    stopped = folder_of(run_dir)
    assert not has_learned(stopped)
    done = go_on(signal.SIGINT, printed, stopped)
    assert done.returncode == 0, done.stderr
    assert_same_states(finished_run, stopped)


def test_stopped_in_an_evaluation(finished_run, dataset_dir, tmp_path):
    """By Ctrl-C: it is given up, and begins anew when the run is resumed."""
    run_dir = tmp_path / "stopped"
    # The first from after an update comes before the evaluation, which needs a second to begin.
    flags = "--eval-episodes 500 --checkpoint-minutes 60".split()
    process = start(OFFLINE, dataset_dir, run_dir, *flags)
    wait_for(has_learned, run_dir, process)
    printed = stop(process, signal.SIGINT, shortest_wait=1.5, longest_wait=3.0)
    check_stopped(process, signal.SIGINT, printed, run_dir)
    stopped = folder_of(run_dir)
    assert not (stopped / "eval.csv").exists()
    done = resume(stopped, "--eval-episodes", "2")
    assert done.returncode == 0, done.stderr
    assert_same_states(finished_run, stopped)
    assert_same_rows(finished_run, stopped, "metrics.csv", "eval.csv")


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("checkpoint.msgpack", lambda content: content[:-9], "damaged"),
        # What the error holds, here the whole file, is cut short.
        ("checkpoint.msgpack", lambda content: bytes(len(content)), "damaged"),
        ("eval.csv", lambda content: content.replace(b",", b";"), "move it away"),
    ],
)
def test_damaged_file_is_told_in_a_sentence(name, damage, words, finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    done = resume(folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path}")
    assert words in line
    assert len(line) < 1000


def test_another_tau_is_refused(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    done = resume(folder, "--tau", "0.1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "tau" in line


def test_resuming_a_finished_run_changes_nothing(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    assert_same_states(finished_run, folder)
    assert_same_rows(finished_run, folder, "metrics.csv", "eval.csv")


@pytest.mark.parametrize(
    "intervals",
    [
        # An update a dispatch.
        pytest.param("--log-every 1", marks=pytest.mark.slow),
        # All in as few as may be.
        pytest.param(
            "--log-every 1000 --eval-every 1000 --checkpoint-minutes 60", marks=pytest.mark.slow
        ),
        "--log-every 7 --eval-every 23",
    ],
)
def test_intervals_do_not_change_training(finished_run, dataset_dir, tmp_path, intervals):
    done = run(OFFLINE, dataset_dir, tmp_path, *intervals.split())
    assert done.returncode == 0, done.stderr
    assert_same_states(finished_run, folder_of(tmp_path))


@pytest.fixture(scope="module")
def both_phases(dataset_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("both_phases")
    done = run(ONLINE, dataset_dir, run_dir, *BOTH_PHASES)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


@pytest.mark.slow
def test_killed_in_the_offline_phase(both_phases, dataset_dir, tmp_path):
    """Nothing of the online phase is lost, so that this run, too, ends as one never killed."""
    run_dir = tmp_path / "killed"
    process = start(ONLINE, dataset_dir, run_dir, *BOTH_PHASES)
    wait_for(has_learned, run_dir, process)
    stop(process, signal.SIGKILL, longest_wait=0.3)
    assert process.returncode == -signal.SIGKILL
    killed = folder_of(run_dir)
    assert not has_online_rows(killed)
    done = resume(killed)
    assert done.returncode == 0, done.stderr
    assert_same_states(both_phases, killed)
    assert_same_rows(both_phases, killed, "metrics.csv", "eval.csv", "episodes.csv")


def stop_in_first_episode(dataset_dir, run_dir, how):
    """Stop a run in the middle of its first episode online, half of each batch of which is online.

    Returns the run's folder, its saved transitions and what was printed.
    """
    flags = "--offline-steps 0 --balanced-sampling --utd-ratio 2".split()
    process = start(ONLINE, dataset_dir, run_dir, *BOTH_PHASES, *flags)
    wait_for(has_online_rows, run_dir, process)
    printed = stop(process, how)
    check_stopped(process, how, printed, run_dir)
    folder = folder_of(run_dir)
    saved = online_rows(folder)
    assert 0 < len(saved["rewards"]) < 500
    assert not saved["terminals"][:-1].any()
    return folder, saved, printed


def check_online_rows(folder, saved):
    """Every saved step stayed, its episode ended where it was cut, and a new one began."""
    count = len(saved["rewards"])
    online = online_rows(folder)
    assert len(online["rewards"]) == 1500
    for name, array in saved.items():
        np.testing.assert_array_equal(online[name][:count], array)
    assert np.flatnonzero(online["terminals"]).tolist() == [count - 1, count + 999, 1499]
    # The cut episode keeps its bootstrap: its task is not solved.
    assert online["masks"][count - 1] == 1
    # The new one starts where the first one did, within a cell of the maze.
    distance = online["observations"][count] - online["observations"][0]
    assert np.abs(distance).max() < 2
    episode_steps = [int(row["step"]) for row in read_rows(folder / "episodes.csv")]
    assert episode_steps == [count + 1000]
    eval_steps = [int(row["step"]) for row in read_rows(folder / "eval.csv")]
    assert eval_steps == [1000, 1500]


@pytest.mark.slow
def test_stopped_in_the_middle_of_an_episode(dataset_dir, tmp_path):
    stopped, saved, printed = stop_in_first_episode(
        dataset_dir, tmp_path / "stopped", signal.SIGTERM
    )
    done = go_on(signal.SIGTERM, printed, stopped)
    assert done.returncode == 0, done.stderr
    check_online_rows(stopped, saved)


@pytest.mark.slow
def test_killed_in_the_middle_of_an_episode(dataset_dir, tmp_path):
    """What comes after the kill depends on the checkpoint alone."""
    killed, saved, _ = stop_in_first_episode(dataset_dir, tmp_path / "killed", signal.SIGKILL)
    # A killed run may have seen an episode end after its checkpoint. That episode never was.
    row = f"{len(saved['rewards']) + 1},1,0.0,-1000.0,1000.0,1.0\n"
    (killed / "episodes.csv").write_text("step,seed,success,return,length,wall_seconds\n" + row)
    twin = shutil.copytree(killed, tmp_path / "twin")
    for folder in (killed, twin):
        done = resume(folder)
        assert done.returncode == 0, done.stderr
    assert_same_states(killed, twin)
    assert_same_rows(killed, twin, "metrics.csv", "eval.csv", "episodes.csv")
    check_online_rows(killed, saved)


@pytest.mark.slow
def test_intervals_and_overlap_do_not_change_the_online_phase(
    both_phases, dataset_dir, tmp_path, monkeypatch
):
    """Other marks at which a chunk is interrupted, and every dispatch waited for."""
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
    intervals = "--log-every 13 --eval-every 777 --checkpoint-minutes 60".split()
    done = run(ONLINE, dataset_dir, tmp_path, *BOTH_PHASES, *intervals)
    assert done.returncode == 0, done.stderr
    assert_same_states(both_phases, folder_of(tmp_path))
    assert_same_rows(both_phases, folder_of(tmp_path), "episodes.csv")
