"""experiments/sde_variants.py: its steps against the formulas and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam_offline as qam
from experiments import sde_variants
from experiments.sde_variants import Rollout

T = 6
B = 4
D = 2
X0 = jax.random.normal(jax.random.key(0), (B, D))
NOISE = jax.random.normal(jax.random.key(1), (T - 1, B, D))


def velocity(x, t):
    return 0.5 * jnp.sin(x + t)


def base_velocity(x, t):
    return jnp.cos(1.3 * x + t) * x


def test_euler_is_the_scripts_own():
    rollout = Rollout("euler")
    xs = rollout.sample(velocity, base_velocity, X0, NOISE)
    expected = qam.sample_memoryless_sde(velocity, base_velocity, X0, NOISE)
    np.testing.assert_allclose(xs, expected, atol=1e-5)
    adjoints = jax.random.normal(jax.random.key(2), (T, B, D))
    loss = rollout.matching_loss(velocity, base_velocity, xs[:-1], adjoints)
    expected = qam.adjoint_matching_loss(velocity, base_velocity, xs[:-1], adjoints)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("sde", ["exact", "posterior", "calibrated"])
def test_adjoints_are_gradients_through_the_base(sde):
    flow_loss = jnp.zeros(T).at[-1].set(1.0)
    if sde == "calibrated":
        flow_loss = jnp.linspace(0.2, 0.9, T)
    rollout = Rollout(sde, flow_loss)
    g = jax.random.normal(jax.random.key(3), (B, D))

    def end(noise):
        return jnp.sum(g * rollout.sample(base_velocity, base_velocity, X0, noise)[-1])

    xs = rollout.sample(base_velocity, base_velocity, X0, NOISE)
    adjoints = rollout.adjoints(base_velocity, xs[:-1], g)
    sigmas = [rollout.sigma(jnp.float32(i / T), 1 / T) for i in range(T - 1)]
    scale = np.sqrt(1 / T) * np.array(sigmas)[:, None, None]  # of the noise that leads to x_1 ..
    np.testing.assert_allclose(scale * adjoints[:-1], jax.grad(end)(NOISE), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(adjoints[-1], g)


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_calibrated_steps_reverse_the_noising_of_gaussian_data(variance):
    """With the exact velocity and its exact loss, the chain's marginal is (1 - t) x_0 + t x_1's."""
    h = 1 / T
    times = np.arange(T) * h
    marginal = (1 - times) ** 2 + times**2 * variance
    rollout = Rollout("calibrated", jnp.array(variance / marginal))
    now = 1.0  # variance of x_i
    for i in range(T - 1):
        t = i * h
        u = t + h
        p, k = rollout.coefficients(t, h)
        slope = (t * variance - (1 - t)) / marginal[i]  # v = slope x
        sigma = float(rollout.sigma(jnp.float32(t), h))
        now = (1 + h * (p * slope - k / u)) ** 2 * now + h * sigma**2
        assert now == pytest.approx(marginal[i + 1], rel=1e-4)


@pytest.mark.parametrize("sde", ["exact", "posterior", "calibrated"])
def test_policy_loss_is_the_scripts_with_another_rollout(sde):
    """The same behavior loss, another matching loss; and the script is left as it was."""
    args = qam.Args(hidden_dims=(8,), num_critics=2, horizon=1, flow_steps=4, inv_temp=1.0)
    networks = qam.make_networks(args, 3, D)
    state = qam.init_state(args, networks, 3, D, jax.random.key(0))
    observations = jnp.ones((B, 3))
    ones = jnp.ones(B)
    batch = qam.Batch(observations, jnp.tanh(X0), ones, ones, ones, observations)

    def q(observations, actions):
        return -((actions - 0.5) ** 2).sum(-1)[None]

    key = jax.random.key(4)
    shared = (args, networks, state.params, state.target_params, batch, q, q, key)
    _, expected = qam.policy_loss(*shared)
    _, metrics = sde_variants.policy_loss(sde, *shared)
    assert metrics["flow_loss"] == expected["flow_loss"]
    assert np.isfinite(metrics["adjoint_loss"])
    assert abs(metrics["adjoint_loss"] / expected["adjoint_loss"] - 1) > 1e-3
    _, again = qam.policy_loss(*shared)
    assert again == expected
