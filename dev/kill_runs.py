"""Kill a run again and again, resume it each time, and compare it with one that nobody killed.

    python dev/kill_runs.py                             qam_offline.py, 20 kills, a small maze
    python dev/kill_runs.py baselines/NAME.py --kills 5 --horizon 1
    python dev/kill_runs.py qam_offline_to_online.py --offline-steps 2000 --online-steps 4000
        --start-training 500

What is no flag of this program is one of the script's. Half of the kills (SIGKILL) come after a
random time, half at the moment when a file is being written: a checkpoint, metrics.csv, eval.csv or
args.json. A run that is killed before its first checkpoint is started anew; one that is through
before enough kills is compared, and the kills go on with the next. In the end all parameters,
targets and optimizer states must be equal to the bit, and the CSV files row by row, but for columns
that measure time. Exit status: 0 if they are, 1 if not.

A kill in an online phase cuts the episode that was running, so what follows is another run. Asked
for are then: each checkpoint's online transitions are still there in the end, to the bit, the CSV
files are the same up to the first of these kills and have the same steps after it, and environment
steps and updates are as many as without a kill.
"""

import argparse
import csv
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "pointmaze-medium-navigate"
TINY = (
    f"--env-id {DOMAIN}-task4 --hidden-dims 16 16 --num-critics 2 --horizon 4 --flow-steps 3 "
    "--batch-size 32 --eval-episodes 4 --eval-envs 2 --offline-steps 6000 --log-every 50 "
    "--eval-every 500 --checkpoint-every 100"
).split()
# The files that a kill waits for; checkpoints are written most often.
EVENTS = ["checkpoint.msgpack", "checkpoint.msgpack", "metrics.csv", "eval.csv", "args.json"]
MOST_WRITINGS = {"checkpoint.msgpack": 12, "metrics.csv": 12, "eval.csv": 3, "args.json": 1}
TIMED = ("wall_seconds", "updates_per_second")  # columns that depend on the clock


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------ what a run has left


def load_script(path: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def read_states(script, folder: Path | None) -> dict[str, np.ndarray] | None:
    """{path in the checkpoint: array}, or None where there is no checkpoint yet."""
    if folder is None or not (folder / "checkpoint.msgpack").exists():
        return None
    return flatten_dict(script.load_checkpoint(folder)["states"], sep="/")


def online_part(states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The online transitions of a checkpoint, by field."""
    fields = {}
    for name, array in states.items():
        if name.startswith("online/"):
            fields[name.removeprefix("online/")] = array
    return fields


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV file without what depends on the clock."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            rows.append({name: value for name, value in row.items() if name not in TIMED})
    return rows


# ------------------------------------------------------------------------------- the comparison


def same_array(a: np.ndarray, b: np.ndarray) -> bool:
    """To the bit: nan equals nan, and 0 does not equal -0."""
    same_form = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_form and a.tobytes() == b.tobytes()


def compare_states(whole: dict, cut: dict, killed_online: bool) -> list[str]:
    """Sentences about what differs between the checkpoints of two runs."""
    found = []
    only_one = sorted(whole.keys() ^ cut.keys())
    if only_one:
        found.append(f"states: {only_one[:3]} are in one of them only")
    names = whole.keys() & cut.keys()
    if killed_online:
        names = {"step"}
        lengths = [len(online_part(states)["rewards"]) for states in (whole, cut)]
        if lengths[0] != lengths[1]:
            found.append(f"{lengths[0]} and {lengths[1]} online transitions")
    other = [name for name in sorted(names) if not same_array(whole[name], cut[name])]
    if other:
        found.append(f"states: {len(other)} of {len(whole)} arrays differ, such as {other[0]}")
    return found


def compare_online(cut: dict, kept: list) -> list[str]:
    """Sentences about online transitions that a checkpoint had and the end has not."""
    found = []
    end = online_part(cut)
    for step, online in kept:
        lost = []
        for field, values in online.items():
            if not same_array(values, end[field][: len(values)]):
                lost.append(field)
        if lost:
            found.append(f"the online transitions of step {step} have other {lost}")
    return found


def row_label(row: dict) -> tuple:
    return row["step"], row["seed"], row.get("phase")


def compare_rows(whole: Path, cut: Path, name: str, until: float) -> list[str]:
    """Sentences about what differs in a CSV file of two runs; values count up to step `until`."""
    found = []
    rows = {folder: read_rows(folder / name) for folder in (whole, cut)}
    labels = {folder: [row_label(row) for row in rows[folder]] for folder in rows}
    for folder in rows:
        steps = len(set(labels[folder]))
        if steps == 0 or steps < len(labels[folder]):
            found.append(f"{folder / name} has {len(labels[folder])} rows for {steps} steps")
    if labels[whole] != labels[cut]:
        other = sorted(set(labels[whole]) ^ set(labels[cut]), key=str)
        return [*found, f"{name}: {other[:3]} are in one of them only"]
    for first, second in zip(rows[whole], rows[cut], strict=True):
        if int(first["step"]) <= until and first != second:
            return [*found, f"{name}: a row differs: {first} and {second}"]
    return found


def compare_runs(script, whole: Path, cut: Path, kept: list) -> list[str]:
    """Sentences about all that should be the same in two run folders, and is not.

    kept: (step, online transitions by field) of the checkpoint at each kill in an online phase.
    """
    states = {folder: read_states(script, folder) for folder in (whole, cut)}
    for folder in states:
        if states[folder] is None:
            return [f"{folder} holds no checkpoint"]
    found = compare_states(states[whole], states[cut], killed_online=bool(kept))
    found += compare_online(states[cut], kept)
    until = min([step for step, _ in kept], default=float("inf"))
    for name in ("metrics.csv", "eval.csv"):
        found += compare_rows(whole, cut, name, until)
    return found


# ------------------------------------------------------------------------------------ one training


class Run:
    """One training, started and resumed as often as need be."""

    def __init__(self, line: list, script_path: Path, runs: Path, log: Path):
        self.line = line  # the command that begins it
        self.script_path = script_path
        self.runs = runs  # where it makes its folder
        self.log = log  # what it prints
        self.folder = None
        self.starts_anew = 0
        self.kept = []  # see compare_runs

    def start(self, script) -> subprocess.Popen:
        """A process that begins the run, or goes on with it from its last checkpoint."""
        if read_states(script, self.folder) is None:
            self.starts_anew += self.folder is not None
            self.others = set(self.runs.iterdir())
            self.folder = None
            self.kept = []
            line = [*self.line, "--run-dir", self.runs]
        else:
            line = [sys.executable, self.script_path, "--resume", self.folder]
        self.parts_before = {name: self.part_time(name) for name in EVENTS}
        with open(self.log, "a") as file:
            return subprocess.Popen(
                [str(word) for word in line], stdout=file, stderr=file, start_new_session=True
            )

    def find_folder(self) -> Path | None:
        """Learn the folder's name as soon as it is there."""
        if self.folder is None:
            for path in self.runs.iterdir():
                if path not in self.others:
                    self.folder = path
        return self.folder

    def part_time(self, name: str) -> int | None:
        """When a file was last half-written: it is there under this name until it is whole."""
        try:
            return os.stat(f"{self.folder}/{name}.part").st_mtime_ns
        except OSError:
            return None

    def start_time(self) -> int | None:
        """When args.json was written, as it is each time the run starts."""
        try:
            return os.stat(f"{self.folder}/args.json").st_mtime_ns
        except OSError:
            return None

    def keep_online(self, states: dict | None) -> int:
        """Remember the online transitions of a checkpoint; how many they are."""
        online = online_part(states or {})
        if not online:
            return 0
        offline_steps = json.loads((self.folder / "args.json").read_text())["offline_steps"]
        count = len(online["rewards"])
        self.kept.append((offline_steps + count, online))
        return count

    def describe(self, script) -> str:
        """What is there after a kill."""
        states = read_states(script, self.folder)
        words = "no checkpoint"
        if states is not None:
            words = f"checkpoint {int(states['step'].flat[0])}"
        count = self.keep_online(states)
        if count:
            words += f" with {count} online transitions"
        for name in ("metrics.csv", "eval.csv"):
            rows = read_rows(Path(f"{self.folder}/{name}"))
            last = rows[-1]["step"] if rows else 0
            words += f", {name} to {last}"
        for name in sorted(set(EVENTS)):
            if self.part_time(name) not in (None, self.parts_before[name]):
                words += f"; {name} half-written"
        return words


# ------------------------------------------------------------------------------------------ kills


def wait_for_start(run: Run, process: subprocess.Popen, before: int | None) -> None:
    """Until args.json is written, which is when a run is ready to train."""
    while process.poll() is None:
        run.find_folder()
        if run.start_time() != before:
            return
        time.sleep(0.002)


def wait_for_writing(run: Run, process: subprocess.Popen, name: str, times: int) -> None:
    """Until a file is being written for the `times`-th time."""
    last = run.parts_before[name]
    while process.poll() is None:
        run.find_folder()
        now = run.part_time(name)
        if now is not None and now != last:
            last = now
            times -= 1
            if times == 0:
                return
        time.sleep(0.0001)


def kill_at_random(run: Run, process, rng: random.Random, delays: tuple, event: str | None):
    """Kill the process at a random moment: words for it, or None if it was through before.

    The moment is a delay between the two `delays` after the start, or when a file is being written.
    """
    before = run.start_time()
    if event is None:
        delay = rng.uniform(*delays)
        words = f"{delay:.2f} s after the start"
        wait_for_start(run, process, before)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            pass
    else:
        times = rng.randint(1, MOST_WRITINGS[event])
        words = f"while writing {event}, time {times}"
        wait_for_writing(run, process, event, times)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    try:
        # Its environments would end by themselves, a little later.
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    run.find_folder()
    return words


def run_whole(run: Run, script) -> tuple[float, float]:
    """Let a run finish: the seconds from its start to its first metrics, and to its end."""
    process = run.start(script)
    wait_for_start(run, process, None)
    started = time.perf_counter()
    compiled = None
    while process.poll() is None:
        if compiled is None and (run.folder / "metrics.csv").exists():
            compiled = time.perf_counter() - started
        time.sleep(0.01)
    if process.returncode or compiled is None:
        fail(f"the run by itself fails; its output is in {run.log}")
    return compiled, time.perf_counter() - started


def run_with_kills(new_run, script, rng, delays, events, whole: Path) -> list[str]:
    """Kill as often as there are events, then compare: sentences about what differs."""
    started = time.perf_counter()
    run = new_run()
    kills = 0
    starts_anew = 0
    compared = 0
    wrong = []
    while not wrong:
        process = run.start(script)
        words = None
        if kills < len(events):
            words = kill_at_random(run, process, rng, delays, events[kills])
        else:
            process.wait()
        if words is not None:
            kills += 1
            print(f"kill {kills:2d} {words}: {run.describe(script)}", flush=True)
            continue
        if process.returncode:
            wrong = [f"a run ended with status {process.returncode}; its output is in {run.log}"]
            break
        wrong = compare_runs(script, whole, run.find_folder(), run.kept)
        compared += 1
        starts_anew += run.starts_anew
        same = f"{len(run.kept)} online, nothing lost" if run.kept else "no difference"
        told = "; ".join(wrong) or same
        print(f"run {compared} is through after {kills} kills: {told}", flush=True)
        if kills == len(events):
            break
        run = new_run()
    seconds = time.perf_counter() - started
    counts = f"{kills} kills, {starts_anew} starts anew, {compared} runs compared"
    print(f"{script.__name__}.py: {counts}, {seconds:.0f} s")
    return wrong


def draw_events(rng: random.Random, kills: int) -> list[str | None]:
    """For each kill the file that it waits for, or None for a moment after the start."""
    events = [None] * kills
    for i in range(1, kills, 2):
        events[i] = EVENTS[i // 2 % len(EVENTS)]
    rng.shuffle(events)
    return events


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """This program's flags, and the script's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s [SCRIPT] [--kills N] [--seed N] [flags for the script]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="how many, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    words = sys.argv[1:]
    script_path = ROOT / "qam_offline.py"
    if words and not words[0].startswith("-"):
        script_path = Path(words.pop(0)).resolve()
    options, flags = parser.parse_known_args(words)
    options.script_path = script_path
    if options.kills < 1 or not script_path.is_file():
        fail(f"--kills must be 1 or more, and {script_path} must exist")
    return options, flags


def main() -> int:
    options, flags = parse_flags()
    script = load_script(options.script_path)
    folder = Path(tempfile.mkdtemp(prefix="kill_runs_"))
    names = {word.split("=")[0] for word in flags}
    if not names & {"--dataset-dir", "--env-id"}:
        tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN, "--episodes", "3"]
        line = [*tool, "--out-dir", folder / "data"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        flags = ["--dataset-dir", folder / "data", *flags]
    tiny = TINY
    if hasattr(script.Args, "diffusion_steps"):
        tiny = [word.replace("flow", "diffusion") for word in TINY]
    line = [sys.executable, options.script_path, *tiny, *flags]
    log = folder / "output.log"
    (folder / "whole").mkdir()
    (folder / "cut").mkdir()

    whole = Run(line, options.script_path, folder / "whole", log)
    compiled, seconds = run_whole(whole, script)
    print(f"uninterrupted: {seconds:.0f} s, first metrics after {compiled:.0f} s", flush=True)
    # So that a kill by time lets the run come some way, and all of them take it through to its end.
    delays = (compiled / 2, compiled + max(2.0, 3 * (seconds - compiled) / options.kills))
    rng = random.Random(options.seed)
    events = draw_events(rng, options.kills)

    def new_run() -> Run:
        return Run(line, options.script_path, folder / "cut", log)

    wrong = run_with_kills(new_run, script, rng, delays, events, whole.folder)
    if wrong:
        print(f"DIFFERENT: {'; '.join(wrong)} (see {folder})")
        return 1
    print("the same to the bit, or, after a kill online, nothing saved was lost")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
