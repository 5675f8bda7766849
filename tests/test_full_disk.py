"""A run whose disk fills up: one sentence, the last checkpoint stays whole, and --resume finishes it."""

import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT, command

import qam_offline as qam

SCRIPT = "qam_offline.py"
FEW = "--eval-every 60 --eval-episodes 1 --eval-envs 1".split()  # a checkpoint at 20, at 40 and at the end, 60
SMALL_DISK = """
mount -t tmpfs -o size=$1 none "$2" || exit 77
FLAGS --run-dir "$2"; first=$?
cp -r "$2" "$3"
mount -o remount,size=100m "$2"
cd "$2" && PYTHON SCRIPT --resume "$(ls)" > "$3.resumed" 2>&1; second=$?
cp -r "$2" "$3.after"
echo "statuses $first $second"
"""  # in a mount namespace of its own, which ends with the shell


def checkpoint_bytes(tmp_path):
    """Size of a checkpoint of the tiny run."""
    args = qam.Args(hidden_dims=(16, 16), num_critics=2, horizon=4)
    networks = qam.make_networks(args, 2, 2)
    states = jax.vmap(lambda seed: qam.init_state(args, networks, 2, 2, jax.random.key(seed)))(jax.numpy.arange(1))
    qam.save_checkpoint(tmp_path, states, {"metrics.csv": [], "eval.csv": []})
    return (tmp_path / "checkpoint.msgpack").stat().st_size


def may_mount():
    """Whether this user may mount a file system, in a namespace of its own."""
    try:
        return not subprocess.run("unshare -rm mount -t tmpfs none /mnt".split(), capture_output=True).returncode
    except OSError:
        return False


def fill_a_small_disk(dataset_dir, tmp_path, size):
    """One checkpoint fits, and the next beside it, but no third: (error output, status, folder) before and after."""
    line = command(SCRIPT, dataset_dir, tmp_path / "disk", *FEW)
    i = line.index("--run-dir")
    text = SMALL_DISK.replace("FLAGS", " ".join(line[:i] + line[i + 2 :]))
    text = text.replace("PYTHON SCRIPT", f"{sys.executable} {ROOT / SCRIPT}")
    (tmp_path / "disk").mkdir()
    places = [str(int(2.5 * size) + 20000), str(tmp_path / "disk"), str(tmp_path / "copy")]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", text, "sh", *places], capture_output=True, text=True)
    first, second = map(int, re.search(r"statuses (\d+) (\d+)", done.stdout).groups())
    folders = [next((tmp_path / name).iterdir()) for name in ("copy", "copy.after")]
    return (done.stderr, first, folders[0]), ((tmp_path / "copy.resumed").read_text(), second, folders[1])


def limit_files(dataset_dir, tmp_path, size):
    """After its first checkpoint the run may write no file of half that size: as above."""
    line = command(SCRIPT, dataset_dir, tmp_path / "runs", *FEW, "--offline-steps", "100000", "--eval-every", "100000")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "runs").glob("*/checkpoint.msgpack")) and process.poll() is None:
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
    printed = process.communicate()[1]
    (folder,) = (tmp_path / "runs").iterdir()
    before = shutil.copytree(folder, tmp_path / "before")
    steps = int(qam.load_checkpoint(folder)["states"]["step"][0]) + 20
    line = [sys.executable, str(ROOT / SCRIPT), "--resume", str(folder), "--offline-steps", str(steps)]
    done = subprocess.run(line, capture_output=True, text=True)
    return (printed, process.returncode, before), (done.stderr, done.returncode, folder)


@pytest.mark.parametrize("fill", [fill_a_small_disk, limit_files])
def test_full_disk(fill, dataset_dir, tmp_path):
    if fill == fill_a_small_disk and not may_mount():
        pytest.skip("this user may not mount a file system; the limit on the size of files stands in for it")
    if fill == limit_files and not hasattr(resource, "prlimit"):
        pytest.skip("this system can't limit the files of a running process")
    (printed, status, before), (printed_after, status_after, after) = fill(
        dataset_dir, tmp_path, checkpoint_bytes(tmp_path)
    )
    assert status in (1, 2) and "Traceback" not in printed, printed
    assert len(re.findall("error: ", printed)) == 1 and re.search("error: writing to .* failed", printed), printed
    assert status_after == 0 and "Traceback" not in printed_after, printed_after
    steps = [int(qam.load_checkpoint(folder)["states"]["step"][0]) for folder in (before, after)]
    assert steps[1] == steps[0] + 20 and steps[0] >= 20
    rows = [line.split(",")[0] for line in (after / "metrics.csv").read_text().splitlines()]
    assert rows == ["step", *map(str, range(20, steps[1] + 1, 20))]
