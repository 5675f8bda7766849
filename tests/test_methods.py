"""The losses and gradients of baselines and variants against reference vectors, and properties."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from vectors import (
    assert_close,
    losses_with_reference_draws,
    nested,
    of_networks,
    read_case,
    reference_draws,
)

import qam_offline
from baselines import bam, dsrl, fbrac, fql
from variants import qam_edit, qam_fql, trqam

SCRIPTS = {
    "fql": fql,
    "fbrac": fbrac,
    "bam": bam,
    "dsrl": dsrl,
    "qam_fql": qam_fql,
    "qam_edit": qam_edit,
    "trqam": trqam,
}
COEFFICIENTS = {
    "fql": {"alpha": 30.0},
    "fbrac": {"alpha": 10.0},
    "bam": {"inv_temp": 3.0},
    "dsrl": {"noise_scale": 1.2},
    "qam_fql": {"inv_temp": 3.0, "fql_alpha": 30.0},
    "qam_edit": {"inv_temp": 3.0, "edit_scale": 0.1},
    "trqam": {"kl_budget": 1.0},
}

# What the reference calls our networks; which of them have a target copy.
NETWORKS = {
    "fql": {
        "critic": "critic",
        "behavior": "actor_bc_flow",
        "one_step": "actor_onestep_flow",
    },
    "fbrac": {
        "critic": "critic",
        "policy": "actor_flow",
    },
    "bam": {
        "critic": "critic",
        "behavior": "actor_slow",
        "policy": "actor_fast",
    },
    "dsrl": {
        "critic": "critic",
        "behavior": "actor_bc_flow",
        "actor": "actor",
        "latent_critic": "z_critic",
        "log_beta": "alpha",
    },
    "qam_fql": {
        "critic": "critic",
        "behavior": "actor_slow",
        "policy": "actor_fast",
        "one_step": "one_step_actor",
    },
    "qam_edit": {
        "critic": "critic",
        "behavior": "actor_slow",
        "policy": "actor_fast",
        "edit": "edit_actor",
        "log_beta": "edit_alpha",
    },
    "trqam": {
        "critic": "critic",
        "behavior": "actor_slow",
        "policy": "actor_fast",
    },
}
TARGETS = {
    "fql": ("critic",),
    "fbrac": ("critic",),
    "bam": ("critic", "behavior"),
    "dsrl": ("critic", "behavior"),
    "qam_fql": ("critic", "behavior"),
    "qam_edit": ("critic", "behavior"),
    "trqam": ("critic", "behavior"),
}

# The normal draws of critic_loss and policy_loss, in their order.
DRAWS = {
    "fql": ("next_action", "bc_x0", "actor"),
    "fbrac": ("next_action", "bc_x0", "actor"),
    "bam": ("next_action", "bc_x0", "sde_x0", "sde"),
    "dsrl": ("next_latent_eps", "bc_x0", "latent_distill", "actor_latent_eps"),
    "qam_fql": ("next_action", "bc_x0", "sde_x0", "sde", "variant_base"),
    "qam_edit": (
        "next_action",
        "next_edit_eps",
        "bc_x0",
        "sde_x0",
        "sde",
        "variant_base",
        "edit_eps",
    ),
    "trqam": ("next_action", "bc_x0", "sde_x0", "sde"),
}
# Those of them that make a'.
ACTING_DRAWS = {"qam_edit": 2}

# What the reference calls our metrics.
CRITIC_METRICS = {"critic_loss": "critic/critic_loss", "q_mean": "critic/q_mean"}
METRICS = {
    "fql": {
        "flow_loss": "actor/bc_flow_loss",
        "distillation_loss": "actor/distill_loss",
        "policy_loss": "actor/actor_loss",
    },
    "fbrac": {
        "flow_loss": "actor/bc_flow_loss",
        "policy_loss": "actor/actor_loss",
    },
    "bam": {
        "flow_loss": "actor/flow_loss",
        "path_loss": "actor/bc_loss",
    },
    "dsrl": {
        "flow_loss": "actor/flow_loss",
        "latent_loss": "critic/distill_loss",
        "actor_loss": "actor/actor_loss",
        "beta_loss": "actor/alpha_loss",
        "beta": "actor/alpha",
        "entropy": "actor/entropy",
    },
    "qam_fql": {
        "flow_loss": "actor/flow_loss",
        "adjoint_loss": "actor/adj_loss",
        "distillation_loss": "actor/fql_distill_loss",
    },
    "qam_edit": {
        "flow_loss": "actor/flow_loss",
        "adjoint_loss": "actor/adj_loss",
        "beta_loss": "actor/edit_alpha_loss",
        "beta": "actor/edit_alpha",
        "entropy": "actor/edit_entropy",
    },
    "trqam": {
        "flow_loss": "actor/flow_loss",
        "adjoint_loss": "actor/adj_loss",
        "path_kl": "actor/path_kl",
    },
}


def case_of(name):
    file = f"{name}_case_a.npz"
    coefficients = COEFFICIENTS[name]
    return read_case(SCRIPTS[name], file, NETWORKS[name], TARGETS[name], **coefficients)


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(name):
    return case_of(name)


@pytest.fixture(scope="module")
def gradients_and_metrics(name, case):
    return losses_with_reference_draws(SCRIPTS[name], case, DRAWS[name])


def test_losses_match_the_reference(name, case, gradients_and_metrics):
    _, metrics = gradients_and_metrics
    for ours, reference in {**CRITIC_METRICS, **METRICS[name]}.items():
        assert_close(metrics[ours], case.arrays[f"info/{reference}"])
    info = {key.rpartition("/")[2]: array for key, array in case.arrays.items() if "info/" in key}
    if name == "bam":
        both_terms = metrics["path_loss"] - case.args.inv_temp * metrics["value"]
        assert_close(both_terms, info["bam_loss"])
    if name == "qam_fql":
        assert_close(-metrics["value"], info["fql_q_loss"])
    if name == "qam_edit":
        assert_close(-metrics["value"], info["edit_q_loss"])
        assert_close(metrics["edit_loss"], info["edit_q_loss"] + info["edit_entropy_loss"])


def test_gradients_match_the_reference(name, case, gradients_and_metrics):
    gradients, _ = gradients_and_metrics
    reference = nested(case.arrays, "grad")
    assert_close(gradients, of_networks(reference, NETWORKS[name]))


def test_next_actions_match_the_reference(name, case):
    draws = DRAWS[name][: ACTING_DRAWS.get(name, 1)]
    noises = [case.arrays[f"noise/{draw}"] for draw in draws]
    acting = {**case.params, "target": case.target_params}
    policy_actions = partial(SCRIPTS[name].policy_actions, case.args, case.networks)
    actions = policy_actions(acting, case.batch.next_observations, *noises)
    assert_close(actions, case.arrays["out/next_actions"])


def test_parameters_and_targets_are_those_of_the_reference(name, case):
    """As a run starts with them: the same networks, layers and shapes; and targets are copies."""
    script = SCRIPTS[name]
    key = jax.random.key(0)
    state = script.init_state(case.args, case.networks, 6, 3, key)
    of_run = jax.tree.map(jnp.shape, (state.params, state.target_params))
    of_case = jax.tree.map(jnp.shape, (case.params, case.target_params))
    assert of_run == of_case
    for target in TARGETS[name]:
        pair = (state.target_params[target], state.params[target])
        jax.tree.map(np.testing.assert_array_equal, *pair)


# ------------------------------------------------------------------------------------------ DSRL


def test_tanh_gaussian_is_scipys():
    """log pi(z) at z = tanh(u), by the change of variables in double precision."""
    mean = np.array([0.3, -1.0, 2.0])
    log_std = np.array([-0.5, 0.2, -1.0])
    noise = np.array([1.0, -0.7, 0.4])
    z, log_density = dsrl.sample_tanh_gaussian(mean, log_std, noise)
    std = np.exp(log_std)
    u = mean + std * noise
    log_slope = np.log1p(-(np.tanh(u) ** 2))
    expected = scipy.stats.norm.logpdf(u, mean, std) - log_slope
    assert_allclose(z, np.tanh(u), rtol=1e-6)
    assert_allclose(log_density, expected.sum(), rtol=1e-5)


def test_tanh_gaussian_where_tanh_is_flat():
    """1 - tanh(30)^2 is 0 in float32; its logarithm is 2 (log 2 - 30)."""
    zero = jnp.zeros(1)
    _, log_density = dsrl.sample_tanh_gaussian(zero + 30, zero, zero)
    expected = scipy.stats.norm.logpdf(0.0) - 2 * (np.log(2) - 30)
    assert float(log_density) == pytest.approx(expected, rel=1e-6)


def test_dsrl_acts_by_the_target_flow():
    case = case_of("dsrl")
    act = jax.jit(partial(dsrl.sample_actions, case.args, case.networks))

    def actions_of(params):
        return act(params, case.batch.observations, jax.random.key(0))

    with_target = {**case.params, "target": case.target_params}
    target_as_own = {**case.params, "behavior": case.target_params["behavior"]}
    actions = actions_of(with_target)
    assert_allclose(actions, actions_of(target_as_own), atol=1e-6)
    assert not np.allclose(actions, actions_of(case.params), atol=1e-3)


# ------------------------------------------------------------------------------------ the variants


@pytest.mark.parametrize(
    "name, coefficient", [("qam_fql", "fql_alpha"), ("qam_edit", "edit_scale")]
)
def test_with_a_coefficient_of_zero_it_is_qam(name, coefficient):
    """The same draws, update and actions; the network that is added stands still."""
    case = case_of(name)
    script = SCRIPTS[name]
    settings = {**vars(case.args), coefficient: 0.0}
    args = script.Args(**settings)
    qam_args = qam_offline.Args(**{key: settings[key] for key in vars(qam_offline.Args())})
    key = jax.random.key(1)

    def step(script, args):
        networks = script.make_networks(args, 6, 3)
        state = script.init_state(args, networks, 6, 3, key)
        update = jax.jit(partial(script.update, args, networks))
        after, metrics = update(state, case.batch, key)
        params = {**after.params, "target": after.target_params}
        act = jax.jit(partial(script.sample_actions, args, networks))
        return state, after, metrics, act(params, case.batch.observations, key)

    before, ours, metrics, actions = step(script, args)
    _, qams, qam_metrics, qam_actions = step(qam_offline, qam_args)
    assert metrics.keys() == qam_metrics.keys()
    shared = {network: ours.params[network] for network in qams.params}
    pairs = ((actions, qam_actions), (shared, qams.params))
    for ours_of_it, qams_of_it in (*pairs, (ours.target_params, qams.target_params)):
        jax.tree.map(partial(assert_allclose, atol=1e-5), ours_of_it, qams_of_it)
    added = ours.params.keys() - qams.params.keys()
    assert added
    for network in added:
        pair = (ours.params[network], before.params[network])
        jax.tree.map(np.testing.assert_array_equal, *pair)


# ------------------------------------------------------------------------------------------- TRQAM


def test_lambda_and_the_average_after_the_step_are_those_of_the_reference():
    case = case_of("trqam")
    optimizer = trqam.make_optimizer(case.args).init(case.params)
    state = trqam.TrainState(case.params, case.target_params, optimizer, jnp.int32(0), None)
    update = jax.jit(partial(trqam.update, case.args, case.networks))
    with reference_draws(case, DRAWS["trqam"]):
        after, metrics = update(state, case.batch, jax.random.key(0))
    dual = (after.target_params["lambda"], after.target_params["kl_average"])
    assert_close(dual, (case.arrays["dual/new_lambda"], case.arrays["dual/new_kl_ema"]))
    assert (metrics["lambda"], metrics["kl_average"]) == dual


def test_path_kl_is_the_mean_of_the_log_likelihood_ratio():
    """Of the paths themselves: Gaussian steps of variance h sigma^2, in double precision."""
    num_steps = 5
    h = 1 / num_steps

    def base(x, t):
        return 0.5 * x - t

    def velocity(x, t):
        # No difference in the last step, which both make without noise.
        return base(x, t) + (1 - h - t) * jnp.array([0.8, -0.5])

    def log_likelihood(velocity, xs):
        total = 0.0
        for i in range(num_steps - 1):
            mean = xs[i] + h * trqam.drift(velocity, xs[i], i * h, i * h + h)
            std = np.sqrt(h * 2 * (1 - i * h + h) / (i * h + h))
            total += scipy.stats.norm.logpdf(xs[i + 1], mean, std).sum(axis=-1)
        return total

    key_x0, key_noise = jax.random.split(jax.random.key(0))
    x0 = jax.random.normal(key_x0, (20_000, 2))
    noise = jax.random.normal(key_noise, (num_steps - 1, 20_000, 2))
    xs = trqam.sample_memoryless_sde(velocity, base, x0, noise)
    ratio = log_likelihood(velocity, xs) - log_likelihood(base, xs)
    kl = trqam.path_kl(velocity, base, xs[:-1], horizon=2)
    assert float(kl) == pytest.approx(ratio.mean() / 2, abs=4 * ratio.std() / 2 / np.sqrt(20_000))
    assert float(kl) > 0.03


def test_lambda_finds_the_budget():
    """With a KL that falls as lambda rises, as it does for the policy that is optimal."""
    args = trqam.Args(kl_budget=0.3)
    dual = {"lambda": jnp.ones(()), "kl_average": jnp.zeros(())}
    step = jax.jit(partial(trqam.update_lambda, args))
    for _ in range(5_000):
        kl = 2.7 / dual["lambda"] ** 2
        dual = step(dual, kl)
    assert float(kl) == pytest.approx(0.3, rel=1e-2)
    assert float(dual["lambda"]) == pytest.approx(3.0, rel=1e-2)


def test_lambda_keeps_its_bounds_and_a_wild_batch_counts_as_twice_the_budget():
    args = trqam.Args(kl_budget=0.5)
    dual = {"lambda": jnp.array(0.0101), "kl_average": jnp.zeros(())}
    low = trqam.update_lambda(args, dual, jnp.array(0.0))
    assert float(low["lambda"]) == pytest.approx(0.01)
    wild = trqam.update_lambda(args, dual, jnp.array(1e9))
    assert float(wild["kl_average"]) == pytest.approx(0.1)
    high = {"lambda": jnp.array(99.999), "kl_average": jnp.array(1.0)}
    high = trqam.update_lambda(args, high, jnp.array(1e9))
    assert float(high["lambda"]) == 100


def test_pretraining_is_imitation_alone_and_its_end_a_fresh_start():
    case = case_of("trqam")
    args = trqam.Args(**{**vars(case.args), "pretrain_steps": 3})
    start = trqam.init_state(args, case.networks, 6, 3, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, start.params["policy"], start.params["behavior"])
    update = jax.jit(partial(trqam.update, args, case.networks))

    def moved(state, before, network):
        pairs = (state.params[network], before.params[network])
        return not all_equal(*pairs)

    state = start
    for i in range(2):
        state, metrics = update(state, case.batch, jax.random.key(i))
        assert moved(state, start, "behavior")
        assert not moved(state, start, "critic")
        assert not moved(state, start, "policy")
        assert (metrics["lambda"], metrics["kl_average"]) == (1, 0)
    state, _ = update(state, case.batch, jax.random.key(2))
    assert state.step == 0
    behavior = state.params["behavior"]
    assert all_equal(state.params["policy"], behavior)
    assert all_equal(state.target_params["behavior"], behavior)
    assert all_equal(state.opt_state, trqam.make_optimizer(args).init(state.params))
    critics = (state.target_params["critic"], start.params["critic"])
    jax.tree.map(partial(assert_allclose, atol=1e-6), *critics)

    after, metrics = update(state, case.batch, jax.random.key(3))
    for network in ("critic", "behavior", "policy"):
        assert moved(after, state, network)
    assert metrics["lambda"] != 1


def all_equal(tree, other):
    return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"kl_budget": 0.0}, "--kl-budget and --lambda-scale must be above 0"),
        ({"lambda_scale": -1.0}, "--kl-budget and --lambda-scale must be above 0"),
        ({"pretrain_steps": -1}, "--pretrain-steps must be at least 0"),
    ],
)
def test_flags_of_trqam_that_can_not_be_used(values, words):
    with pytest.raises(ValueError, match=words):
        trqam.Args(**values)
