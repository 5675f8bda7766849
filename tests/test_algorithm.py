"""qam_offline.py's equations, against reference vectors, closed forms and properties."""

import dataclasses
from functools import partial

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from vectors import (
    all_zero,
    assert_close,
    losses_with_reference_draws,
    nested,
    of_networks,
    read_case,
)

import qam_offline as qam
from experiments import closed_form
from experiments.closed_form import behavior_velocity

NAMES = {"critic": "critic", "behavior": "actor_slow", "policy": "actor_fast"}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def case():
    targets = ("critic", "behavior")
    return read_case(qam, "qam_case_a.npz", NAMES, targets, inv_temp=3.0)


# ------------------------------------------------------------------------------------- reference


def losses_of_building_blocks(case, params):
    """The total loss from the functions that draw nothing: (loss, results)."""
    args = case.args
    batch = case.batch
    noise = nested(case.arrays, "noise")
    v_policy = case.closure("policy", params, batch.observations)
    v_behavior = case.closure("behavior", params, batch.observations)
    v_base = case.closure("behavior", case.target_params, batch.observations)
    v_next = case.closure("policy", params, batch.next_observations)
    target_q = case.closure("critic", case.target_params)

    next_actions = qam.sample_ode(v_next, noise["next_action"], args.flow_steps)
    next_actions = jnp.clip(next_actions, -1, 1)
    next_actions = jax.lax.stop_gradient(next_actions)
    next_q = target_q(batch.next_observations, next_actions)
    discount_h = args.discount**args.horizon
    y = qam.td_target(batch.rewards, batch.masks, next_q, discount_h, args.rho)
    q = case.closure("critic", params)(batch.observations, batch.actions)
    critic_loss = jnp.mean(batch.valid * (q - y) ** 2)

    bc_noise = (noise["bc_x0"], noise["bc_t"])
    flow_loss = qam.flow_matching_loss(v_behavior, batch.actions, batch.valid, *bc_noise)

    xs = qam.sample_memoryless_sde(v_policy, v_base, noise["sde_x0"], noise["sde"])

    def value(actions):
        actions = jnp.clip(actions, -1, 1)
        return target_q(batch.observations, actions).mean(axis=0).sum()

    gradient = jax.grad(value)
    g = -args.inv_temp * gradient(xs[-1])
    adjoints = qam.lean_adjoint(v_base, xs[:-1], g)
    adjoint_loss = qam.adjoint_matching_loss(v_policy, v_base, xs[:-1], adjoints)
    results = {
        "next_actions": next_actions,
        "target_next_q": next_q,
        "target_q": y,
        "q": q,
        "xs": xs[:-1],
        "adjoints": adjoints,
        "losses": (critic_loss, flow_loss, adjoint_loss),
    }
    return critic_loss + flow_loss + adjoint_loss, results


@pytest.fixture(scope="module")
def blocks(case):
    """(gradients, results) of the building blocks."""
    loss = partial(losses_of_building_blocks, case)
    gradients = jax.jit(jax.grad(loss, has_aux=True))
    return gradients(case.params)


def reference_losses(case):
    names = ("critic/critic_loss", "actor/flow_loss", "actor/adj_loss")
    return tuple(case.arrays[f"info/{name}"] for name in names)


def reference_gradients(case):
    return of_networks(nested(case.arrays, "grad"), NAMES)


def test_chunks_match_the_reference(case):
    for field in ("rewards", "masks", "valid", "next_observations"):
        reference = case.arrays[f"batch/{field}"]
        assert_close(getattr(case.batch, field), reference[:, -1])
    actions = case.arrays["batch/actions"]
    assert_close(case.batch.actions, actions.reshape(8, -1))
    assert_close(case.batch.observations, case.arrays["batch/observations"])


@pytest.mark.parametrize(
    "name", ["next_actions", "target_next_q", "target_q", "q", "xs", "adjoints"]
)
def test_building_blocks_match_the_reference(case, blocks, name):
    _, results = blocks
    assert_close(results[name], case.arrays[f"out/{name}"])


def test_losses_of_building_blocks_match_the_reference(case, blocks):
    gradients, results = blocks
    assert_close(results["losses"], reference_losses(case))
    assert_close(gradients, reference_gradients(case))


def test_critic_loss_and_policy_loss_match_the_reference(case):
    """The functions that draw, with the reference's draws."""
    draws = ["next_action", "bc_x0", "sde_x0", "sde"]
    gradients, metrics = losses_with_reference_draws(qam, case, draws)
    ours = (metrics["critic_loss"], metrics["flow_loss"], metrics["adjoint_loss"])
    assert_close(ours, reference_losses(case))
    assert_close(metrics["q_mean"], case.arrays["info/critic/q_mean"])
    assert_close(gradients, reference_gradients(case))


# ---------------------------------------------------------------------- closed forms, properties


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_adjoint_through_an_affine_flow_is_its_closed_form():
    """v = x M + b t: step i multiplies by I + h (2 M - I / (t_i + h)) from the right."""
    matrix = normal(0, 3, 3)
    bias = normal(1, 3)
    xs = normal(2, 5, 4, 3)
    g = normal(3, 4, 3)

    def velocity(x, t):
        return x @ matrix + bias * t

    adjoints = qam.lean_adjoint(velocity, xs, g)
    for i in (4, 3, 2, 1, 0):
        g = g + (2 * g @ matrix.T - g / ((i + 1) / 5)) / 5
        assert_close(adjoints[i], g, 1e-5)


def test_matching_reaches_the_policy_velocity_alone():
    xs = normal(0, 5, 4, 3)
    adjoints = normal(1, 5, 4, 3)

    def loss(slope, base_slope, xs, adjoints):
        def velocity(x, t):
            return slope * x

        def base_velocity(x, t):
            return base_slope * x

        return qam.adjoint_matching_loss(velocity, base_velocity, xs, adjoints)

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))
    of_velocity, *others = gradients(1.3, 0.7, xs, adjoints)
    assert of_velocity != 0
    assert all_zero(others)


def test_policy_loss_leaves_critic_and_targets_alone(case):
    def loss(params, target_params):
        target_q = case.closure("critic", target_params)
        shared = case._replace(target_params=target_params).shared(params)
        return qam.policy_loss(*shared, None, target_q, KEY)[0]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    grads, target_grads = gradients(case.params, case.target_params)
    assert all_zero(target_grads)
    assert all_zero(grads["critic"])
    assert not all_zero(grads["behavior"])
    assert not all_zero(grads["policy"])


def test_without_temperature_matching_is_zero_where_policy_is_behavior(case):
    """inv_temp 0: no adjoint, and the policy imitates."""
    args = dataclasses.replace(case.args, inv_temp=0.0)
    params = {**case.params, "policy": case.target_params["behavior"]}
    target_q = case.closure("critic", case.target_params)

    @jax.jit
    def metrics_of(params):
        shared = case._replace(args=args).shared(params)
        _, metrics = qam.policy_loss(*shared, None, target_q, KEY)
        return metrics

    metrics = metrics_of(params)
    assert metrics["adjoint_loss"] == 0


def random_dataset(rng, size):
    """Random numbers, with random ends of episodes."""
    columns = {
        "observations": rng.normal(size=(size, 3)),
        "actions": rng.normal(size=(size, 2)),
        "rewards": rng.normal(size=size),
        "masks": rng.random(size) < 0.8,
        "terminals": rng.random(size) < 0.2,
        "next_observations": rng.normal(size=(size, 3)),
    }
    columns = jax.tree.map(np.float32, columns)
    return qam.Dataset(**columns)


def test_chunks_end_with_their_episode():
    """gather_chunks against a loop over the transitions."""
    horizon = 5
    data = random_dataset(np.random.default_rng(0), 60)
    starts = np.arange(60 - horizon + 1)
    batch = qam.gather_chunks(jax.device_put(data), starts, horizon, 0.9)
    for j in starts:
        reward = 0.0
        for i in range(horizon):
            last = j + i
            reward += 0.9**i * data.rewards[last]
            if data.terminals[last]:
                break
        assert_allclose(batch.rewards[j], reward, rtol=1e-5, atol=1e-6)
        masks = data.masks[j : last + 1]
        assert batch.masks[j] == min(masks)
        ends = data.terminals[j : j + horizon - 1]
        assert batch.valid[j] == (not any(ends))
        actions = data.actions[j : j + horizon]
        assert_array_equal(batch.actions[j], actions.ravel())
        assert_array_equal(batch.observations[j], data.observations[j])
        assert_array_equal(batch.next_observations[j], data.next_observations[last])


def state_of(case, args):
    """A TrainState with the case's parameters."""
    opt_state = qam.make_optimizer(args).init(case.params)
    return qam.TrainState(case.params, case.target_params, opt_state, jnp.int32(0), KEY)


def test_update_clips_jointly_and_targets_follow_the_parameters_before_it(case):
    args = dataclasses.replace(case.args, tau=0.25, max_grad_norm=0.5, flow_steps=2)
    state = state_of(case, args)
    update = jax.jit(partial(qam.update, args, case.networks))
    new, metrics = update(state, case.batch, KEY)
    for name, target in case.target_params.items():
        expected = optax.incremental_update(case.params[name], target, 0.25)
        assert_close(new.target_params[name], expected, 1e-6)
    # Adam's first moment is a tenth of the clipped gradient after one step.
    first_moment = new.opt_state[1][0].mu
    norm = float(optax.tree.norm(first_moment))
    assert norm == pytest.approx(0.05, rel=1e-4)
    assert metrics["grad_norm"] > 0.5
    assert new.step == 1


def test_best_of_n_takes_the_chunk_of_highest_value(case):
    args = dataclasses.replace(case.args, best_of_n=16, flow_steps=2)
    observations = case.batch.observations
    act = jax.jit(partial(qam.sample_actions, args, case.networks))
    actions = act(case.params, observations, KEY)
    noise = jax.random.normal(KEY, (16, 8, 6))
    critic = case.closure("critic", case.params, observations)
    v_policy = case.closure("policy", case.params, observations)

    @jax.jit
    def value_of_noise(x0):
        drawn = qam.sample_ode(v_policy, x0, 2)
        return critic(jnp.clip(drawn, -1, 1)).mean(axis=0)

    values = [value_of_noise(x0) for x0 in noise]
    assert actions.shape == (8, 6)
    assert np.abs(actions).max() <= 1
    value = critic(actions).mean(axis=0)
    assert_allclose(value, np.max(values, axis=0), rtol=1e-4, atol=1e-5)


def test_each_episode_has_its_noise(case):
    """And an action is the same whatever the other episodes do."""
    act = jax.jit(partial(qam.sample_actions, case.args, case.networks))
    observations = np.ones((3, 6))
    actions = act(case.params, observations, KEY)
    assert len(np.unique(actions, axis=0)) == 3
    observations[1:] = 0.5
    others = act(case.params, observations, KEY)
    assert_array_equal(others[0], actions[0])
    assert (others[1:] != actions[1:]).any(axis=1).all()


def test_result_does_not_depend_on_steps_per_dispatch(case):
    args = dataclasses.replace(case.args, flow_steps=2)
    train = jax.jit(partial(qam.train_steps, args, case.networks))
    start = state_of(case, args)
    at_once, _ = train(start, case.dataset, 5)
    state, _ = train(start, case.dataset, 2)
    in_parts, _ = train(state, case.dataset, 3)
    assert at_once.step == 5
    for name in ("params", "target_params", "opt_state", "step"):
        ours = getattr(in_parts, name)
        jax.tree.map(assert_array_equal, ours, getattr(at_once, name))


# ----------------------------------------------------------------------------------- the bandit


def test_bandit_converges_to_behavior_times_exp_q():
    """A network added to the analytic behavior velocity, T = 30, inv_temp 1, and its samples."""
    num_steps = 30
    network = qam.MLP((64, 64, 64), 2)

    def policy_of(params):
        def velocity(x, t):
            inputs = jnp.concatenate([x, t], axis=-1)
            return behavior_velocity(x, t) + network.apply(params, inputs)

        return velocity

    def loss(params, key):
        v_policy = policy_of(params)
        noise = jax.random.normal(key, (num_steps, 128, 2))
        xs = qam.sample_memoryless_sde(v_policy, behavior_velocity, noise[0], noise[1:])
        xs = jax.lax.stop_gradient(xs)
        g = -bandit.gradient_of_value(xs[-1])
        adjoints = qam.lean_adjoint(behavior_velocity, xs[:-1], g)
        return qam.adjoint_matching_loss(v_policy, behavior_velocity, xs[:-1], adjoints)

    params = bandit.train(network, loss, num_updates=1000)
    sample = qam.sample_ode(policy_of(params), normal(2, 3000, 2), num_steps)
    rng = np.random.default_rng(0)
    target = closed_form.draw_target(rng, 3000)
    behavior = closed_form.draw_behavior(rng, 3000)
    distance = closed_form.mmd(np.asarray(sample), target)
    start = closed_form.mmd(behavior, target)
    print(f"squared MMD to the target: {distance:.4f}, from behavior {start:.4f}")
    assert start > 0.25
    assert distance < 0.03
