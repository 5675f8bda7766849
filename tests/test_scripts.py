"""A real, tiny run of every script that has no tests of its own for it, scored again."""

import functools
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, folder_of, read_rows, run

SCRIPTS = [
    "qam_diffusion_variant.py",
    "baselines/fql.py",
    "baselines/dsrl.py",
    "baselines/fbrac.py",
    "baselines/bam.py",
    "variants/qam_fql.py",
    "variants/qam_edit.py",
    "variants/trqam.py",
    "baselines/fedit.py",
    "baselines/ifql.py",
    "baselines/fawac.py",
    "baselines/rebrac.py",
    "baselines/rlpd.py",
    "baselines/cgql.py",
    "baselines/qsm.py",
    "baselines/dac.py",
    "baselines/rql.py",
    "baselines/qgf.py",
]
pytestmark = pytest.mark.usefixtures("fast_compilation")

# A run takes ten seconds: these with the README's test command, the others with -m slow.
FAST = ("qam_diffusion_variant.py", "baselines/fql.py", "variants/trqam.py", "baselines/ifql.py")
MARKED = [
    pytest.param(script, marks=[] if script in FAST else pytest.mark.slow) for script in SCRIPTS
]
WITHOUT_BEHAVIOR = [
    f"baselines/{name}.py" for name in "fbrac fawac rebrac rlpd qsm dac rql".split()
]


@pytest.fixture(scope="module")
def folder_for(dataset_dir, fast_compilation, tmp_path_factory):
    """folder_for(script): of a run with two seeds that acts by the best of two chunks."""
    flags = (
        "--num-seeds 2 --best-of-n 2 --hidden-dims 8 --eval-envs 1 "
        "--offline-steps 20 --eval-every 20 --log-every 10"
    )

    @functools.cache
    def folder_for(script):
        run_dir = tmp_path_factory.mktemp("script")
        done = run(script, dataset_dir, run_dir, *flags.split())
        assert done.returncode == 0, done.stderr
        return folder_of(run_dir)

    return folder_for


def evaluate(*words):
    line = [sys.executable, ROOT / "tools/evaluate.py", *words, "--envs", "2"]
    return subprocess.run(line, capture_output=True, text=True)


def scores_printed(done, who):
    """A dict of words for each line on standard output."""
    assert done.returncode == 0, done.stderr
    lines = re.findall(rf"step (\S+) seed (\S+) {who} (.*)", done.stdout)
    found = []
    for step, seed, words in lines:
        pairs = re.findall(r"(\S+) (\S+)", words)
        found.append({"step": step, "seed": seed, **dict(pairs)})
    assert len(found) == len(done.stdout.splitlines())
    return found


@pytest.mark.parametrize("script", MARKED)
def test_metrics_of_both_seeds(script, folder_for):
    metrics = read_rows(folder_for(script) / "metrics.csv")
    marks = [(row["step"], row["seed"]) for row in metrics]
    assert marks == [("10", "1"), ("10", "2"), ("20", "1"), ("20", "2")]
    names = {"critic_loss", "q_mean", "grad_norm", "updates_per_second"}
    assert names < metrics[0].keys()
    numbers = [float(value) for row in metrics for value in row.values()]
    assert np.isfinite(numbers).all()
    assert metrics[2]["critic_loss"] != metrics[3]["critic_loss"]


def test_evaluate_scores_runs_as_they_did(folder_for):
    """All in one call, by another number of processes."""
    scored = [folder_for("qam_diffusion_variant.py"), folder_for("baselines/ifql.py")]
    printed = scores_printed(evaluate(*scored), "policy")
    rows = []
    for folder in scored:
        rows += read_rows(folder / "eval.csv")
    assert len(printed) == len(rows) == 2 * len(scored)
    for scores, row in zip(printed, rows, strict=True):
        assert scores.items() <= row.items()


def test_evaluate_scores_the_behavior_flow(folder_for):
    """And keeps the scores in each run's folder."""
    with_behavior = [folder_for("qam_diffusion_variant.py"), folder_for("variants/trqam.py")]
    done = evaluate(*with_behavior, "--behavior", "--episodes", "1")
    printed = scores_printed(done, "behavior")
    assert [scores["seed"] for scores in printed] == ["1", "2"] * len(with_behavior)
    for folder in with_behavior:
        rows = read_rows(folder / "behavior.csv")
        assert [(row["seed"], row["episodes"]) for row in rows] == [("1", "1"), ("2", "1")]


@pytest.mark.slow
def test_evaluate_tells_of_a_run_without_a_behavior_flow(folder_for):
    done = evaluate(folder_for(WITHOUT_BEHAVIOR[0]), "--behavior")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "has no behavior flow" in line
