"""The tools, run for real at their smallest."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import DOMAIN, ROOT

from tools import benchmark, closed_form

TINY = "--hidden-dims 32 32 --num-critics 3 --horizon 4 --flow-steps 3 --batch-size 32".split()


def test_benchmark_prints_one_json_object():
    """And its parts agree: MFU is operations times rate over the best multiplication rate."""
    line = [sys.executable, ROOT / "tools/benchmark.py", ROOT / "qam_offline.py", "--json", "--repeats", "2"]
    line += ["--seconds", "0.1", "--env-id", DOMAIN, "--eval-envs", "1", *TINY]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    flow, critic = (2 + 8 + 1) * 32 + 32 * 32 + 32 * 8, (2 + 8) * 32 + 32 * 32 + 32
    assert figures["gflop_per_update"] == pytest.approx(2 * 32 * ((8 * 3 + 3) * flow + 6 * 3 * critic) / 1e9, rel=1e-3)
    operations = figures["updates_per_second"] * figures["gflop_per_update"]
    assert figures["mfu"] == pytest.approx(operations / figures["matmul_gflop_per_second"], abs=2e-3)
    assert figures["eval_fraction"] == pytest.approx(
        figures["eval_steps_per_second"] / figures["bare_steps_per_second"], abs=0.01
    )
    assert figures["peak_memory_mib"] > figures["dataset_mib"] > 1 and figures["compile_seconds"] > 0


def test_benchmark_counts_what_the_paper_size_costs():
    """61 GFLOP: 512x4, ten critics, 37 observations, D = 25, T = 10, batch 256."""
    flow, critic = (37 + 25 + 1) * 512 + 3 * 512**2 + 512 * 25, (37 + 25) * 512 + 3 * 512**2 + 512
    count = benchmark.NOMINAL["qam_offline"](10, 10, {"fast": flow, "critic": critic})
    assert 2 * 256 * count / 1e9 == pytest.approx(61, rel=0.01)


@pytest.mark.parametrize("name", closed_form.GRIDS)
def test_every_method_trains_on_the_bandit(name):
    """Its own policy_loss with the analytic Q, whose critics all agree; samples move, nothing is lost to nan."""
    coefficient = closed_form.GRIDS[name][1][0]
    matching = name.startswith("qam")
    samples, norms, *chain = closed_form.train(name, [coefficient], 3, 30, 0, chain=2000 if matching else 0)
    assert [part.shape for part in chain] == [(1, 2000, 2)] * matching and np.isfinite(chain).all()
    assert samples.shape == (1, 3000, 2) and np.abs(samples).max() <= 1 and samples.std() > 0.05
    assert norms.shape == (1, 30) and np.isfinite(norms).all() and (norms > 0).all()


def test_widened_schedule_changes_the_variance_alone():
    script = closed_form.load("qam_diffusion_variant")
    k = np.arange(1.0, 11, dtype=np.float32)
    before, after = (np.asarray(f(k, 10)) for f in (script.schedule, closed_form.widened(script.schedule)))
    np.testing.assert_array_equal(before[:4], after[:4])
    np.testing.assert_array_equal(after[4], [0, *before[3, 1:]])
    assert (after[4, 1:] > before[4, 1:]).all()


def test_distances_of_a_chain_that_samples_the_data():
    """Then its own target is the target: the policy that samples the target is at the floor from both."""
    rng = np.random.default_rng(0)
    data = closed_form.draw(rng, closed_form.MEANS, 0.15, np.zeros(4), 30_000)
    target, sample = (
        closed_form.draw(
            rng, closed_form.TARGET_MEANS, closed_form.PRECISION**-0.5, closed_form.TARGET_LOG_WEIGHTS, 3000
        )
        for _ in range(2)
    )
    distances = closed_form.chain_distances(rng, sample, data, data[-1000:], target)
    assert max(distances) < 0.01
    assert min(closed_form.chain_distances(rng, data[:1000], data[:, :1] * [1, 0], data[-1000:], target)) > 0.05


def test_benchmark_runs_the_online_phase():
    """Environment and updates at once, against the slower of the two."""
    line = [sys.executable, ROOT / "tools/benchmark.py", ROOT / "qam_offline_to_online.py", "--json", "--repeats", "3"]
    line += ["--seconds", "0.1", "--online-seconds", "2", "--env-id", DOMAIN, "--skip-evaluation", *TINY]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    bound = min(figures["environment_steps_per_second_alone"], figures["updates_per_second"])
    assert figures["online_fraction"] == pytest.approx(figures["online_steps_per_second"] / bound, abs=0.01)
    assert figures["online_fraction"] > 0.05


def test_the_target_is_behaviour_times_exp_q():
    """Self-normalised importance weights on the behaviour's samples give the closed form's mean and spread."""
    rng = np.random.default_rng(0)
    behaviour = closed_form.draw(rng, closed_form.MEANS, 0.15, np.zeros(4), 200_000)
    target = closed_form.draw(
        rng, closed_form.TARGET_MEANS, closed_form.PRECISION**-0.5, closed_form.TARGET_LOG_WEIGHTS, 200_000
    )
    weights = np.exp(closed_form.value(behaviour))
    weights /= weights.sum()
    mean = weights @ behaviour
    np.testing.assert_allclose(target.mean(0), mean, atol=0.01)
    np.testing.assert_allclose(target.var(0), weights @ (behaviour - mean) ** 2, atol=0.01)
