"""A run that can't write any more: what was saved stays whole, and --resume finishes."""

import subprocess

import pytest
from conftest import command, folder_of, read_rows, read_states, resume

# The checkpoint grows by 36 bytes per online step, from 20 kB to 70 kB.
FLAGS = (
    "--hidden-dims 8 --offline-steps 20 --online-steps 1500 --start-training 1400 "
    "--eval-every 5000 --eval-episodes 1 --eval-envs 1 --checkpoint-minutes 0.002"
).split()
KIBIBYTES = 30


@pytest.mark.slow
def test_full_disk(dataset_dir, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the end of the disk: an OSError, too."""
    line = command("qam_offline_to_online.py", dataset_dir, tmp_path, *FLAGS)
    limited = ["bash", "-c", f'ulimit -f {KIBIBYTES}; exec "$@"', "bash", *line]
    # Other runs use the cache of compiled programs, which must not hold halves.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    folder = folder_of(tmp_path)
    assert "OSError: [Errno 27] File too large" in done.stderr
    num_saved = len(read_states(folder)["online"]["rewards"])
    assert 0 < num_saved < 1400

    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    assert len(read_states(folder)["online"]["rewards"]) == 1500
    steps = [row["step"] for row in read_rows(folder / "eval.csv")]
    assert steps == ["20", "1520"]
