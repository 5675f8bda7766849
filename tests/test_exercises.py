"""The lesson's exercises: each change, made in qam_offline.py, does what its answer says.

An exercise is a text to be replaced and what takes its place; both stand in the chapter.
"""

import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from numpy.testing import assert_allclose

import qam_offline as qam
from experiments import closed_form

pytestmark = pytest.mark.slow
BASE = closed_form.behavior_velocity
STEPS = 10
SAMPLES = 2000


@pytest.fixture
def change(request):
    """change(old, new): qam_offline.py as a module, changed as the exercise says."""
    chapter, number = re.fullmatch(r"test_(\d)_(\d)_.*", request.node.name).groups()
    (path,) = (ROOT / "docs/lesson").glob(f"{chapter}_*.md")
    exercises = re.split(rf"^\*\*{chapter}\.\d\*\* ", path.read_text(), flags=re.M)
    words = " ".join(exercises[int(number)].split())

    def change(old, new):
        assert f"`{old}`" in words
        assert f"`{new}`" in words
        text = (ROOT / "qam_offline.py").read_text()
        assert text.count(old) == 1
        module = types.ModuleType("qam_exercise")
        monkeypatch.setitem(sys.modules, "qam_exercise", module)
        exec(compile(text.replace(old, new), "qam_exercise.py", "exec"), module.__dict__)
        return module

    with pytest.MonkeyPatch.context() as monkeypatch:
        yield change


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rollout(script, policy=BASE, num_steps=STEPS):
    noise = normal(0, num_steps, SAMPLES, 2)
    return script.sample_memoryless_sde(policy, BASE, noise[0], noise[1:])


def distance_to_data(actions):
    """Squared MMD."""
    data = closed_form.draw_behavior(np.random.default_rng(0), SAMPLES)
    return closed_form.mmd(np.asarray(actions), data)


def gradient_of_value(actions):
    return jax.grad(lambda actions: closed_form.value(actions).sum())(actions)


def jacobians(script, num_steps):
    """d x_T / d x_0 of samples of (3): (SAMPLES, 2, 2)."""

    def end(x):
        return script.sample_ode(BASE, x[None], num_steps)[0]

    return jax.vmap(jax.jacobian(end))(normal(0, SAMPLES, 2))


def policy_gradient_and_metrics(script, value=closed_form.value, at_behavior=False):
    """policy_loss on a small batch: (its gradient for the policy's parameters, metrics).

    The policy is the behavior flow or, as in a new run, another one.
    """
    args = script.Args(hidden_dims=(16,), num_critics=1, horizon=1, inv_temp=1.0, flow_steps=4)
    networks = script.make_networks(args, 1, 2)
    state = script.init_state(args, networks, 1, 2, jax.random.key(0))
    ones = jnp.ones(64)
    s = jnp.zeros((64, 1))
    batch = script.Batch(s, normal(1, 64, 2) / 3, ones, ones, ones, s)

    def q(observations, actions):
        return value(actions)[None]

    def loss(policy):
        params = {**state.params, "policy": policy}
        shared = (args, networks, params, state.target_params, batch)
        return script.policy_loss(*shared, q, q, jax.random.key(2))

    start = state.target_params["behavior"] if at_behavior else state.params["policy"]
    return jax.jit(jax.grad(loss, has_aux=True))(start)


def updates_of(script, num_updates):
    """State after updates on batches whose rewards grow a thousandfold each time."""
    args = script.Args(hidden_dims=(16,), num_critics=2, horizon=1, inv_temp=1.0, flow_steps=3)
    networks = script.make_networks(args, 1, 2)
    state = script.init_state(args, networks, 1, 2, jax.random.key(0))
    update = jax.jit(partial(script.update, args, networks))
    s = normal(3, 32, 1)
    ones = jnp.ones(32)
    for i in range(num_updates):
        batch = script.Batch(s, normal(4, 32, 2) / 3, -(1000.0**i) * ones, ones, ones, s)
        state, _ = update(state, batch, jax.random.key(i))
    return args, state


def largest_difference(tree, other):
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), tree, other)
    return max(float(x) for x in jax.tree.leaves(differences))


# ---------------------------------------------------------------------------------- 1. the problem


def test_1_1_without_the_derivative_of_the_velocity(change):
    old = "x = x + h * velocity(x, t)"
    changed = change(old, "x = x + h * jax.lax.stop_gradient(velocity(x, t))")
    assert_allclose(jacobians(changed, STEPS), np.broadcast_to(np.eye(2), (SAMPLES, 2, 2)))
    sizes = np.linalg.norm(jacobians(qam, STEPS), ord=2, axis=(1, 2))
    assert_allclose(np.quantile(sizes, [0.01, 0.5, 0.99]), [0.13, 0.32, 4.27], rtol=0.05)


def test_1_2_one_peak():
    mean = np.array([0.533, 0.504])
    assert_allclose(closed_form.TARGET_MEANS[3], mean, atol=5e-4)

    # The logarithm of the target is flat there, and curved as a Gaussian of deviation 0.148.
    def log_target(a):
        return closed_form.value(a) - ((a - 0.5) ** 2).sum() / (2 * 0.15**2)

    assert_allclose(jax.grad(log_target)(mean), np.zeros(2), atol=0.03)
    assert_allclose(jax.hessian(log_target)(mean), -np.eye(2) / 0.148**2, rtol=0.01)


# -------------------------------------------------------------------------------- 2. flow matching


def test_2_1_regression_on_the_action(change):
    old = "error = velocity(x_t, t) - (actions - x0)"
    changed = change(old, "error = velocity(x_t, t) - actions")
    c = jnp.array([0.3, -0.2])
    batch = (jnp.broadcast_to(c, (50, 2)), jnp.ones(50), normal(0, 50, 2), jnp.full((50, 1), 0.4))

    def constant(x, t):
        return jnp.broadcast_to(c, x.shape)

    def to_the_action(x, t):
        return (c - x) / (1 - t)

    assert changed.flow_matching_loss(constant, *batch) == 0
    assert qam.flow_matching_loss(constant, *batch) > 0.5
    assert float(qam.flow_matching_loss(to_the_action, *batch)) == pytest.approx(0, abs=1e-10)
    x0 = normal(1, 50, 2)
    assert_allclose(qam.sample_ode(constant, x0, STEPS), x0 + c, atol=1e-6)
    assert_allclose(qam.sample_ode(to_the_action, x0, STEPS) - c, jnp.zeros((50, 2)), atol=1e-6)


def test_2_2_chunks_that_do_not_fit(change):
    old = "jnp.mean(valid * jnp.mean(error**2, axis=-1))"
    changed = change(old, "jnp.mean(jnp.mean(error**2, axis=-1))")
    batch = (normal(0, 8, 2), jnp.zeros(8), normal(1, 8, 2), jnp.full((8, 1), 0.5))
    assert qam.flow_matching_loss(BASE, *batch) == 0
    assert changed.flow_matching_loss(BASE, *batch) > 0.1


# ------------------------------------------------------------------------ 3. forgetting the start


def test_3_1_half_the_noise(change):
    old = "return jnp.sqrt(2 * (1 - t + h) / (t + h))"
    changed = change(old, f"return 0.5 * {old.removeprefix('return ')}")
    distance = distance_to_data(rollout(qam)[-1])
    assert distance_to_data(rollout(changed)[-1]) > 2 * distance
    assert np.std(rollout(changed)[-1]) < np.std(rollout(qam)[-1])


def test_3_2_last_step_of_the_policy(change):
    line = "xs.append(xs[-1] + h * {}("
    changed = change(line.format("base_velocity"), line.format("velocity"))

    def policy(x, t):
        return BASE(x, t) + 0.7

    moved = rollout(changed, policy)[-1] - rollout(qam, policy)[-1]
    assert_allclose(moved, jnp.full((SAMPLES, 2), 0.7 / STEPS), atol=1e-5)


# --------------------------------------------------------------------------- 4. a control problem


def test_4_1_the_factor_that_stays():
    c, b, slope = 0.8, 0.6, 0.7
    x0, noise = normal(0, 2, 1_000_000)
    ends = c * x0 + b * noise
    z = jnp.exp(slope * c * x0 + slope**2 * b**2 / 2)
    weights = jnp.exp(slope * ends) / z
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)  # so Z(x_0) is right
    mean = float((weights * ends).mean())
    assert mean == pytest.approx(slope * b**2, abs=0.01)
    variance = float((weights * (ends - mean) ** 2).mean())
    assert variance == pytest.approx(c**2 + b**2, abs=0.02)


def test_4_2_one_push_or_many():
    """KL of Gaussians by its integral: of one push, and of five that are a fifth."""
    x = np.linspace(-12, 12, 100_001)

    def divergence(push):
        density = np.exp(-((x - push) ** 2) / 2) / np.sqrt(2 * np.pi)
        log_ratio = (2 * x - push) * push / 2
        return np.trapezoid(density * log_ratio, x)

    assert divergence(1.5) == pytest.approx(1.5**2 / 2)
    assert 5 * divergence(1.5 / 5) == pytest.approx(1.5**2 / (2 * 5))


# ----------------------------------------------------------------------------- 5. the lean adjoint


def sizes_of_adjoints(script):
    """(STEPS, SAMPLES), and those of the gradient of Q at the end: (SAMPLES,)."""
    xs = rollout(script)
    g = -gradient_of_value(xs[-1])
    adjoints = script.lean_adjoint(BASE, xs[:-1], g)
    return jnp.linalg.norm(adjoints, axis=-1), jnp.linalg.norm(g, axis=-1)


def test_5_1_carried_back_as_it_is(change):
    changed = change("g = g + h * pull_back(g)[0]", "g = g + 0 * pull_back(g)[0]")
    sizes, _ = sizes_of_adjoints(changed)
    assert float(sizes[0].mean()) == pytest.approx(2.2, abs=0.1)
    sizes, _ = sizes_of_adjoints(qam)
    sizes = sizes.mean(axis=1)
    assert float(sizes[0]) == pytest.approx(0.01, abs=0.01)
    assert float(sizes[STEPS // 2]) == pytest.approx(1.0, abs=0.1)
    assert float(sizes[-1]) == pytest.approx(2.40, abs=0.05)


def test_5_2_linearized_where_the_step_begins(change):
    changed = change("t=u, u=u", "t=u - h, u=u")
    sizes, at_end = sizes_of_adjoints(changed)
    assert_allclose(np.quantile(sizes[-1] / at_end, [0.5, 0.99]), [0.34, 5.46], rtol=0.15)
    sizes, at_end = sizes_of_adjoints(qam)
    assert_allclose(sizes[-1] / at_end, 1.1, rtol=0.01)
    h = 1 / STEPS
    for t, slope, factor in ((1 - h, -2.83, 0.33), (1, 1, 1.1)):
        # Of the velocity of one Gaussian.
        exact = (t * 0.15**2 - (1 - t)) / ((1 - t) ** 2 + (t * 0.15) ** 2)
        assert exact == pytest.approx(slope, abs=0.01)
        assert 1 + h * (2 * exact - 1) == pytest.approx(factor, abs=0.01)


# ------------------------------------------------------------------------------------ 6. matching


def test_6_1_the_other_sign(change):
    old = "residual = difference / sigma + sigma * adjoints"
    changed = change(old, "residual = difference / sigma - sigma * adjoints")
    xs = normal(0, STEPS, 20, 2)
    adjoints = normal(1, STEPS, 20, 2)
    t = jnp.arange(STEPS).reshape(-1, 1, 1) / STEPS
    sigma = qam.memoryless_sigma(t, 1 / STEPS)
    for script, sign in ((qam, -1), (changed, 1)):
        # The drift has 2 v.
        def policy(x, t, sign=sign):
            return BASE(x, t) + sign * sigma**2 * adjoints / 2

        loss = script.adjoint_matching_loss(policy, BASE, xs, adjoints)
        assert float(loss) == pytest.approx(0, abs=1e-6)


def test_6_2_gradient_through_the_rollout(change):
    old = "xs, adjoints = jax.lax.stop_gradient((xs, adjoints))"
    changed = change(old, "xs, adjoints = (xs, adjoints)")
    gradient, metrics = policy_gradient_and_metrics(qam)
    other_gradient, other_metrics = policy_gradient_and_metrics(changed)
    assert metrics["adjoint_loss"] == other_metrics["adjoint_loss"]
    assert largest_difference(gradient, other_gradient) > 0.1


def test_6_3_the_critic_is_not_asked(change):
    old = "g = -args.inv_temp * jax.grad(total_value)(xs[-1])"
    changed = change(old, "g = jnp.zeros_like(xs[-1])")
    gradient, metrics = policy_gradient_and_metrics(changed, at_behavior=True)
    assert metrics["adjoint_loss"] == 0
    assert largest_difference(gradient, jax.tree.map(jnp.zeros_like, gradient)) == 0
    _, metrics = policy_gradient_and_metrics(qam, at_behavior=True)
    assert metrics["adjoint_loss"] > 1


def test_6_4_its_own_base(change):
    old = (
        'v_base = partial(networks.behavior.apply, {"params": target_params["behavior"]},'
        " observations)"
    )
    new = 'v_base = partial(networks.policy.apply, {"params": params["policy"]}, observations)'
    changed = change(old, new)

    def nothing(actions):
        return 0 * actions.sum(axis=-1)

    # Without a value the policy should go back to behavior. Now it may stay anywhere.
    _, metrics = policy_gradient_and_metrics(changed, nothing)
    assert metrics["adjoint_loss"] == 0
    _, metrics = policy_gradient_and_metrics(qam, nothing)
    assert metrics["adjoint_loss"] > 1


def test_6_5_what_a_push_costs():
    """Each step of the policy is behavior's, pushed; the last is not."""
    h = 1 / STEPS
    pushes = normal(0, STEPS, 1, 2).at[-1].set(0)
    sigma = qam.memoryless_sigma(jnp.arange(STEPS).reshape(-1, 1, 1) * h, h)
    xs = normal(1, STEPS, 1, 2)

    def policy(x, t):
        return BASE(x, t) + sigma * pushes / (2 * jnp.sqrt(h))

    moved = h * (
        qam.drift(policy, xs, 0.5 + 0 * sigma, 1) - qam.drift(BASE, xs, 0.5 + 0 * sigma, 1)
    )
    assert_allclose(moved / (jnp.sqrt(h) * sigma), pushes, atol=1e-5)
    loss = qam.adjoint_matching_loss(policy, BASE, xs, 0 * xs)
    charge = (pushes**2).sum() / 2
    assert float(loss / charge) == pytest.approx(2 * STEPS, rel=1e-4)


def test_6_6_the_mean_of_the_adjoints_is_enough():
    """Many adjoints at the same states: the loss on each of them, and on their mean."""
    adjoints = 18 * normal(0, STEPS, SAMPLES, 2)
    mean = jnp.broadcast_to(adjoints.mean(axis=1, keepdims=True), adjoints.shape)
    xs = jnp.broadcast_to(normal(1, STEPS, 1, 2), adjoints.shape)
    sigma = qam.memoryless_sigma(jnp.arange(STEPS).reshape(-1, 1, 1) / STEPS, 1 / STEPS)

    def loss(push, adjoints):
        return qam.adjoint_matching_loss(lambda x, t: BASE(x, t) + push, BASE, xs, adjoints)

    push = normal(2, STEPS, 1, 2)
    gradients = [jax.grad(loss)(push, g) for g in (adjoints, mean)]
    assert_allclose(*gradients, rtol=1e-3, atol=1e-2)
    stays = (sigma**2 * (adjoints - mean) ** 2).sum(axis=(0, 2)).mean()
    assert_allclose(loss(push, adjoints) - loss(push, mean), stays, rtol=1e-4)


# ----------------------------------------------------------------------------------- 7. the critic


def test_7_1_discount_of_a_step_for_a_chunk(change):
    old = "args.discount**args.horizon"
    changed = change(old, "args.discount")
    steps = {"observations": normal(0, 8, 1), "next_observations": normal(0, 8, 1)}
    chunk = np.full(8, -(1 - 0.99**5) / (1 - 0.99), np.float32)

    def believed(script):
        """Where the critic's target is its own value: from y at two values, a straight line."""
        args = script.Args(hidden_dims=(8,), num_critics=1, horizon=5, discount=0.99, rho=0.0)
        networks = script.make_networks(args, 1, 1)
        state = script.init_state(args, networks, 1, 1, jax.random.key(0))
        ones = jnp.ones(8)
        batch = script.Batch(
            actions=normal(1, 8, 5), rewards=chunk, masks=ones, valid=ones, **steps
        )
        factors = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "td_target", lambda *given: factors.append(given[3]) or ones)
            shared = (state.params, state.target_params, batch, jax.random.key(0))
            script.critic_loss(args, networks, *shared)
        return chunk[0] / (1 - factors[0])

    assert believed(qam) == pytest.approx(-100, rel=1e-3)
    assert believed(changed) == pytest.approx(-490, rel=1e-3)


def test_7_2_the_most_hopeful_critic(change):
    old = "(next_q.mean(axis=0) - rho * next_q.std(axis=0))"
    changed = change(old, "next_q.max(axis=0)")
    next_q = jnp.array([[-10.0], [-20.0]])
    zero = jnp.zeros(1)
    assert changed.td_target(zero, zero + 1, next_q, 1.0, 0.5) == -10
    assert qam.td_target(zero, zero + 1, next_q, 1.0, 0.5) == -17.5


# ----------------------------------------------------------------------------------- 8. one update


def test_8_1_no_limit_on_the_gradient(change):
    old = "clip = optax.clip_by_global_norm(args.max_grad_norm)"
    changed = change(old, "clip = optax.identity()")
    first = [updates_of(script, 1)[1].params for script in (qam, changed)]
    assert largest_difference(*first) < 3e-5
    third = [updates_of(script, 3)[1].params for script in (qam, changed)]
    assert largest_difference(*third) > 1e-4


def test_8_2_targets_follow_the_parameters_after_the_step(change):
    old = "old_params = {name: state.params[name] for name in target_params}"
    changed = change(old, "old_params = {name: params[name] for name in target_params}")
    targets = [updates_of(script, 1)[1].target_params for script in (qam, changed)]
    assert 1e-6 < largest_difference(*targets) < 1.6e-6


# ----------------------------------------------------------------------------------- 9. the knobs


def test_9_1_no_shift(change):
    old = "return jnp.sqrt(2 * (1 - t + h) / (t + h))"
    changed = change(old, "return jnp.sqrt(2 * (1 - t) / t)")
    assert not np.isfinite(rollout(changed)[1:]).any()


def test_9_2_asked_outside_of_the_box(change):
    old = "return target_q(observations, jnp.clip(actions, -1, 1)).mean(axis=0).sum()"
    changed = change(old, "return target_q(observations, actions).mean(axis=0).sum()")
    # A value that has a slope everywhere, and a policy whose samples lie partly outside.
    slope = partial(jnp.sum, axis=-1)
    losses = []
    for script in (qam, changed):
        _, metrics = policy_gradient_and_metrics(script, slope)
        losses.append(float(metrics["adjoint_loss"]))
    assert losses[0] != losses[1]
