"""qam_offline.py's equations, against reference vectors, closed forms and properties."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qam_offline as qam
from tools.closed_form import MEANS, PRECISION, TARGET_LOG_WEIGHTS, TARGET_MEANS, behaviour_velocity, draw, mmd, value

REFERENCE = {"critic": "critic", "slow": "actor_slow", "fast": "actor_fast"}  # our name: the reference's


def nested(arrays, prefix):
    """{"a/b": x} -> {"a": {"b": x}} for the keys under prefix."""
    tree = {}
    for key, array in arrays.items():
        if key.startswith(prefix + "/"):
            *folders, name = key[len(prefix) + 1 :].split("/")
            branch = tree
            for folder in folders:
                branch = branch.setdefault(folder, {})
            branch[name] = jnp.asarray(array)
    return tree


def close(ours, reference, tolerance=1e-4):
    """max |difference| / max |reference| below the tolerance, array by array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_less(np.abs(a - b).max() / np.abs(b).max(), tolerance), ours, reference
    )


@pytest.fixture(scope="module")
def case():
    """The reference case, with what qam_offline.py makes of the same parameters and noise."""
    arrays = dict(np.load(Path(__file__).parent / "data/qam_case_a.npz"))
    trees = nested(arrays, "params")
    params = {name: trees[key] for name, key in REFERENCE.items()}
    target_params = {"critic": trees["target_critic"], "slow": trees["target_actor_slow"]}
    args = qam.Args(hidden_dims=(32,) * 4, num_critics=3, horizon=2, discount=0.99, rho=0.5, inv_temp=3.0, batch_size=8)
    networks = qam.make_networks(args, 6, 3)
    dataset = qam.Dataset(*(jnp.asarray(arrays[f"dataset/{field}"]) for field in qam.Dataset._fields))
    batch = qam.gather_chunks(dataset, jnp.asarray(arrays["indices"]), args.horizon, args.discount)
    noise = nested(arrays, "noise")

    def losses(params):
        velocity = {name: partial(networks.slow.apply, {"params": p}) for name, p in params.items() if name != "critic"}
        base = partial(networks.slow.apply, {"params": target_params["slow"]}, batch.observations)
        fast_next = partial(velocity["fast"], batch.next_observations)
        next_actions = jax.lax.stop_gradient(jnp.clip(qam.sample_ode(fast_next, noise["next_action"], 10), -1, 1))
        target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
        next_q = target_q(batch.next_observations, next_actions)
        y = qam.td_target(batch.rewards, batch.masks, next_q, args.discount**args.horizon, args.rho)
        q = networks.critic.apply({"params": params["critic"]}, batch.observations, batch.actions)
        loss_q = jnp.mean(batch.valid * (q - y) ** 2)
        slow, fast = (partial(velocity[name], batch.observations) for name in ("slow", "fast"))
        loss_bc = qam.flow_matching_loss(slow, batch.actions, batch.valid, noise["bc_x0"], noise["bc_t"])
        xs = qam.sample_memoryless_sde(fast, base, noise["sde_x0"], noise["sde"])
        value = lambda a: target_q(batch.observations, jnp.clip(a, -1, 1)).mean(axis=0).sum()
        adjoints = qam.lean_adjoint(base, xs[:-1], -args.inv_temp * jax.grad(value)(xs[-1]))
        loss_am = qam.adjoint_matching_loss(fast, base, xs[:-1], adjoints)
        out = {"next_actions": next_actions, "target_next_q": next_q, "target_q": y, "q": q}
        out |= {"xs": xs[:-1], "adjoints": adjoints, "critic_loss": loss_q, "flow_loss": loss_bc, "adj_loss": loss_am}
        return loss_q + loss_bc + loss_am, out

    grads, out = jax.jit(jax.grad(losses, has_aux=True))(params)
    return {"arrays": arrays, "args": args, "networks": networks, "dataset": dataset, "batch": batch} | {
        "params": params,
        "target_params": target_params,
        "grads": grads,
        "out": out,
    }


def test_chunks_match_the_reference(case):
    arrays, batch = case["arrays"], case["batch"]
    for field in ("rewards", "masks", "valid", "next_observations"):
        close(getattr(batch, field), arrays[f"batch/{field}"][:, -1])
    close(batch.actions, arrays["batch/actions"].reshape(8, -1))
    close(batch.observations, arrays["batch/observations"])


@pytest.mark.parametrize("name", ["next_actions", "target_next_q", "target_q", "q", "xs", "adjoints"])
def test_outputs_match_the_reference(case, name):
    close(case["out"][name], case["arrays"][f"out/{name}"])


def test_losses_match_the_reference(case):
    for name, key in (("critic_loss", "critic"), ("flow_loss", "actor"), ("adj_loss", "actor")):
        close(case["out"][name], case["arrays"][f"info/{key}/{name}"])


@pytest.mark.parametrize("name", REFERENCE)
def test_gradients_match_the_reference(case, name):
    close(case["grads"][name], nested(case["arrays"], "grad")[REFERENCE[name]])


def test_critic_loss_and_policy_loss_are_those_equations(case, monkeypatch):
    """The functions that draw noise give the reference's losses and gradients when the draws are the reference's."""
    arrays, args, networks, batch = case["arrays"], case["args"], case["networks"], case["batch"]
    draws = {(8, 6): iter(["next_action", "bc_x0", "sde_x0"]), (9, 8, 6): iter(["sde"])}
    drawn = jax.random.uniform  # older versions of flax call it when they check the shapes of kernels
    times = lambda key, shape, *rest: jnp.asarray(arrays["noise/bc_t"]) if not rest else drawn(key, shape, *rest)
    monkeypatch.setattr(jax.random, "uniform", times)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(arrays[f"noise/{next(draws[shape])}"]))
    target_q = partial(networks.critic.apply, {"params": case["target_params"]["critic"]})

    def losses(params):
        shared, key = (args, networks, params, case["target_params"], batch), jax.random.key(0)
        loss_q, metrics_q = qam.critic_loss(*shared, key)
        loss_pi, metrics_pi = qam.policy_loss(*shared, None, target_q, key)
        return loss_q + loss_pi, metrics_q | metrics_pi

    grads, metrics = jax.grad(losses, has_aux=True)(case["params"])
    close(metrics["critic_loss"], arrays["info/critic/critic_loss"])
    close(metrics["flow_loss"], arrays["info/actor/flow_loss"])
    close(metrics["adjoint_loss"], arrays["info/actor/adj_loss"])
    close(metrics["adjoint_mean"], arrays["info/actor/adj_mean"])
    for name, key in REFERENCE.items():
        close(grads[name], nested(arrays, "grad")[key])


def test_adjoint_through_an_affine_flow_is_its_closed_form():
    """v = x M + b t: the pull-back of step i is multiplication by I + h (2 M - I / (t_i + h)) from the right."""
    matrix, bias = jax.random.normal(jax.random.key(0), (2, 3, 3))
    xs, g = jax.random.normal(jax.random.key(1), (5, 4, 3)), jax.random.normal(jax.random.key(2), (4, 3))
    adjoints = qam.lean_adjoint(lambda x, t: x @ matrix + bias[0] * t, xs, g)
    for i in reversed(range(5)):
        g = g + (2 * g @ matrix.T - g / ((i + 1) / 5)) / 5
        close(adjoints[i], g, 1e-5)


def test_matching_reaches_the_fast_velocity_alone():
    xs, adjoints = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    loss = lambda fast, base, xs, adjoints: qam.adjoint_matching_loss(
        lambda x, t: fast * x, lambda x, t: base * x, xs, adjoints
    )
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))(1.3, 0.7, xs, adjoints)
    assert grads[0] != 0
    assert all(np.all(g == 0) for g in grads[1:])


def test_policy_loss_leaves_critic_and_targets_alone(case):
    def loss(params, target_params):
        target_q = partial(case["networks"].critic.apply, {"params": target_params["critic"]})
        shared = (case["args"], case["networks"], params, target_params, case["batch"])
        return qam.policy_loss(*shared, None, target_q, jax.random.key(0))[0]

    grads, target_grads = jax.grad(loss, argnums=(0, 1))(case["params"], case["target_params"])
    assert all(np.all(g == 0) for g in jax.tree.leaves((grads["critic"], target_grads)))
    assert all(np.any(g != 0) for g in jax.tree.leaves((grads["slow"], grads["fast"])))


def test_without_temperature_matching_is_zero_where_fast_is_base(case):
    """inv_temp 0: the adjoint is 0, so L_AM is 0 and the policy imitates."""
    args = qam.dataclasses.replace(case["args"], inv_temp=0.0)
    params = case["params"] | {"fast": case["target_params"]["slow"]}
    target_q = partial(case["networks"].critic.apply, {"params": case["target_params"]["critic"]})
    shared = (args, case["networks"], params, case["target_params"], case["batch"])
    _, metrics = qam.policy_loss(*shared, None, target_q, jax.random.key(0))
    assert metrics["adjoint_loss"] == 0


def test_chunks_end_with_their_episode():
    """gather_chunks against a loop over the transitions, on random episode ends."""
    rng = np.random.default_rng(0)
    n, horizon, discount = 60, 5, 0.9
    rows = dict(observations=rng.normal(size=(n, 3)), actions=rng.normal(size=(n, 2)), rewards=rng.normal(size=n))
    rows |= dict(masks=rng.random(n) < 0.8, terminals=rng.random(n) < 0.2, next_observations=rng.normal(size=(n, 3)))
    dataset = qam.Dataset(**{field: np.asarray(values, np.float32) for field, values in rows.items()})
    indices = np.arange(n - horizon + 1)
    batch = qam.gather_chunks(jax.tree.map(jnp.asarray, dataset), jnp.asarray(indices), horizon, discount)
    for j in indices:
        last, reward = j, 0.0
        for i in range(horizon):
            reward, last = reward + discount**i * dataset.rewards[j + i], j + i
            if dataset.terminals[j + i]:
                break
        np.testing.assert_allclose(batch.rewards[j], reward, rtol=1e-5, atol=1e-6)
        assert batch.masks[j] == dataset.masks[j : last + 1].min()
        assert batch.valid[j] == float(not dataset.terminals[j : j + horizon - 1].any())
        np.testing.assert_array_equal(batch.next_observations[j], dataset.next_observations[last])
        np.testing.assert_array_equal(batch.actions[j], dataset.actions[j : j + horizon].ravel())


def test_update_clips_jointly_and_moves_targets_towards_the_parameters_before_it(case):
    args = qam.dataclasses.replace(case["args"], tau=0.25, max_grad_norm=0.5, learning_rate=1e-3)
    params, target_params = case["params"], case["target_params"]
    opt_state = qam.make_optimizer(args).init(params)
    state = qam.TrainState(params, target_params, opt_state, jnp.zeros((), jnp.int32))
    update = jax.jit(partial(qam.update, args, case["networks"]))
    new, metrics = update(state, case["batch"], jax.random.key(0))
    for name in ("critic", "slow"):
        expected = jax.tree.map(lambda t, p: 0.75 * t + 0.25 * p, target_params[name], params[name])
        close(new.target_params[name], expected, 1e-6)
    first_moment = new.opt_state[1][0].mu  # 0.1 of the clipped gradient, after one step
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.05, rel=1e-4)
    assert metrics["policy_grad_norm"] > 0.5 and new.step == 1


def test_best_of_n_takes_the_chunk_of_highest_value(case):
    args = qam.dataclasses.replace(case["args"], best_of_n=16)
    observations, key = case["batch"].observations, jax.random.key(3)
    actions = qam.sample_actions(args, case["networks"], case["params"], observations, key)
    x0 = jax.random.normal(key, (16, 8, 6))
    fast = partial(case["networks"].fast.apply, {"params": case["params"]["fast"]}, observations)
    q = partial(case["networks"].critic.apply, {"params": case["params"]["critic"]}, observations)
    drawn = [jnp.clip(qam.sample_ode(fast, x, 10), -1, 1) for x in x0]
    best = np.max([q(a).mean(axis=0) for a in drawn], axis=0)
    assert actions.shape == (8, 6) and np.abs(actions).max() <= 1
    np.testing.assert_allclose(q(actions).mean(axis=0), best, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def train(case):
    run = jax.jit(partial(qam.train_steps, case["args"], case["networks"]))
    return run, qam.init_state(case["args"], case["networks"], 6, 3, jax.random.key(0))


def test_result_does_not_depend_on_steps_per_dispatch(case, train):
    run, start = train
    at_once, metrics = run(start, case["dataset"], 5)
    in_parts, _ = run(run(start, case["dataset"], 2)[0], case["dataset"], 3)
    jax.tree.map(np.testing.assert_array_equal, at_once, in_parts)
    assert metrics["step"] == 5 and at_once.step == 5


def test_metrics_stop_at_the_first_that_is_not_finite(case, train):
    run, start = train
    poisoned = case["dataset"]._replace(rewards=jnp.full_like(case["dataset"].rewards, jnp.nan))
    _, metrics = run(start, poisoned, 4)
    assert metrics["step"] == 1 and np.isnan(metrics["critic_loss"]) and np.isfinite(metrics["flow_loss"])


def test_bandit_converges_to_behaviour_times_exp_q():
    """A network added to the analytic behaviour flow, inv_temp 1, T = 30: its samples against the closed form's."""
    steps, batch_size, num_updates = 30, 128, 1000
    network = qam.MLP((64, 64, 64), 2)
    params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_updates))
    fast = lambda params: lambda x, t: behaviour_velocity(x, t) + network.apply(params, jnp.concatenate([x, t], -1))

    def loss(params, key):
        key_x0, key_noise = jax.random.split(key)
        x0, noise = (
            jax.random.normal(key_x0, (batch_size, 2)),
            jax.random.normal(key_noise, (steps - 1, batch_size, 2)),
        )
        xs = jax.lax.stop_gradient(qam.sample_memoryless_sde(fast(params), behaviour_velocity, x0, noise))
        terminal = -jax.grad(lambda a: value(a).sum())(xs[-1])
        adjoints = qam.lean_adjoint(behaviour_velocity, xs[:-1], terminal)
        return qam.adjoint_matching_loss(fast(params), behaviour_velocity, xs[:-1], adjoints)

    def step(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), num_updates)
    (params, _), _ = jax.jit(partial(jax.lax.scan, step))((params, optimizer.init(params)), keys)
    rng = np.random.default_rng(0)
    target = draw(rng, TARGET_MEANS, PRECISION**-0.5, TARGET_LOG_WEIGHTS, 3000)
    behaviour = draw(rng, MEANS, 0.15, np.zeros(4), 3000)
    sample = np.asarray(qam.sample_ode(fast(params), jax.random.normal(jax.random.key(2), (3000, 2)), steps))
    distance, start = mmd(sample, target), mmd(behaviour, target)
    print(f"bandit: MMD {distance:.4f} to the target, behaviour {start:.4f}")
    assert start > 0.25 and distance < 0.03
