"""qam_diffusion_variant.py's equations, against plain loops, closed forms and properties."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qam_diffusion_variant as diffusion
from tools.closed_form import MEANS, mmd, value


def tables(num_steps):
    """abar_k, alpha_k, sigma_k as lists; entry 0 is k = 0. Straight from the definitions."""
    f = lambda k: math.cos((k / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2
    abar, alpha, sigma = [1.0], [math.nan], [math.nan]
    for k in range(1, num_steps + 1):
        alpha.append(1 - min(1 - (f(k) / f(0)) / (f(k - 1) / f(0)), 0.999))
        abar.append(abar[-1] * alpha[-1])
        sigma.append(math.sqrt((1 - abar[k - 1]) / (1 - abar[k]) * (1 - alpha[k])))
    return abar, alpha, sigma


def mean(eps, x, k, num_steps):
    abar, alpha, _ = tables(num_steps)
    return (x - (1 - alpha[k]) / math.sqrt(1 - abar[k]) * eps) / math.sqrt(alpha[k])


def lookup(table, k):
    """Entries of a list with entry 0 for k = 0, for an array of floats k."""
    return jnp.asarray(table)[k.astype(int)]


def gaussian_epsilon(num_steps, center, variance):
    """E[e | x_k = x] for data N(center, variance I)."""
    abar, _, _ = tables(num_steps)

    def epsilon(x, k):
        a = lookup(abar, k)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * center) / (a * variance + 1 - a)

    return epsilon


def gaussian_slope(num_steps, variance, k):
    """d mu / d x_k with that epsilon."""
    abar, alpha, _ = tables(num_steps)
    return (1 - (1 - alpha[k]) / (abar[k] * variance + 1 - abar[k])) / math.sqrt(alpha[k])


def chain_variance(num_steps, variance):
    """Of x_0, when the chain runs with that epsilon."""
    _, _, sigma = tables(num_steps)
    now = 1.0
    for k in range(num_steps, 0, -1):
        now = gaussian_slope(num_steps, variance, k) ** 2 * now + sigma[k] ** 2
    return now


def moments(epsilon, base_epsilon, num_steps):
    """Exact mean and variance (2,) of x_0 for affine epsilons: the answers to no noise, and to a unit of each noise."""
    units = np.eye(num_steps, num_steps + 1, 1, dtype=np.float32)  # (N, B): row 0 of the batch has no noise at all
    inputs = jnp.tile(units[..., None], 2)  # (N, B, D)
    x_0 = np.asarray(diffusion.sample_ancestral(epsilon, base_epsilon, inputs[0], inputs[1:])[-1], float)
    return x_0[0], np.sum((x_0[1:] - x_0[0]) ** 2, axis=0)


def wave(x, k):
    """An epsilon that is neither linear in x nor the same for all k."""
    return jnp.sin(x + 0.3 * k) * jnp.cos(x[..., ::-1]) + 0.1 * k


@pytest.mark.parametrize("num_steps", [2, 10, 100])
def test_schedule_is_the_cosine_schedule(num_steps):
    k = jnp.arange(1.0, num_steps + 1)
    ours = np.asarray(diffusion.schedule(k, num_steps))
    abar, alpha, sigma = (np.array(table[1:]) for table in tables(num_steps))
    reference = [abar**0.5, (1 - abar) ** 0.5, alpha**0.5, (1 - alpha) ** 0.5, sigma]
    np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-9)
    assert ours[4, 0] == 0
    np.testing.assert_array_equal(diffusion.schedule(k[:, None], num_steps), ours[..., None])


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_sampling_is_the_loop_over_the_steps(shape):
    num_steps, (_, _, sigma) = 6, tables(6)
    noise = jax.random.normal(jax.random.key(0), (num_steps, *shape))
    base = lambda x, k: wave(-x, k)
    xs = diffusion.sample_ancestral(wave, base, noise[0], noise[1:])
    x, expected = noise[0], [noise[0]]
    for i, k in enumerate(range(num_steps, 0, -1)):
        eps = (wave if k > 1 else base)(x, jnp.full((*shape[:-1], 1), float(k)))
        x = mean(eps, x, k, num_steps) + (sigma[k] * noise[i + 1] if k > 1 else 0)
        expected.append(x)
    assert xs.shape == (num_steps + 1, *shape)
    np.testing.assert_allclose(xs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [2, 10])
def test_epsilon_sees_k_from_num_steps_down_to_1(num_steps):
    seen = []

    def epsilon(x, k):
        assert k.shape == (*x.shape[:-1], 1) and k.dtype == jnp.float32
        jax.debug.callback(lambda k: seen.append(float(k.ravel()[0])), k, ordered=True)
        return 0 * x

    jax.block_until_ready(
        diffusion.sample_ancestral(epsilon, epsilon, jnp.zeros((3, 2)), jnp.zeros((num_steps - 1, 3, 2)))
    )
    jax.effects_barrier()
    assert seen == list(range(num_steps, 0, -1))


def test_adjoint_is_the_gradient_through_the_base_chain():
    """x_{k-1} = mu + sigma_k noise, so the gradient of g.x_0 with respect to noise_k is sigma_k times the adjoint."""
    num_steps, (_, _, sigma) = 7, tables(7)
    noise = jax.random.normal(jax.random.key(0), (num_steps, 4, 3))
    g = jax.random.normal(jax.random.key(1), (4, 3))

    def end(noise):
        xs = diffusion.sample_ancestral(wave, wave, noise[0], noise[1:])
        return jnp.sum(g * xs[-1]), xs

    gradient, xs = jax.jit(jax.grad(end, has_aux=True))(noise)
    through = gradient[1:]
    adjoints = diffusion.lean_adjoint(wave, xs[:-1], g)
    assert adjoints.shape == (num_steps, 4, 3)
    np.testing.assert_array_equal(adjoints[-1], g)
    scale = np.array(sigma[:1:-1])[:, None, None]  # k = N .. 2
    np.testing.assert_allclose(scale * adjoints[:-1], through, rtol=1e-4, atol=1e-4 * np.abs(through).max())


@pytest.mark.parametrize("num_steps", [10, 30])
def test_gaussian_behaviour_and_linear_value_are_the_closed_form(num_steps):
    """Adjoints, the optimal epsilon to 1e-5, and what it samples: p_chain(a) exp(inv_temp w.a)."""
    abar, alpha, sigma = tables(num_steps)
    center, variance, inv_temp, w = np.array([0.3, -0.2]), 0.05, 3.0, np.array([2.0, 0.7])
    base = gaussian_epsilon(num_steps, center, variance)
    xs = jax.random.normal(jax.random.key(0), (num_steps, 5, 2))
    adjoints = diffusion.lean_adjoint(base, xs, jnp.tile(-inv_temp * w, (5, 1)))
    factors = [1.0]  # the adjoint of x_k is the terminal one times factors[k]
    for k in range(1, num_steps):
        factors.append(factors[-1] * gaussian_slope(num_steps, variance, k))
    expected = -inv_temp * np.array(factors[::-1])[:, None, None] * np.tile(w, (5, 1))
    np.testing.assert_allclose(adjoints, expected, rtol=1e-5)

    weight = [math.nan] + [(1 - alpha[k]) / math.sqrt(alpha[k] * (1 - abar[k])) for k in range(1, num_steps + 1)]
    shift = [0.0, 0.0] + [sigma[k] ** 2 * factors[k - 1] / weight[k] for k in range(2, num_steps + 1)]
    optimum = lambda x, k: base(x, k) - inv_temp * lookup(shift, k) * w

    def loss(scales):  # one for each k
        part = lambda x, k: base(x, k) + lookup(scales, k) * (optimum(x, k) - base(x, k))
        return diffusion.adjoint_matching_loss(part, base, xs, adjoints)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    (at_0, grad_0), (at_1, grad_1) = (value_and_grad(scale * jnp.ones(num_steps + 1)) for scale in (0, 1))
    assert at_1 < 1e-6 * at_0
    best = grad_0[2:] / (grad_0[2:] - grad_1[2:])  # of the scales, by which the loss is a parabola
    np.testing.assert_allclose((best - 1) * inv_temp * np.array(shift[2:]) * w.max(), 0, atol=1e-5)

    center_of_chain, variance_of_chain = moments(base, base, num_steps)
    center_of_optimum, variance_of_optimum = moments(optimum, base, num_steps)
    np.testing.assert_allclose(variance_of_chain, chain_variance(num_steps, variance), rtol=1e-4)
    np.testing.assert_allclose(variance_of_optimum, variance_of_chain, rtol=1e-4)
    np.testing.assert_allclose(center_of_optimum, center_of_chain + inv_temp * variance_of_chain * w, rtol=1e-4)
    np.testing.assert_allclose(center_of_chain, center, atol=1e-2)


@pytest.mark.parametrize("num_steps, left", [(10, (0.68, 0.45)), (100, (0.95, 0.87))])
def test_the_chain_is_narrower_than_the_data_by_what_the_header_says(num_steps, left):
    variances = np.array([1.0, 0.05])
    epsilon = gaussian_epsilon(num_steps, 0.0, variances)
    sampled = moments(epsilon, epsilon, num_steps)[1]
    np.testing.assert_allclose(sampled, [chain_variance(num_steps, variance) for variance in variances], rtol=1e-4)
    np.testing.assert_allclose(sampled / variances, left, atol=0.005)
    assert f"{left[0]:.0%} or {left[1]:.0%} at N = {num_steps}".replace("%", " %") in " ".join(
        diffusion.__doc__.split()
    )


def test_matching_loss_is_its_equation():
    num_steps, (_, _, sigma) = 5, tables(5)
    xs, adjoints = jax.random.normal(jax.random.key(0), (2, num_steps, 4, 3))
    base = lambda x, k: wave(-x, k)
    expected = 0.0
    for i, k in enumerate(range(num_steps, 1, -1)):
        k_array = jnp.full((4, 1), float(k))
        ours, its = (mean(eps(xs[i], k_array), xs[i], k, num_steps) for eps in (wave, base))
        expected += num_steps * np.mean(np.sum(((ours - its) / sigma[k] + sigma[k] * adjoints[i]) ** 2, axis=1))
    assert float(diffusion.adjoint_matching_loss(wave, base, xs, adjoints)) == pytest.approx(float(expected), rel=1e-4)


def test_matching_reaches_epsilon_alone():
    xs, adjoints = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    loss = lambda fast, base, xs, adjoints: diffusion.adjoint_matching_loss(
        lambda x, k: fast * x, lambda x, k: base * x, xs, adjoints
    )
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(1.3, 0.7, xs, adjoints)
    assert grads[0] != 0
    assert all(np.all(g == 0) for g in grads[1:])


def test_behaviour_loss_is_its_equation():
    num_steps, (abar, _, _) = 5, tables(5)
    actions, noise = jax.random.normal(jax.random.key(0), (2, 5, 3))
    valid, k = jnp.array([1.0, 0, 1, 1, 0]), jnp.arange(1.0, 6)[:, None]
    expected = 0.0
    for b in (0, 2, 3):
        x = math.sqrt(abar[b + 1]) * actions[b] + math.sqrt(1 - abar[b + 1]) * noise[b]
        expected += np.mean((wave(x, k[b]) - noise[b]) ** 2) / 5
    loss = diffusion.denoising_loss(wave, actions, valid, noise, k, num_steps)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture(scope="module")
def case():
    """Networks with parameters of their own for everything, and a batch of random numbers."""
    args = diffusion.Args(
        hidden_dims=(16, 16), num_critics=3, horizon=2, discount=0.99, rho=0.5, inv_temp=3.0, diffusion_steps=4
    )
    networks = diffusion.make_networks(args, 6, 3)
    init = jax.jit(lambda key: diffusion.init_state(args, networks, 6, 3, key))
    params, target_params = init(jax.random.key(0)).params, init(jax.random.key(1)).target_params
    draws = jax.random.normal(jax.random.key(2), (64, 18))
    ones = jnp.ones(64)
    batch = diffusion.Batch(draws[:, :6], jnp.tanh(draws[:, 6:12]), draws[:, 0], ones, ones, draws[:, 12:])
    return args, networks, params, target_params, batch


def test_a_network_predicts_noise_for_any_k_at_once(case):
    """NAME.apply(.., s, x, k) is epsilon(x, k), one k a row or one for all."""
    args, networks, params, _, batch = case
    epsilon = partial(networks.slow.apply, {"params": params["slow"]}, batch.observations)
    k = 1.0 + jnp.arange(64)[:, None] % 4
    together = epsilon(batch.actions, k)
    assert together.shape == (64, 6)
    for i in (1, 2, 3, 4):
        rows = np.arange(i - 1, 64, 4)
        alone = epsilon(batch.actions, jnp.full((64, 1), float(i)))
        np.testing.assert_allclose(alone[rows], together[rows], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(epsilon(batch.actions, jnp.array([float(i)])), alone, rtol=1e-5, atol=1e-6)
        assert np.abs(alone - epsilon(batch.actions, jnp.full((64, 1), 1.0 + i % 4))).max() > 1e-3
    constant = jax.tree.map(jnp.zeros_like, params["slow"])
    constant["Dense_2"]["bias"] += 1.0  # v is 1, so epsilon is sqrt(1 - abar) x + sqrt(abar)
    abar = np.array(tables(4)[0])[k.astype(int)]
    ours = networks.slow.apply({"params": constant}, batch.observations, batch.actions, k)
    np.testing.assert_allclose(ours, np.sqrt(1 - abar) * batch.actions + np.sqrt(abar), rtol=1e-5, atol=1e-6)


def test_policy_loss_is_made_of_its_equations(case, monkeypatch):
    """What it hands to the functions that draw nothing: every k, base and fast in their places, the adjoint at x_0."""
    args, networks, params, target_params, batch = case
    xs, adjoints = jax.random.normal(jax.random.key(6), (5, 64, 6)), jax.random.normal(jax.random.key(7), (4, 64, 6))
    answers = {"denoising_loss": 0.25, "sample_ancestral": xs, "lean_adjoint": adjoints, "adjoint_matching_loss": 0.5}
    seen = {}
    for name, answer in answers.items():
        spy = lambda *given, name=name, answer=answer: (seen.setdefault(name, given), answer)[1]
        monkeypatch.setattr(diffusion, name, spy)
    target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
    shared = (args, networks, params, target_params, batch)
    loss, metrics = diffusion.policy_loss(*shared, None, target_q, jax.random.key(0))
    assert (loss, metrics["flow_loss"], metrics["adjoint_loss"]) == (0.75, 0.25, 0.5)

    x, k = batch.actions, jnp.full((64, 1), 2.0)
    slow, fast, base = (
        networks.slow.apply({"params": p}, batch.observations, x, k)
        for p in (params["slow"], params["fast"], target_params["slow"])
    )
    epsilon, actions, valid, noise, k_drawn, num_steps = seen["denoising_loss"]
    assert sorted(set(k_drawn.ravel().tolist())) == [1.0, 2.0, 3.0, 4.0] and k_drawn.shape == (64, 1)
    assert num_steps == 4 and actions is batch.actions and valid is batch.valid and noise.shape == (64, 6)
    np.testing.assert_array_equal(epsilon(x, k), slow)
    for name in ("sample_ancestral", "adjoint_matching_loss"):
        np.testing.assert_array_equal(seen[name][0](x, k), fast)
        np.testing.assert_array_equal(seen[name][1](x, k), base)
    assert seen["sample_ancestral"][2].shape == (64, 6) and seen["sample_ancestral"][3].shape == (3, 64, 6)
    epsilon, states, g = seen["lean_adjoint"]
    np.testing.assert_array_equal(epsilon(x, k), base)
    np.testing.assert_array_equal(states, xs[:-1])
    value = lambda a: jnp.sum(jnp.mean(target_q(batch.observations, jnp.clip(a, -1, 1)), axis=0))
    np.testing.assert_allclose(g, -3.0 * jax.grad(value)(xs[-1]), rtol=1e-4, atol=1e-5)
    assert np.any(g != 0) and np.any(g == 0)  # an action beyond the bounds has no slope
    np.testing.assert_array_equal(seen["adjoint_matching_loss"][2], xs[:-1])
    np.testing.assert_array_equal(seen["adjoint_matching_loss"][3], adjoints)


def test_policy_loss_leaves_critic_and_targets_alone(case):
    args, networks, params, target_params, batch = case

    def loss(params, target_params):
        target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
        return diffusion.policy_loss(args, networks, params, target_params, batch, None, target_q, jax.random.key(0))[0]

    grads, target_grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, target_params)
    assert all(np.all(g == 0) for g in jax.tree.leaves((grads["critic"], target_grads)))
    assert all(np.any(g != 0) for g in jax.tree.leaves((grads["slow"], grads["fast"])))


def test_without_temperature_matching_is_zero_where_fast_is_base(case):
    args, networks, params, target_params, batch = case
    args = diffusion.dataclasses.replace(args, inv_temp=0.0)
    params = params | {"fast": target_params["slow"]}
    target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
    shared = (args, networks, params, target_params, batch)
    _, metrics = jax.jit(lambda key: diffusion.policy_loss(*shared, None, target_q, key))(jax.random.key(0))
    assert metrics["adjoint_loss"] == 0


def test_acting_is_the_chain_of_fast_that_ends_with_slow(case):
    """With the target copy of slow where the caller has one; a' is made the same way."""
    args, networks, params, target_params, batch = case
    noise, next_noise = (jax.random.normal(jax.random.key(i), (4, 64, 6)) for i in (3, 4))
    policy = jax.jit(partial(diffusion.policy, args, networks))
    apply = networks.slow.apply

    @jax.jit
    def chain(last):
        fast, last = (partial(apply, {"params": p}, batch.observations) for p in (params["fast"], last))
        return jnp.clip(diffusion.sample_ancestral(fast, last, noise[0], noise[1:])[-1], -1, 1)

    acting = params | {"target": target_params}
    expected = chain(target_params["slow"])
    np.testing.assert_allclose(policy(acting, batch.observations, noise), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(policy(params, batch.observations, noise), chain(params["slow"]), rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() == 1 and np.abs(expected - chain(params["slow"])).max() > 1e-3

    next_actions = policy(acting, batch.next_observations, next_noise)
    next_q = networks.critic.apply({"params": target_params["critic"]}, batch.next_observations, next_actions)
    y = diffusion.td_target(batch.rewards, batch.masks, next_q, 0.99**2, 0.5)
    q = networks.critic.apply({"params": params["critic"]}, batch.observations, batch.actions)
    loss = jax.jit(lambda key: diffusion.critic_loss(args, networks, params, target_params, batch, key)[0])
    assert float(loss(jax.random.key(4))) == pytest.approx(float(np.mean((q - y) ** 2)), rel=1e-4)


def test_best_of_n_takes_the_chunk_of_highest_value(case):
    args, networks, params, _, batch = case
    args, key = diffusion.dataclasses.replace(args, best_of_n=8), jax.random.key(5)
    actions = jax.jit(partial(diffusion.sample_actions, args, networks))(params, batch.observations, key)
    noise = jax.random.normal(key, (4, 8, 64, 6))
    q = partial(networks.critic.apply, {"params": params["critic"]}, batch.observations)
    policy = jax.jit(partial(diffusion.policy, args, networks, params, batch.observations))
    drawn = [policy(noise[:, n]) for n in range(8)]
    best = np.max([q(a).mean(axis=0) for a in drawn], axis=0)
    assert actions.shape == (64, 6)
    np.testing.assert_allclose(q(actions).mean(axis=0), best, rtol=1e-4, atol=1e-5)


def test_bandit_converges_to_the_chain_times_exp_q():
    """A network added to the analytic behaviour, inv_temp 1: samples against those of p_chain weighted by exp(Q)."""
    num_steps, batch_size, num_updates = 10, 128, 300
    abar, _, _ = tables(num_steps)
    network = diffusion.MLP((64, 64), 2)
    params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_updates))

    def base(x, k):
        """E[e | x_k = x] for the four Gaussians."""
        a = lookup(abar, k)
        offsets = x[..., None, :] - jnp.sqrt(a)[..., None] * MEANS  # (..., 4, 2)
        variance = a * 0.15**2 + 1 - a
        weights = jax.nn.softmax(-(offsets**2).sum(-1) / (2 * variance), axis=-1)  # (..., 4)
        return jnp.sqrt(1 - a) * (weights[..., None] * offsets).sum(-2) / variance

    def fast(params):
        features = lambda x, k: jnp.concatenate([x, k / num_steps], -1)
        return lambda x, k: base(x, k) + jnp.sqrt(lookup(abar, k)) * network.apply(params, features(x, k))

    def loss(params, key):
        noise = jax.random.normal(key, (num_steps, batch_size, 2))
        xs = jax.lax.stop_gradient(diffusion.sample_ancestral(fast(params), base, noise[0], noise[1:]))
        terminal = -jax.grad(lambda a: value(a).sum())(xs[-1])
        adjoints = diffusion.lean_adjoint(base, xs[:-1], terminal)
        return diffusion.adjoint_matching_loss(fast(params), base, xs[:-1], adjoints)

    def step(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), num_updates)
    (params, _), _ = jax.jit(partial(jax.lax.scan, step))((params, optimizer.init(params)), keys)
    rng = np.random.default_rng(0)
    noise = jax.random.normal(jax.random.key(2), (num_steps, 12_000, 2))
    sample = np.asarray(diffusion.sample_ancestral(fast(params), base, noise[0, :2000], noise[1:, :2000])[-1])
    chain = np.asarray(diffusion.sample_ancestral(base, base, noise[0], noise[1:])[-1])
    weights = np.exp(value(chain).astype(float))
    target = chain[rng.choice(len(chain), 2000, p=weights / weights.sum())]
    start, distance = mmd(chain[:2000], target), mmd(sample, target)
    print(f"bandit: MMD {distance:.4f} to p_chain exp(Q), {start:.4f} without training")
    assert start > 0.2 and distance < 0.03
