"""docs/reference_vectors.npz is what the script computes; its checks in NumPy and PyTorch."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from vectors import assert_close, nested

import qam_offline as qam
from dev import make_reference_vectors

# An interpreter that has PyTorch: .ci/run makes one.
HAS_TORCH = importlib.util.find_spec("torch") is not None
TORCH_PYTHON = os.environ.get("TORCH_PYTHON", sys.executable if HAS_TORCH else None)


@pytest.mark.slow
def test_vectors_are_those_of_the_script():
    arrays = make_reference_vectors.make_arrays()
    stored = dict(np.load(make_reference_vectors.PATH))
    assert arrays.keys() == stored.keys()
    for name in arrays:
        if np.any(stored[name]):
            assert_close(arrays[name], stored[name])
    assert make_reference_vectors.PATH.stat().st_size < 100_000
    # Some of the actions at the end are outside of [-1, 1], where the critic's gradient is 0.
    outside = np.abs(stored["xs"][-1]) > 1
    assert 0 < outside.mean() < 1
    assert np.array_equal(stored["g"] == 0, outside)


def test_a_target_that_is_not_detached_would_be_seen():
    """Q' has Q's parameters there, so that a gradient through y changes the critic's."""
    case = dict(np.load(make_reference_vectors.PATH))
    args = qam.Args(hidden_dims=(16, 16), num_critics=2, horizon=2)
    networks = qam.make_networks(args, 3, 2)
    params = nested(case, "params")["critic"]

    def loss(params, target_params):
        next_q = networks.critic.apply(
            {"params": target_params}, case["next_observations"], case["next_actions"]
        )
        discount_h = case["discount"] ** args.horizon
        y = qam.td_target(case["rewards"], case["masks"], next_q, discount_h, case["rho"])
        q = networks.critic.apply({"params": params}, case["observations"], case["actions"])
        return jnp.mean(case["valid"] * (q - y) ** 2)

    stored = nested(case, "grad")["critic"]
    assert_close(jax.grad(loss)(params, params), stored)
    not_detached = jax.grad(lambda params: loss(params, params))(params)
    with pytest.raises(AssertionError):
        assert_close(not_detached, stored)


def test_check_in_numpy():
    """As it stands in the documentation."""
    text = (ROOT / "docs/reference_vectors.md").read_text()
    code = re.search("```python\n(.*?)```", text, re.S)[1]
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    wrong = code.replace("2 * velocity", "1.99 * velocity")
    done = subprocess.run([sys.executable, "-c", wrong], cwd=ROOT, capture_output=True)
    assert b"AssertionError" in done.stderr


@pytest.mark.skipif(TORCH_PYTHON is None, reason="no PyTorch here; TORCH_PYTHON may name a Python")
def test_port_in_pytorch(tmp_path):
    line = [TORCH_PYTHON, ROOT / "experiments/torch_port.py"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9

    port = (ROOT / "experiments/torch_port.py").read_text()
    for folder in ("docs", "experiments"):
        (tmp_path / folder).mkdir()
    vectors = make_reference_vectors.PATH
    (tmp_path / "docs" / vectors.name).write_bytes(vectors.read_bytes())
    wrong = tmp_path / "experiments/torch_port.py"
    wrong.write_text(port.replace("drift(v_base, x, u, u)", "drift(v_base, x, i * h, u)"))
    done = subprocess.run([TORCH_PYTHON, wrong], capture_output=True, text=True)
    assert "error: adjoints" in done.stderr
