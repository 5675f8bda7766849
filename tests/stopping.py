"""How a run is started, stopped and gone on with, and how two runs are compared."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

from conftest import command, folder_of, read_rows, read_states, resume
from flax.traverse_util import flatten_dict

# Pointmaze episodes take 1000 steps: an episode and a half, with the updates of both phases.
BOTH_PHASES = (
    "--offline-steps 2000 --online-steps 1500 --start-training 40 "
    "--log-every 100 --eval-every 1000 --checkpoint-minutes 0.002 --eval-episodes 1 --eval-envs 1"
).split()


def assert_same_states(folder, other_folder):
    """Not one bit differs between the states in the checkpoints of two runs."""
    arrays = flatten_dict(read_states(folder), sep="/")
    other_arrays = flatten_dict(read_states(other_folder), sep="/")
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        other = other_arrays[name]
        assert array.dtype == other.dtype, name
        assert array.shape == other.shape, name
        assert array.tobytes() == other.tobytes(), name


def rows_without_times(path):
    rows = read_rows(path)
    for row in rows:
        row.pop("wall_seconds", None)
        row.pop("updates_per_second", None)
    return rows


def assert_same_rows(folder, other_folder, *names):
    for name in names:
        rows = rows_without_times(folder / name)
        assert rows == rows_without_times(other_folder / name), name


def start(script, dataset_dir, run_dir, *flags):
    """A run in a process group of its own, as a shell would start it."""
    line = command(script, dataset_dir, run_dir, *flags)
    # The progress bar goes to a file: a pipe that nobody reads could fill up.
    with open(run_dir.with_suffix(".stderr"), "w") as errors:
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )


def wait_for(condition, run_dir, process):
    """Until the condition holds for the run's folder."""
    while True:
        for folder in run_dir.glob("*"):
            if condition(folder):
                return
        assert process.poll() is None, run_dir.with_suffix(".stderr").read_text()
        time.sleep(0.01)


def has_checkpoint(folder):
    return (folder / "checkpoint.msgpack").exists()


def has_learned(folder, first_step=0):
    """There is a checkpoint from after the first updates: the one at the start is not meant."""
    return has_checkpoint(folder) and read_states(folder)["step"].max() > first_step


def online_rows(folder):
    """The transitions of the online phase in the checkpoint: arrays by name, none before it."""
    return read_states(folder).get("online", {})


def has_online_rows(folder):
    return has_checkpoint(folder) and len(online_rows(folder).get("rewards", ())) > 0


def stop(process, how, shortest_wait=0.0, longest_wait=0.0):
    """Send the signal after a random while. Returns what the run printed."""
    delay = random.uniform(shortest_wait, longest_wait)
    print(f"signal {how} after {delay:.3f} s")
    time.sleep(delay)
    if how == signal.SIGINT:
        # Ctrl-C reaches the processes of the environments, too.
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    # Until they are gone as well: they hold the pipe open.
    printed, _ = process.communicate(timeout=60)
    return printed


def check_stopped(process, how, printed, run_dir):
    """The exit status, no traceback, and a last line which says how to go on."""
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + how
    assert "Traceback" not in run_dir.with_suffix(".stderr").read_text()
    line = go_on_line(printed)
    assert line[0] == "python"
    assert line[-2:] == ["--resume", str(folder_of(run_dir))]


def go_on_line(printed):
    return shlex.split(re.search("to go on: (.*)", printed)[1])


def go_on(how, printed, folder):
    """Resume as a user would: by the printed command, where there is one."""
    if how == signal.SIGKILL:
        return resume(folder)
    line = [sys.executable, *go_on_line(printed)[1:]]
    return subprocess.run(line, capture_output=True, text=True)


def add_later_rows(folder):
    """What a killed run may have written after its last checkpoint. All of it comes again."""
    for path in folder.glob("*.csv"):
        _, rest = path.read_text().splitlines()[-1].split(",", 1)
        with open(path, "a") as file:
            file.write(f"5000,{rest}\n")
