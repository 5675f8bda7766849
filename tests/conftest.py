import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_")  # most runs below compile the same
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "pointmaze-medium-navigate"
TINY = (
    "--hidden-dims 16 16 --num-critics 2 --horizon 4 --flow-steps 3 --batch-size 32 --eval-episodes 2 --eval-envs 2 "
    "--offline-steps 60 --log-every 20 --eval-every 30 --checkpoint-every 20"
).split()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A folder with a real, small pointmaze dataset."""
    folder = tmp_path_factory.mktemp("collected")
    tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN, "--episodes", "3", "--out-dir", folder]
    subprocess.run(tool, check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def restored_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(script, dataset_dir, run_dir, *flags):
    """The command line of a tiny run on the fixture's data; flags given twice: the last one holds."""
    tiny = [part.replace("flow", "diffusion") for part in TINY] if "diffusion" in Path(script).stem else TINY
    base = ["--env-id", f"{DOMAIN}-task4", "--dataset-dir", dataset_dir, "--run-dir", run_dir, *tiny]
    return [str(part) for part in (sys.executable, ROOT / script, *base, *flags)]
