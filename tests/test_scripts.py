"""A real, tiny run of every script: two seeds, the files it leaves, its checkpoint scored again."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command
from test_run import folder_of, rows

from tools import sync_shared

TESTED = {sync_shared.FIRST, "qam_offline_to_online.py"}  # these have tests of their own
SCRIPTS = [path for path in sync_shared.find_scripts(ROOT) if path not in TESTED]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs(script, dataset_dir, tmp_path):
    line = command(script, dataset_dir, tmp_path, "--num-seeds", "2", "--best-of-n", "2", "--eval-every", "60")
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    metrics = rows(folder / "metrics.csv")
    assert [(row["step"], row["seed"]) for row in metrics] == [(s, n) for s in ("20", "40", "60") for n in "12"]
    assert {"critic_loss", "flow_loss", "policy_grad_norm", "updates_per_second"} <= metrics[0].keys()
    assert all(np.isfinite(float(number)) for row in metrics for number in row.values())
    assert metrics[-1]["critic_loss"] != metrics[-2]["critic_loss"]  # the seeds differ
    assert [row["seed"] for row in rows(folder / "eval.csv")] == ["1", "2"]
    again = [sys.executable, ROOT / script, "--eval-only", folder, "--eval-episodes", "1", "--eval-envs", "1"]
    done = subprocess.run(list(map(str, again)), capture_output=True, text=True)
    assert done.returncode == 0 and "success_rate" in done.stdout, done.stderr
    other = subprocess.run(
        [sys.executable, ROOT / sync_shared.FIRST, "--resume", folder], capture_output=True, text=True
    )
    assert other.returncode == 2 and "another script" in other.stderr
