"""What several test files need: a small dataset, tiny runs, and how to read what a run leaves."""

import atexit
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import flax
import pytest

# Most runs below compile the same: the first one compiles for all, down to the smallest program.
# Workers of pytest-xdist find the folder that the process that started them has made; .ci/run
# makes one for both of its calls.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache_dir = tempfile.mkdtemp(prefix="jax_cache_")
    atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache_dir
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "pointmaze-medium-navigate"
TINY = (
    "--hidden-dims 16 16 --num-critics 2 --horizon 4 --batch-size 32 "
    "--eval-episodes 2 --eval-envs 1 --offline-steps 60 "
    "--log-every 20 --eval-every 30 --checkpoint-minutes 0"
).split()


@pytest.fixture(scope="module")
def fast_compilation():
    """For runs of many programs and few updates, most of whose time is XLA's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A folder with a real, small pointmaze dataset."""
    folder = tmp_path_factory.mktemp("collected")
    tool = ROOT / "tools/collect_dataset.py"
    line = [sys.executable, tool, DOMAIN, "--episodes", "3", "--out-dir", folder]
    subprocess.run(line, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def finished_run(dataset_dir, tmp_path_factory):
    """The folder of a finished tiny run of qam_offline.py, which nobody writes to."""
    run_dir = tmp_path_factory.mktemp("finished_run")
    done = run("qam_offline.py", dataset_dir, run_dir)
    assert done.returncode == 0, done.stderr
    return folder_of(run_dir)


@pytest.fixture(autouse=True)
def restored_signals():
    """A test that calls a script's main() leaves no signal handler behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def step_flags(script):
    """Few steps from noise to action, under the name that the script has for them, if any."""
    source = (ROOT / script).read_text()
    flags = []
    for name in ("flow_steps", "diffusion_steps"):
        if f"\n    {name}: int" in source:
            flags += ["--" + name.replace("_", "-"), "3"]
    return flags


def command(script, dataset_dir, run_dir, *flags):
    """The command line of a tiny run. Of a flag given twice the last holds."""
    line = [sys.executable, ROOT / script, "--env-id", f"{DOMAIN}-task4"]
    line += ["--dataset-dir", dataset_dir, "--run-dir", run_dir]
    line += TINY + step_flags(script)
    line += flags
    return [str(part) for part in line]


def run(script, dataset_dir, run_dir, *flags):
    """A tiny run, to its end: what subprocess.run returns, with what was printed as text."""
    line = command(script, dataset_dir, run_dir, *flags)
    return subprocess.run(line, capture_output=True, text=True)


def resume(folder, *flags):
    """Go on with a run by the script that made it: as `run`."""
    saved = json.loads((folder / "args.json").read_text())
    script = (ROOT / saved["script"]).with_suffix(".py")
    line = [sys.executable, script, "--resume", folder, *flags]
    return subprocess.run([str(part) for part in line], capture_output=True, text=True)


def folder_of(run_dir):
    """The folder of the only run in `run_dir`."""
    (folder,) = run_dir.iterdir()
    return folder


def read_rows(path):
    """The rows of a CSV file, each a dict of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_states(folder):
    """The states in a run's checkpoint, read without the script: nested dicts of arrays."""
    content = (folder / "checkpoint.msgpack").read_bytes()
    return flax.serialization.msgpack_restore(content)["states"]
