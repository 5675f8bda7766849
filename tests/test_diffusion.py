"""qam_diffusion_variant.py's equations, against plain loops, closed forms and properties."""

import math
from functools import partial

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from vectors import Case, all_zero

import qam_diffusion_variant as diffusion
from experiments import closed_form

KEY = jax.random.key(0)

# Per cent of the data's variance, 1.0 and 0.05, that N steps keep.
KEPT = {10: (68, 45), 100: (95, 87)}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tables(num_steps):
    """abar_k, alpha_k, sigma_k as arrays, k = 0 .. N: equations (2) and (4), one k at a time."""
    abar = [1.0]
    alpha = [math.nan]
    sigma = [math.nan]
    steps = np.arange(num_steps + 1) / num_steps
    f = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    for k in range(1, num_steps + 1):
        alpha.append(max(f[k] / f[k - 1], 0.001))
        abar.append(abar[-1] * alpha[-1])
        shrinks = (1 - abar[k - 1]) / (1 - abar[k])
        sigma.append(math.sqrt(shrinks * (1 - alpha[k])))
    return np.array(abar), np.array(alpha), np.array(sigma)


def mean(eps, x, k, num_steps):
    """mu of (4)."""
    abar, alpha, _ = tables(num_steps)
    weight = (1 - alpha[k]) / math.sqrt(1 - abar[k])
    return (x - weight * eps) / math.sqrt(alpha[k])


def abar_of(k, num_steps):
    """abar_k for an array of floats k."""
    abar, _, _ = tables(num_steps)
    return jnp.asarray(abar)[k.astype(int)]


def chain(epsilon, base_epsilon, noise):
    """States x_N .. x_0; the first noise is x_N."""
    return diffusion.sample_ancestral(epsilon, base_epsilon, noise[0], noise[1:])


def wave(x, k):
    """An epsilon that is neither linear in x nor the same for all k."""
    turned = jnp.flip(x, axis=-1)
    return jnp.sin(x + 0.3 * k) * jnp.cos(turned) + 0.1 * k


def base_wave(x, k):
    return wave(-x, k)


# ------------------------------------------------------------------------------ building blocks


@pytest.mark.parametrize("num_steps", [2, 10, 100])
def test_schedule_is_the_cosine_schedule(num_steps):
    abar, alpha, sigma = tables(num_steps)
    k = jnp.arange(1.0, num_steps + 1)
    schedule = diffusion.schedule(k, num_steps)
    roots = np.sqrt([abar, 1 - abar, alpha, 1 - alpha])
    expected = np.vstack([roots, sigma])[:, 1:]
    assert_allclose(schedule, expected, rtol=1e-6, atol=1e-9)
    of_column = diffusion.schedule(k[:, None], num_steps)
    assert_array_equal(of_column[..., 0], schedule)


def test_sampling_is_the_loop_over_the_steps():
    _, _, sigma = tables(6)
    noise = normal(0, 6, 4, 3)
    xs = chain(wave, base_wave, noise)
    x = noise[0]
    expected = [x]
    for k in (6, 5, 4, 3, 2):
        x = mean(wave(x, k), x, k, 6)
        x += sigma[k] * noise[7 - k]
        expected.append(x)
    expected.append(mean(base_wave(x, 1), x, 1, 6))
    assert_allclose(xs, expected, rtol=1e-4, atol=1e-4)


def test_adjoint_is_the_gradient_through_the_base_chain():
    """x_{k-1} = mu + sigma_k noise_k: the gradient to noise_k is sigma_k times the adjoint."""
    _, _, sigma = tables(7)
    noise = normal(0, 7, 4, 3)
    g = normal(1, 4, 3)

    def end(noise):
        xs = chain(wave, wave, noise)
        return jnp.sum(g * xs[-1]), xs

    gradient_and_xs = jax.jit(jax.grad(end, has_aux=True))
    gradient, xs = gradient_and_xs(noise)
    adjoints = diffusion.lean_adjoint(wave, xs[:-1], g)
    assert_array_equal(adjoints[-1], g)
    scale = sigma[:1:-1, None, None]  # k = N .. 2
    tolerance = 1e-4 * np.abs(gradient).max()
    through = scale * adjoints[:-1]
    assert_allclose(through, gradient[1:], rtol=1e-4, atol=tolerance)


def test_matching_loss_is_its_equation():
    _, _, sigma = tables(5)
    xs = normal(0, 5, 4, 3)
    adjoints = normal(1, 5, 4, 3)
    expected = 0.0
    for i in range(4):
        k = 5 - i
        x = xs[i]
        ours = mean(wave(x, k), x, k, 5)
        its = mean(base_wave(x, k), x, k, 5)
        residual = (ours - its) / sigma[k] + sigma[k] * adjoints[i]
        expected += 5 * np.sum(residual**2) / len(x)
    loss = diffusion.adjoint_matching_loss(wave, base_wave, xs, adjoints)
    assert_allclose(loss, expected, rtol=1e-4)


def test_matching_reaches_epsilon_alone():
    xs = normal(0, 5, 4, 3)
    adjoints = normal(1, 5, 4, 3)

    def loss(slope, base_slope, xs, adjoints):
        def epsilon(x, k):
            return slope * x

        def base_epsilon(x, k):
            return base_slope * x

        return diffusion.adjoint_matching_loss(epsilon, base_epsilon, xs, adjoints)

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))
    of_epsilon, *others = gradients(1.3, 0.7, xs, adjoints)
    assert of_epsilon != 0
    assert all_zero(others)


def test_behavior_loss_is_its_equation():
    abar, _, _ = tables(5)
    signal = np.sqrt(abar)
    spread = np.sqrt(1 - abar)
    actions = normal(0, 5, 3)
    noise = normal(1, 5, 3)
    valid = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    k = jnp.arange(1.0, 6)[:, None]
    expected = 0.0
    for row in (0, 2, 3):
        k_row = row + 1
        x = signal[k_row] * actions[row] + spread[k_row] * noise[row]
        error = wave(x, k_row) - noise[row]
        expected += np.mean(error**2) / 5
    loss = diffusion.denoising_loss(wave, actions, valid, noise, k, 5)
    assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("num_steps", KEPT)
def test_the_chain_is_narrower_than_the_data_by_what_the_header_says(num_steps):
    """Gaussian data of variance 1.0 and 0.05, whose epsilon is linear: the variance of x_0."""
    variances = np.array([1.0, 0.05])

    def epsilon(x, k):
        a = abar_of(k, num_steps)
        return jnp.sqrt(1 - a) * x / (a * variances + 1 - a)

    # Row i of the batch answers to a unit of noise i alone.
    units = jnp.eye(num_steps)[..., None] * jnp.ones(2)
    xs = chain(epsilon, epsilon, units)
    kept = np.sum(xs[-1] ** 2, axis=0) / variances
    wide, narrow = KEPT[num_steps]
    assert_allclose(100 * kept, [wide, narrow], atol=0.5)
    header = " ".join(diffusion.__doc__.split())
    assert f"{wide} % or {narrow} % at N = {num_steps}" in header


# --------------------------------------------------------------------------------- with networks


@pytest.fixture(scope="module")
def case():
    """Small networks, targets with parameters of their own, and a batch of random numbers."""
    args = diffusion.Args(
        hidden_dims=(16, 16),
        num_critics=3,
        horizon=2,
        discount=0.99,
        rho=0.5,
        inv_temp=3.0,
        diffusion_steps=4,
    )
    networks = diffusion.make_networks(args, 6, 3)
    init = jax.jit(partial(diffusion.init_state, args, networks, 6, 3))
    ones = jnp.ones(64)
    batch = diffusion.Batch(
        observations=normal(2, 64, 6),
        actions=jnp.tanh(normal(3, 64, 6)),
        rewards=normal(4, 64),
        masks=ones,
        valid=ones.at[:9].set(0),
        next_observations=normal(5, 64, 6),
    )
    return Case(
        arrays={},
        args=args,
        networks=networks,
        dataset=None,
        batch=batch,
        params=init(KEY).params,
        target_params=init(jax.random.key(1)).target_params,
    )


def test_a_network_takes_a_k_for_each_row_or_one_for_all(case):
    epsilon = case.closure("policy", case.params, case.batch.observations)
    actions = case.batch.actions
    ks = 1.0 + jnp.arange(64)[:, None] % 4
    together = epsilon(actions, ks)
    for k in (1, 2, 3, 4):
        alone = epsilon(actions, float(k))
        difference = np.abs(alone - together).max(axis=1)
        same_k = ks[:, 0] == k
        assert np.all((difference < 1e-5) == same_k)


def test_policy_loss_is_made_of_its_equations(case, monkeypatch):
    e = normal(6, 64, 6)
    noise = normal(7, 4, 64, 6)
    k = jax.random.randint(KEY, (64, 1), 1, 5)
    draws = iter([e, noise[0], noise[1:]])

    def randint(key, shape, low, high):
        assert (shape, low, high) == ((64, 1), 1, 5)
        return k

    monkeypatch.setattr(jax.random, "normal", lambda key, shape: next(draws))
    monkeypatch.setattr(jax.random, "randint", randint)
    target_q = case.closure("critic", case.target_params)

    @jax.jit
    def losses(params):
        return diffusion.policy_loss(*case.shared(params), None, target_q, KEY)

    @jax.jit
    def expected_losses(params):
        batch = case.batch
        behavior = case.closure("behavior", params, batch.observations)
        policy = case.closure("policy", params, batch.observations)
        base = case.closure("behavior", case.target_params, batch.observations)
        ks = k.astype(float)
        flow_loss = diffusion.denoising_loss(behavior, batch.actions, batch.valid, e, ks, 4)
        xs = chain(policy, base, noise)

        def value(actions):
            actions = jnp.clip(actions, -1, 1)
            return target_q(batch.observations, actions).mean(axis=0).sum()

        g = -3.0 * jax.grad(value)(xs[-1])
        adjoints = diffusion.lean_adjoint(base, xs[:-1], g)
        adjoint_loss = diffusion.adjoint_matching_loss(policy, base, xs[:-1], adjoints)
        return flow_loss, adjoint_loss

    loss, metrics = losses(case.params)
    flow_loss, adjoint_loss = expected_losses(case.params)
    assert_allclose(metrics["flow_loss"], flow_loss, rtol=1e-5)
    assert_allclose(metrics["adjoint_loss"], adjoint_loss, rtol=1e-5)
    assert_allclose(loss, flow_loss + adjoint_loss, rtol=1e-5)


def test_policy_loss_leaves_critic_and_targets_alone(case):
    def loss(params, target_params):
        target_q = case.closure("critic", target_params)
        shared = case._replace(target_params=target_params).shared(params)
        return diffusion.policy_loss(*shared, None, target_q, KEY)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    grads, target_grads = gradients(case.params, case.target_params)
    assert all_zero(target_grads)
    assert all_zero(grads["critic"])
    assert not all_zero(grads["behavior"])
    assert not all_zero(grads["policy"])


def test_acting_is_the_chain_of_policy_that_ends_with_behavior(case):
    """With behavior's target copy where the caller has one."""
    observations = case.batch.observations
    noise = normal(8, 4, 64, 6)
    policy = case.closure("policy", case.params, observations)

    def actions_with(last_params):
        base = case.closure("behavior", last_params, observations)
        xs = chain(policy, base, noise)
        return jnp.clip(xs[-1], -1, 1)

    policy_actions = partial(diffusion.policy_actions, case.args, case.networks)
    actions = policy_actions(case.params, observations, noise)
    assert_allclose(actions, actions_with(case.params), atol=1e-4)
    with_target = {**case.params, "target": case.target_params}
    actions = policy_actions(with_target, observations, noise)
    assert_allclose(actions, actions_with(case.target_params), atol=1e-4)
    assert np.abs(actions - actions_with(case.params)).max() > 1e-3


def test_next_actions_are_made_as_the_policy_acts(case):
    batch = case.batch
    noise = normal(8, 4, 64, 6)
    with_target = {**case.params, "target": case.target_params}
    policy_actions = partial(diffusion.policy_actions, case.args, case.networks)
    next_actions = policy_actions(with_target, batch.next_observations, noise)
    target_q = case.closure("critic", case.target_params)
    next_q = target_q(batch.next_observations, next_actions)
    y = diffusion.td_target(batch.rewards, batch.masks, next_q, 0.99**2, 0.5)
    q = case.closure("critic", case.params)(batch.observations, batch.actions)
    shared = case.shared(case.params)
    loss, _ = diffusion.critic_loss(*shared, jax.random.key(8))
    expected = np.mean(batch.valid * (q - y) ** 2)
    assert_allclose(loss, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------ the bandit


def bandit_base(num_steps):
    """E[e | x_k = x] for the four Gaussians of experiments/closed_form.py."""

    def epsilon(x, k):
        a = abar_of(k, num_steps)  # (..., 1)
        variance = a * closed_form.STD**2 + 1 - a
        means = jnp.sqrt(a)[..., None] * closed_form.MEANS  # (..., 4, 2)
        offsets = x[..., None, :] - means
        squares = jnp.sum(offsets**2, axis=-1)  # (..., 4)
        weights = jax.nn.softmax(-squares / (2 * variance), axis=-1)
        offset = jnp.sum(weights[..., None] * offsets, axis=-2)
        return jnp.sqrt(1 - a) * offset / variance

    return epsilon


@pytest.mark.slow
def test_bandit_converges_to_the_chain_times_exp_q():
    """A network added to the analytic base, N = 10, inv_temp 1: samples against p_chain exp(Q)."""
    num_steps = 10
    network = diffusion.MLP((64, 64), 2)
    base = bandit_base(num_steps)

    def policy_of(params):
        def epsilon(x, k):
            inputs = jnp.concatenate([x, k / num_steps], axis=-1)
            signal = jnp.sqrt(abar_of(k, num_steps))
            return base(x, k) + signal * network.apply(params, inputs)

        return epsilon

    def loss(params, key):
        policy = policy_of(params)
        noise = jax.random.normal(key, (num_steps, 128, 2))
        xs = chain(policy, base, noise)
        xs = jax.lax.stop_gradient(xs)
        g = -bandit.gradient_of_value(xs[-1])
        adjoints = diffusion.lean_adjoint(base, xs[:-1], g)
        return diffusion.adjoint_matching_loss(policy, base, xs[:-1], adjoints)

    def sample(epsilon, seed, size):
        noise = normal(seed, num_steps, size, 2)
        xs = chain(epsilon, base, noise)
        return np.asarray(xs[-1])

    params = bandit.train(network, loss, num_updates=300)
    of_chain = sample(base, 2, 12_000)
    weights = np.exp(np.float64(closed_form.value(of_chain)))
    rng = np.random.default_rng(0)
    chosen = rng.choice(12_000, 2000, p=weights / weights.sum())
    target = of_chain[chosen]
    distance = closed_form.mmd(sample(policy_of(params), 3, 2000), target)
    start = closed_form.mmd(of_chain[:2000], target)
    print(f"squared MMD to p_chain exp(Q): {distance:.4f}, from the chain {start:.4f}")
    assert start > 0.2
    assert distance < 0.03
