"""Kill a run again and again, resume it each time, and compare it with one that nobody killed.

    python dev/kill_runs.py                             qam_offline.py, 20 kills, a small maze
    python dev/kill_runs.py baselines/NAME.py --kills 5 --horizon 1
    python dev/kill_runs.py qam_offline_to_online.py --online-steps 2000 --start-training 500

What is no flag of this program is one of the script's. Each kill (SIGKILL) comes at a random moment
between the start of training and the end. A run killed before its first checkpoint is started anew.
In the end all parameters, targets and optimizer states must be equal to the bit, and the CSV files
row by row, but for columns that measure time. Exit status: 0 if they are, 1 if not.

A kill in an online phase cuts the episode that was running, so what follows is another run. Asked
for is then that every saved transition is still there in the end, to the bit.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax
import numpy as np
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "pointmaze-medium-navigate"
TINY = (
    f"--env-id {DOMAIN}-task4 --hidden-dims 16 16 --num-critics 2 --horizon 4 "
    "--batch-size 32 --eval-episodes 4 --eval-envs 2 --offline-steps 6000 --log-every 50 "
    "--eval-every 500 --checkpoint-minutes 0"
).split()
TIMED = ("wall_seconds", "updates_per_second")  # columns that depend on the clock


def read_states(folder):
    """{path in the checkpoint: array}; empty where there is no checkpoint yet."""
    path = Path(f"{folder}/checkpoint.msgpack")
    if not path.exists():
        return {}
    states = flax.serialization.msgpack_restore(path.read_bytes())["states"]
    return flatten_dict(states, sep="/")


def read_rows(path):
    """Rows of a CSV file without what depends on the clock."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in TIMED:
            row.pop(name, None)
    return rows


def differences(whole, cut):
    """Sentences about what should be the same in two run folders, and is not."""
    found = []
    expected = read_states(whole)
    states = read_states(cut)
    for name in sorted(expected.keys() | states.keys()):
        pair = [np.asarray(side.get(name, np.nan)) for side in (expected, states)]
        if pair[0].shape != pair[1].shape or pair[0].tobytes() != pair[1].tobytes():
            found.append(f"{name} in the checkpoints")
    for name in ("metrics.csv", "eval.csv"):
        if read_rows(whole / name) != read_rows(cut / name):
            found.append(name)
    return found


def lost_transitions(saved, cut):
    """Names of the online columns of a checkpoint, `saved`, that the end does not begin with."""
    end = read_states(cut)
    lost = []
    for name, column in saved.items():
        if name.startswith("online/") and end[name][: len(column)].tobytes() != column.tobytes():
            lost.append(name)
    return lost


def start(line, log):
    """The process, in a group of its own, when it trains: its folder's metrics.csv is written."""
    with open(log, "a") as file:
        return subprocess.Popen(
            [str(word) for word in line], stdout=file, stderr=file, start_new_session=True
        )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)  # and its environments
    process.wait()


def run_with_kills(line, script, runs, log, kills, seconds, rng):
    """Run to the end with so many kills: (its folder, the states saved at each kill online)."""
    resumed = line
    saved = []
    folder = None
    for i in range(kills):
        process = start(resumed, log)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            kill(process)
        else:
            break  # it came through
        folders = sorted(runs.glob("*"))
        states = read_states(folders[-1]) if folders else {}
        print(f"kill {i + 1}: checkpoint {states.get('step', 'none yet')}", flush=True)
        if states:
            folder = folders[-1]
            resumed = [sys.executable, script, "--resume", folder]
            if len(states.get("online/rewards", ())) > 0:
                saved.append(states)
    process = start(resumed, log)
    if process.wait() != 0:
        sys.exit(f"error: a run ended with status {process.returncode}; see {log}")
    return folder or sorted(runs.glob("*"))[-1], saved


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", nargs="?", type=Path, default=ROOT / "qam_offline.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, flags = parser.parse_known_args()
    scratch = Path(tempfile.mkdtemp(prefix="kill_runs_"))
    log = scratch / "output.log"
    if "--dataset-dir" not in flags:
        tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN, "--episodes", "3"]
        line = [*tool, "--out-dir", scratch / "data"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        flags = ["--dataset-dir", scratch / "data", *flags]
    line = [sys.executable, options.script, *TINY, *flags]

    started = time.perf_counter()
    process = start([*line, "--run-dir", scratch / "whole"], log)
    if process.wait() != 0:
        sys.exit(f"error: the run by itself ends with status {process.returncode}; see {log}")
    seconds = time.perf_counter() - started
    (whole,) = (scratch / "whole").iterdir()
    runs = scratch / "cut"
    rng = random.Random(options.seed)
    arguments = ([*line, "--run-dir", runs], options.script, runs, log, options.kills, seconds, rng)
    cut, saved = run_with_kills(*arguments)
    wrong = [name for states in saved for name in lost_transitions(states, cut)]
    if not saved:
        wrong = differences(whole, cut)
    right = "nothing saved was lost" if saved else "the same to the bit"
    print(f"{options.script.name}: {', '.join(wrong) or right} (see {scratch})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
