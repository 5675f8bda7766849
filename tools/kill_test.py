"""Kill a run again and again, resume it each time, and compare it with one that nobody killed.

    python tools/kill_test.py                                              qam_offline.py, 20 kills, a small maze
    python tools/kill_test.py baselines/NAME.py --kills 5 --horizon 1      another script; the rest are its flags
    python tools/kill_test.py qam_offline_to_online.py --offline-steps 2000 --online-steps 4000 --start-training 500

Half of the kills (SIGKILL) come after a random time, half at the moment when a file is being written: a checkpoint,
metrics.csv, eval.csv or args.json. A run that is killed before its first checkpoint is started anew; one that is
through before enough kills is compared, and the kills go on with the next. In the end all parameters, targets and
optimizer states must be equal to the bit, and the CSV files row by row, but for columns that measure time.

A kill in an online phase cuts the episode that was running, so what follows is another run; asked for are then: each
checkpoint's online transitions are still there in the end, to the bit, the CSV files are the same up to the first of
these kills and have the same steps after it, and environment steps and updates are as many as without a kill.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
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

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "pointmaze-medium-navigate"
TINY = (
    f"--env-id {DOMAIN}-task4 --hidden-dims 16 16 --num-critics 2 --horizon 4 --flow-steps 3 --batch-size 32 "
    "--eval-episodes 4 --eval-envs 2 --offline-steps 6000 --log-every 50 --eval-every 500 --checkpoint-every 100"
).split()
EVENTS = ["checkpoint.msgpack", "checkpoint.msgpack", "metrics.csv", "eval.csv", "args.json"]  # the first one's twice
TIMED = {"wall_seconds", "updates_per_second"}


def load_script(path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_checkpoint(module, folder):
    """The last whole checkpoint, or None."""
    if folder is None:
        return None
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        return module.load_checkpoint(folder)


def leaves(tree, path=""):
    """Nested dicts -> {path: array}."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, value in tree.items() for k, v in leaves(value, f"{path}/{name}").items()}


def read_rows(path):
    """Rows of a CSV file without what depends on the clock."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def differences(module, whole, cut, kept):
    """Sentences about all that should be the same in two run folders, and is not.

    kept: (step, online transitions by field) of the checkpoint at each kill in an online phase.
    """
    found, checkpoints = [], [read_checkpoint(module, folder) for folder in (whole, cut)]
    if None in checkpoints:
        return [f"{(whole, cut)[checkpoints.index(None)]} holds no whole checkpoint"]
    first, second = (leaves(checkpoint["states"]) for checkpoint in checkpoints)
    if first.keys() != second.keys():
        found.append(f"states: {sorted(first.keys() ^ second.keys())[:3]} are in one of them only")
    form = lambda x: (str(x.dtype), x.shape, x.tobytes())
    names = {"/step"} if kept else first.keys() & second.keys()
    other = [name for name in names if form(first[name]) != form(second[name])]
    if kept and len(first["/online/rewards"]) != len(second["/online/rewards"]):
        found.append(f"{len(first['/online/rewards'])} and {len(second['/online/rewards'])} online transitions")
    for step, online in kept:
        lost = [k for k, x in online.items() if not (second[f"/online/{k}"][: len(x)] == x).all()]
        found += [f"the {len(online['rewards'])} online transitions of step {step} have other {lost}"] if lost else []
    until = min([step for step, _ in kept], default=float("inf"))
    if other:
        found.append(f"states: {len(other)} of {len(first)} arrays differ, such as {min(other)}")
    for folder, checkpoint in zip((whole, cut), checkpoints, strict=True):  # what was undone must not stay in a file
        logged = [row["step"] for row in json.loads(checkpoint["log"]).get("episodes.csv", [])]
        if logged != [int(row["step"]) for row in read_rows(folder / "episodes.csv")]:
            found.append(f"{folder / 'episodes.csv'} is not the checkpoint's {len(logged)} rows")
    for name in ("metrics.csv", "eval.csv"):
        rows = [read_rows(folder / name) for folder in (whole, cut)]
        marks = [[(row["step"], row["seed"], row.get("phase")) for row in part] for part in rows]
        for folder, part in zip((whole, cut), marks, strict=True):
            if not part or len(set(part)) < len(part):
                found.append(f"{folder / name} has {len(part)} rows for {len(set(part))} steps")
        if marks[0] != marks[1]:
            found.append(f"{name}: steps {sorted(set(marks[0]) ^ set(marks[1]))[:3]} are in one of them only")
        elif [r for r in rows[0] if int(r["step"]) <= until] != [r for r in rows[1] if int(r["step"]) <= until]:
            i = next(i for i in range(len(rows[0])) if rows[0][i] != rows[1][i])
            found.append(f"{name}: row {i + 1} differs: {rows[0][i]} and {rows[1][i]}")
    return found


class Run:
    """One training, started and resumed as often as need be."""

    def __init__(self, line, script, runs, log):
        self.line, self.script, self.runs, self.log, self.folder = line, script, runs, log, None
        self.anew, self.kept = 0, []

    def start(self, module):
        """A process that begins the run, or goes on with it from its last checkpoint."""
        if read_checkpoint(module, self.folder) is None:
            self.anew += self.folder is not None
            self.before, self.kept = set(self.runs.iterdir()), []
            self.folder, line = None, [*self.line, "--run-dir", self.runs]
        else:
            line = [sys.executable, self.script, "--resume", self.folder]
        self.stamps = {name: self.stamp(name) for name in EVENTS}
        with open(self.log, "a") as file:
            return subprocess.Popen(list(map(str, line)), stdout=file, stderr=file, start_new_session=True)

    def stamp(self, name):
        """Tells one writing of a file from the next."""
        try:
            return os.stat(f"{self.folder}/{name}.tmp").st_mtime_ns
        except OSError:
            return None

    def find(self):
        """Learn the folder's name as soon as it is there."""
        if self.folder is None:
            self.folder = next((path for path in self.runs.iterdir() if path not in self.before), None)
        return self.folder

    def describe(self, module):
        checkpoint = read_checkpoint(module, self.folder)
        online = checkpoint["states"].get("online") if checkpoint else None
        if online:
            offline_steps = json.loads((self.folder / "args.json").read_text())["offline_steps"]
            self.kept.append((offline_steps + len(online["rewards"]), online))
        step = "none" if checkpoint is None else int(checkpoint["states"]["step"].flat[0])
        last = lambda name: (read_rows(self.folder / name) or [{"step": 0}])[-1]["step"] if self.folder else 0
        torn = [name for name in EVENTS[1:] if self.stamp(name) not in (None, self.stamps[name])]
        step = f"{step} with {len(online['rewards'])} online transitions" if online else step
        words = f"checkpoint {step}, metrics.csv to {last('metrics.csv')}, eval.csv to {last('eval.csv')}"
        if self.folder and not (self.folder / "checkpoint.msgpack").exists() and checkpoint:
            torn.append("between the two renames of a checkpoint")
        return words + (f"; half-written: {', '.join(torn)}" if torn else "")


def wait_for(process, seconds):
    """Let the process run so long; True if it is still running."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return True
    return False


def kill_at_random(run, process, rng, delays, event):
    """Kill the process at a random moment: words for it, or None if it was through before.

    The moment is a delay between the two `delays` after the start, or when the file `event` is being written.
    """
    written = os.stat(run.folder / "args.json").st_mtime_ns if run.folder else None
    if event == "args.json":
        times, words = 1, "while writing args.json"
    elif event:
        times = rng.randint(1, 3 if event == "eval.csv" else 12)
        words = f"while writing {event}, time {times}"
    else:
        delay = rng.uniform(*delays)
        words = f"{delay:.2f} s after the start"
        while process.poll() is None:  # the start: args.json is written anew
            with contextlib.suppress(OSError):
                if run.find() and os.stat(run.folder / "args.json").st_mtime_ns != written:
                    break
            time.sleep(0.002)
        if not wait_for(process, delay):
            return None
    while event and process.poll() is None:
        run.find()
        now = run.stamp(event) if run.folder else None
        if now not in (None, run.stamps[event]):
            times, run.stamps[event] = times - 1, now if times > 1 else run.stamps[event]
            if not times:
                break
        time.sleep(0.0001)
    if process.poll() is not None:
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its environments would end by themselves, a little later
    run.find()
    return words


def has(flag, flags):
    return any(word.split("=")[0].replace("_", "-") == flag for word in flags)


def main():
    argv = sys.argv[1:]
    script = Path(argv.pop(0) if argv and argv[0][0] != "-" else ROOT / "qam_offline.py").resolve()
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [SCRIPT] [--kills N] [--seed N] [flags for the script]",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=20, help="how many, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, flags = parser.parse_known_args(argv)
    if args.kills < 1 or not script.is_file():
        sys.exit(print(f"error: --kills must be 1 or more, and {script} must exist", file=sys.stderr) or 2)
    folder, rng = Path(tempfile.mkdtemp(prefix="kill_test_")), random.Random(args.seed)
    log = folder / "output.log"
    if not has("--dataset-dir", flags) and not has("--env-id", flags):
        tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN, "--episodes", "3"]
        subprocess.run([*tool, "--out-dir", folder / "data"], check=True, stdout=subprocess.DEVNULL)
        flags = ["--dataset-dir", folder / "data", *flags]
    tiny = [word.replace("flow", "diffusion") for word in TINY] if "diffusion" in script.stem else TINY
    module, line = load_script(script), [sys.executable, script, *tiny, *flags]
    for name in ("whole", "cut"):
        (folder / name).mkdir()
    started = time.time()
    run = Run(line, script, folder / "whole", log)
    process, compiled = run.start(module), None
    while process.poll() is None:
        if compiled is None and run.find() and (run.folder / "metrics.csv").exists():
            compiled = time.time() - (run.folder / "args.json").stat().st_mtime
        time.sleep(0.01)
    if process.returncode or compiled is None:
        sys.exit(print(f"error: the run by itself fails; its output is in {log}", file=sys.stderr) or 2)
    whole = run.find()
    seconds = time.time() - (whole / "args.json").stat().st_mtime
    print(
        f"uninterrupted: {time.time() - started:.0f} s; start to end {seconds:.0f} s, {compiled:.0f} s to compile",
        flush=True,
    )
    delays = (compiled / 2, compiled + max(2.0, 3 * (seconds - compiled) / args.kills))
    run, kills, finished, anew, wrong = Run(line, script, folder / "cut", log), 0, 0, 0, []
    events = [EVENTS[i // 2 % len(EVENTS)] if i % 2 else None for i in range(args.kills)]
    rng.shuffle(events)
    while not wrong:
        process = run.start(module)
        if kills < args.kills:
            words = kill_at_random(run, process, rng, delays, events[kills])
        else:
            words = process.wait() and None
        if words:
            kills += 1
            print(f"kill {kills:2d} {words}: {run.describe(module)}", flush=True)
            continue
        if process.returncode:
            wrong = [f"a resumed run ended with status {process.returncode}; its output is in {log}"]
            break
        finished, anew, wrong = finished + 1, anew + run.anew, differences(module, whole, run.find(), run.kept)
        told = f"{len(run.kept)} of them online, nothing lost" if run.kept else "no difference"
        print(f"run {finished} is through after {kills} kills: {'; '.join(wrong) or told}", flush=True)
        if kills == args.kills:
            break
        run = Run(line, script, folder / "cut", log)
    verdict = "DIFFERENT" if wrong else "the same to the bit, or, after a kill online, nothing saved was lost"
    print(f"{script.name}: {kills} kills, {anew} starts anew, {finished} runs compared, {time.time() - started:.0f} s:")
    print(f"{verdict}{': ' + '; '.join(wrong) + f' (see {folder})' if wrong else ''}")
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
