"""The lesson's figure computes what qam_offline.py computes, on the same draws; run in Node."""

import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from vectors import assert_close

import qam_offline as qam
from experiments import closed_form

FIGURE = ROOT / "docs/assets/figure.js"


def target_velocity(inv_temp):
    """The velocity of the tilted mixture, as the expectation over samples' straight lines."""
    precision = 1 / closed_form.STD**2 + inv_temp
    means = (closed_form.MEANS / closed_form.STD**2 + inv_temp * np.array([2.0, 0.7])) / precision
    log_weights = precision * (means**2).sum(axis=1) / 2
    log_weights -= (closed_form.MEANS**2).sum(axis=1) / (2 * closed_form.STD**2)

    def velocity(x, t):
        variance = (1 - t) ** 2 + t**2 / precision
        offsets = x[..., None, :] - t[..., None] * means
        logs = log_weights - (offsets**2).sum(-1) / (2 * variance)
        slope = (t / precision - (1 - t)) / variance
        velocities = means + slope[..., None] * offsets
        return (jax.nn.softmax(logs, axis=-1)[..., None] * velocities).sum(-2)

    return velocity


def expected(inv_temp, noise):
    """What the figure's compute returns, by the script's functions: noise (T, 2)."""
    base = closed_form.behavior_velocity
    num_steps = len(noise)
    h = 1 / num_steps
    noise = jnp.asarray(noise, jnp.float32)[:, None]  # a batch of one
    xs = qam.sample_memoryless_sde(base, base, noise[0], noise[1:])

    def total_value(actions):
        return closed_form.value(actions).sum()

    g = -inv_temp * jax.grad(total_value)(xs[-1])
    adjoints = qam.lean_adjoint(base, xs[:-1], g)
    policy = target_velocity(inv_temp)
    t = jnp.arange(num_steps).reshape(-1, 1, 1) * h
    sigmas = qam.memoryless_sigma(t, h)

    def end(x0):
        return qam.sample_ode(base, x0, num_steps)

    _, pull_back = jax.vjp(end, noise[0])
    (gradient,) = pull_back(-inv_temp * jax.grad(total_value)(end(noise[0])))
    return {
        "xs": xs[:, 0],
        "g": g[0],
        "adjoints": adjoints[:, 0],
        "sigmas": sigmas[:, 0, 0],
        "loss": qam.adjoint_matching_loss(policy, base, xs[:-1], adjoints),
        "velocities": base(xs[:-1], jnp.broadcast_to(t, (num_steps, 1, 1)))[:, 0],
        "end of plain": end(noise[0])[0],
        "first gradient": gradient[0],
        "end of policyPath": qam.sample_ode(policy, noise[0], num_steps)[0],
    }


def check(state, inv_temp, noise):
    """`state` is the figure's."""
    state["end of plain"] = state["plain"][-1]
    state["first gradient"] = state["gradients"][0]
    state["end of policyPath"] = state["policyPath"][-1]
    for name, array in expected(inv_temp, noise).items():
        assert_close(np.array(state[name]), array, tolerance=1e-5)
    moved = np.array(state["targetVelocities"]) - np.array(state["velocities"])
    sigmas = np.array(state["sigmas"])[:, None]
    assert_close(moved, -(sigmas**2) * np.array(state["adjoints"]) / 2, tolerance=1e-5)


def run_in_node(expression):
    """The value of an expression of JavaScript; `figure` is the figure's module."""
    program = f"const figure = require({json.dumps(str(FIGURE))});"
    program += f"console.log(JSON.stringify({expression}));"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no Node here")


@needs_node
@pytest.mark.parametrize("inv_temp, num_steps", [(1.0, 10), (2.5, 4), (0.3, 30)])
def test_numbers(inv_temp, num_steps):
    noise = np.random.default_rng(num_steps).normal(size=(num_steps, 2)).tolist()
    check(run_in_node(f"figure.compute({inv_temp}, {json.dumps(noise)})"), inv_temp, noise)


@needs_node
@pytest.mark.parametrize("num_steps", [2, 10, 40])
def test_first_path_is_in_the_picture(num_steps):
    state = run_in_node(f"figure.compute(1, figure.draws(figure.FIRST_SEED, {num_steps}))")
    half = run_in_node("figure.HALF")
    xs = np.array(state["xs"])
    tips = xs[:-1] - 0.25 * np.array(state["adjoints"])
    for points in (xs, tips, state["plain"], state["policyPath"]):
        assert np.abs(points).max() < half


def test_it_is_small_and_asks_for_nothing():
    text = FIGURE.read_text()
    assert len(text.splitlines()) <= 400
    assert not re.search(r"https?:|import |fetch\(", text)
