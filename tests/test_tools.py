"""Tools and experiments, run for real at their smallest."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DOMAIN, ROOT
from refusals import refusal

from dev import benchmark
from experiments import closed_form
from tools import evaluate

TINY = "--hidden-dims 32 32 --num-critics 3 --horizon 4 --flow-steps 3 --batch-size 32".split()


def run_benchmark(script, *flags):
    """The figures that it prints, which are nothing but a JSON object."""
    line = [sys.executable, ROOT / "dev/benchmark.py", ROOT / script, "--json"]
    line += ["--seconds", "0.1", "--env-id", DOMAIN, "--eval-envs", "1", *TINY, *flags]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_benchmark_prints_one_json_object():
    """And its parts agree: MFU is operations times rate over the best multiplication rate."""
    figures = run_benchmark("qam_offline.py", "--repeats", "2", "--num-seeds", "2")
    assert figures["num_seeds"] == 2
    flow = (2 + 8 + 1) * 32 + 32 * 32 + 32 * 8
    critic = (2 + 8) * 32 + 32 * 32 + 32
    gflop = 2 * 32 * ((8 * 3 + 3) * flow + 6 * 3 * critic) / 1e9
    assert figures["gflop_per_update"] == pytest.approx(gflop, rel=1e-3)
    operations = figures["updates_per_second"] * figures["gflop_per_update"]
    mfu = operations / figures["matmul_gflop_per_second"]
    assert figures["mfu"] == pytest.approx(mfu, abs=2e-3)
    fraction = figures["eval_steps_per_second"] / figures["bare_steps_per_second"]
    assert figures["eval_fraction"] == pytest.approx(fraction, abs=0.01)
    assert figures["peak_memory_mib"] > figures["dataset_mib"] > 1
    assert figures["compile_seconds"] > 0


def test_benchmark_counts_what_the_paper_size_costs():
    """61 GFLOP: 512x4, ten critics, 37 observations, D = 25, T = 10, batch 256."""
    flow = (37 + 25 + 1) * 512 + 3 * 512**2 + 512 * 25
    critic = (37 + 25) * 512 + 3 * 512**2 + 512
    count = benchmark.multiplications("qam_offline", 10, {"policy": flow, "critic": 10 * critic})
    assert 2 * 256 * count / 1e9 == pytest.approx(61, rel=0.01)


def test_benchmark_counts_kernels_alone():
    """Of a critic's ensemble too, whose biases have two axes."""
    kernel = np.zeros((3, 4, 5))
    bias = np.zeros((3, 5))
    critic = {"Dense_0": {"kernel": kernel, "bias": bias}}
    params = {"critic": critic, "log_beta": np.zeros(())}
    entries = benchmark.kernel_entries(params)
    assert entries == {"critic": 60, "log_beta": 0}


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_benchmark_runs_the_online_phase():
    """Environment and updates at once, against the slower of the two."""
    flags = ("--repeats", "3", "--online-seconds", "2", "--skip-evaluation")
    figures = run_benchmark("qam_offline_to_online.py", *flags)
    bound = min(figures["environment_steps_per_second_alone"], figures["updates_per_second"])
    fraction = figures["online_steps_per_second"] / bound
    assert figures["online_fraction"] == pytest.approx(fraction, abs=0.01)
    assert figures["online_fraction"] > 0.05


# Matching on a flow and on a diffusion, one step, and a critic that learns of noisy actions.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qam_offline", "qam_diffusion_variant", "fql", "cgql"])
def test_a_method_trains_on_the_bandit(name):
    """Its own policy_loss with the analytic Q, whose critics all agree; nothing is lost to nan."""
    coefficient = closed_form.GRIDS[name][1][0]
    matching = name in closed_form.MATCHING
    num_chain = 2000 if matching else 0
    trained = closed_form.train(name, [coefficient], 3, 30, 0, num_chain)
    assert trained.samples.shape == (1, 3000, 2)
    assert np.abs(trained.samples).max() <= 1
    assert trained.samples.std() > 0.05
    assert trained.norms.shape == (1, 30)
    assert np.isfinite(trained.norms).all()
    assert (trained.norms > 0).all()
    if matching:
        assert trained.chain.shape == (1, 2000, 2)
        assert np.isfinite(trained.chain).all()


def test_widened_schedule_changes_the_variance_alone():
    script = closed_form.load("qam_diffusion_variant")
    k = jnp.arange(1.0, 11)
    before = np.asarray(script.schedule(k, 10))
    after = np.asarray(closed_form.widened(script.schedule)(k, 10))
    np.testing.assert_array_equal(before[:4], after[:4])
    np.testing.assert_array_equal(after[4], [0, *before[3, 1:]])
    assert (after[4, 1:] > before[4, 1:]).all()


def test_distances_of_a_chain_that_samples_the_data():
    """Then its own target is the target: who samples that is at the floor from both."""
    rng = np.random.default_rng(0)
    data = closed_form.draw_behavior(rng, 30_000)
    target = closed_form.draw_target(rng, 3000)
    sample = closed_form.draw_target(rng, 3000)
    distances = closed_form.chain_distances(rng, sample, data, data[-1000:], target)
    assert max(distances) < 0.01
    collapsed = data[:, :1] * [1, 0]
    distances = closed_form.chain_distances(rng, data[:1000], collapsed, data[-1000:], target)
    assert min(distances) > 0.05


def test_the_target_is_behavior_times_exp_q():
    """Self-normalized importance weights on behavior's samples give its mean and spread."""
    rng = np.random.default_rng(0)
    behavior = closed_form.draw_behavior(rng, 200_000)
    target = closed_form.draw_target(rng, 200_000)
    weights = np.exp(closed_form.value(behavior))
    weights /= weights.sum()
    mean = weights @ behavior
    np.testing.assert_allclose(target.mean(0), mean, atol=0.01)
    variance = weights @ (behavior - mean) ** 2
    np.testing.assert_allclose(target.var(0), variance, atol=0.01)


# ----------------------------------------------------------------------------- tools/evaluate.py


def test_evaluate_tells_what_is_no_run(tmp_path, capsys):
    assert "no run folder" in refusal(capsys, evaluate.read_record, tmp_path)
    record = {"script": tmp_path / "gone.py"}
    assert "is gone" in refusal(capsys, evaluate.load_script, record)
    checkpoint = tmp_path / "checkpoint.msgpack"
    assert "is not there" in refusal(capsys, evaluate.read_checkpoint, checkpoint)
    checkpoint.write_bytes(bytes(100))
    assert "or damaged" in refusal(capsys, evaluate.read_checkpoint, checkpoint)


def test_evaluate_finds_a_script_that_has_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = evaluate.load_script({"script": tmp_path / "fql.py"})
    assert Path(script.__file__) == ROOT / "baselines/fql.py"


def test_evaluate_takes_another_checkpoint(finished_run, tmp_path):
    """And another number of episodes; the run's own folder stays as it was."""
    checkpoint = tmp_path / "kept.msgpack"
    shutil.copy(finished_run / "checkpoint.msgpack", checkpoint)
    before = sorted(finished_run.iterdir())
    line = [sys.executable, ROOT / "tools/evaluate.py", finished_run, "--checkpoint", checkpoint]
    line += ["--episodes", "1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = "success_rate 0.0 return -1000.0 length 1000.0 episodes 1"
    assert done.stdout == f"step 60 seed 1 policy {scores}\n"
    assert sorted(finished_run.iterdir()) == before


def test_evaluate_leaves_out_a_run_without_a_checkpoint(finished_run, tmp_path):
    """One among many is named; alone it is an error."""
    shutil.copy(finished_run / "args.json", tmp_path)
    line = [sys.executable, ROOT / "tools/evaluate.py", "--episodes", "1", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "checkpoint.msgpack is not there" in done.stderr
    done = subprocess.run([*line, finished_run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path} is left out" in done.stderr
    assert done.stdout.count("seed 1 policy") == 1


# ---------------------------------------------------------------------- tools/collect_dataset.py


def collect(folder, episodes):
    """A process that collects."""
    tool = [sys.executable, ROOT / "tools/collect_dataset.py", DOMAIN]
    line = [*tool, "--episodes", episodes, "--workers", 1, "--out-dir", folder]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(word) for word in line], text=True, **pipes)


def test_of_two_collectors_one_waits(tmp_path):
    """Both end well, the work is done once, and what is there is whole."""
    processes = [collect(tmp_path, 3), collect(tmp_path, 3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    collected = ["3 episodes, 3003 steps" in out for out, _ in outputs]
    waited = ["is already there, with 3 episodes" in out for out, _ in outputs]
    assert sorted(collected) == [False, True]
    assert waited == [not did for did in collected]
    with np.load(tmp_path / f"{DOMAIN}-v0.npz") as data:
        assert data["terminals"].sum() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".{DOMAIN}-v0.lock",
        f"{DOMAIN}-v0-val.npz",
        f"{DOMAIN}-v0.json",
        f"{DOMAIN}-v0.npz",
    ]


def test_a_small_set_gives_way_to_a_larger_one(tmp_path):
    for episodes, there in ((1, 1), (2, 2), (1, 2)):
        process = collect(tmp_path, episodes)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        with np.load(tmp_path / f"{DOMAIN}-v0.npz") as data:
            assert data["terminals"].sum() == there


def test_the_page_on_loading_a_policy(finished_run, tmp_path):
    """Its code, word by word, on a run: an episode's score."""
    _, _, rest = (ROOT / "docs/load_policy.md").read_text().partition("```python\n")
    code, _, _ = rest.partition("```")
    (tmp_path / "runs").symlink_to(finished_run.parent)
    line = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.0 -1000.0 1000.0\n"
