"""tools/sde_variants.py: its steps against the formulas and against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam_offline as qam
from tools import sde_variants

T, B, D = 6, 4, 2
VELOCITY, BASE = (lambda x, t: 0.5 * jnp.sin(x + t)), (lambda x, t: jnp.cos(1.3 * x + t) * x)
X0, NOISE = jax.random.normal(jax.random.key(0), (B, D)), jax.random.normal(jax.random.key(1), (T - 1, B, D))


def test_euler_is_the_scripts_own():
    ours = sde_variants.sample_rollout("euler", VELOCITY, BASE, X0, NOISE, None)
    np.testing.assert_allclose(ours, qam.sample_memoryless_sde(VELOCITY, BASE, X0, NOISE), atol=1e-5)
    adjoints = jax.random.normal(jax.random.key(2), (T, B, D))
    loss = sde_variants.rollout_matching_loss("euler", VELOCITY, BASE, ours[:-1], adjoints, None)
    np.testing.assert_allclose(loss, qam.adjoint_matching_loss(VELOCITY, BASE, ours[:-1], adjoints), rtol=1e-5)


@pytest.mark.parametrize("sde", ["exact", "posterior", "calibrated"])
def test_adjoints_are_gradients_through_the_base(sde):
    flow_loss = jnp.linspace(0.2, 0.9, T) if sde == "calibrated" else jnp.zeros(T).at[-1].set(1.0)
    g = jax.random.normal(jax.random.key(3), (B, D))
    end = lambda noise: jnp.sum(g * sde_variants.sample_rollout(sde, BASE, BASE, X0, noise, flow_loss)[-1])
    xs = sde_variants.sample_rollout(sde, BASE, BASE, X0, NOISE, flow_loss)
    adjoints = sde_variants.rollout_adjoints(sde, BASE, xs[:-1], g, flow_loss)
    sigmas = [sde_variants.rollout_step(sde, jnp.float32(i / T), 1 / T, flow_loss)[2] for i in range(T - 1)]
    scale = np.sqrt(1 / T) * np.array(sigmas)[:, None, None]  # of the noise that leads to x_1 .. x_{T-1}
    np.testing.assert_allclose(scale * adjoints[:-1], jax.grad(end)(NOISE), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(adjoints[-1], g)


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_calibrated_steps_reverse_the_noising_of_gaussian_data(variance):
    """With the exact velocity and its exact loss, the chain's marginal at each t_i is that of (1 - t) x_0 + t x_1."""
    slope = lambda t: (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance)  # v = slope x
    h, now = 1 / T, 1.0
    loss = jnp.array([variance / ((1 - i * h) ** 2 + (i * h) ** 2 * variance) for i in range(T)])
    for i in range(T - 1):
        t, u = i * h, (i + 1) * h
        p, k, sigma = (float(x) for x in sde_variants.rollout_step("calibrated", jnp.float32(t), h, loss))
        now = (1 + h * (p * slope(t) - k / u)) ** 2 * now + h * sigma**2
        assert now == pytest.approx((1 - u) ** 2 + u**2 * variance, rel=1e-4)
