"""Windows and macOS: what they lack is taken away, and runs train, stop and go on."""

import signal

import pytest
from conftest import folder_of, read_states, resume
from stopping import has_learned, start, stop, wait_for

# What Python there does not have. (Only that: processes and paths are those of this system.)
LACKING = """
import os
import signal
import sys

sys.modules["fcntl"] = None
missing = {
    os: ("sched_getaffinity", "sched_setaffinity"),
    signal: ("SIGHUP", "SIGUSR1", "SIGUSR2", "pthread_sigmask"),
}
for module, names in missing.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.mark.parametrize(
    "script, flags, steps",
    [
        ("qam_offline.py", "--offline-steps 3000 --eval-every 3000", 3000),
        pytest.param(
            "qam_offline_to_online.py",
            "--offline-steps 1000 --online-steps 200 --start-training 40 --eval-every 600",
            1000 + 160 - 4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_without_them(script, flags, steps, dataset_dir, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_dir = tmp_path / "runs"
    process = start(script, dataset_dir, run_dir, *flags.split())
    wait_for(has_learned, run_dir, process)
    stop(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    folder = folder_of(run_dir)
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    assert steps <= read_states(folder)["step"][0] <= steps + 4
