"""The losses and gradients of baselines and variants against reference vectors, and properties."""

import sys
import types
from functools import partial

import gymnasium
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
from baselines import (
    bam,
    cgql,
    dac,
    dsrl,
    fawac,
    fbrac,
    fedit,
    fql,
    ifql,
    qgf,
    qsm,
    rebrac,
    rlpd,
    rql,
)
from tools import make_online
from variants import qam_edit, qam_fql, trqam

SCRIPTS = {
    "fql": fql,
    "fbrac": fbrac,
    "bam": bam,
    "dsrl": dsrl,
    "qam_fql": qam_fql,
    "qam_edit": qam_edit,
    "trqam": trqam,
    "fedit": fedit,
    "ifql": ifql,
    "fawac": fawac,
    "rebrac": rebrac,
    "rlpd": rlpd,
    "cgql": cgql,
    "cgql_mse": cgql,
    "cgql_linex": cgql,
    "qsm": qsm,
    "dac": dac,
    "rql": rql,
    "qgf": qgf,
}
COEFFICIENTS = {
    "fql": {"alpha": 30.0},
    "fbrac": {"alpha": 10.0},
    "bam": {"inv_temp": 3.0},
    "dsrl": {"noise_scale": 1.2},
    "qam_fql": {"inv_temp": 3.0, "fql_alpha": 30.0},
    "qam_edit": {"inv_temp": 3.0, "edit_scale": 0.1},
    "trqam": {"kl_budget": 1.0},
    "fedit": {"edit_scale": 0.2},
    "ifql": {"kappa": 0.9},
    "fawac": {"inv_temp": 4.0},
    "rebrac": {"alpha_actor": 0.1, "actor_noise": 0.4},
    "rlpd": {"bc_alpha": 0.1},
    "cgql": {"mode": "simple", "inv_temp": 3.0, "guidance_coef": 0.1},
    "cgql_mse": {"mode": "mse", "inv_temp": 3.0, "guidance_coef": 0.1, "noisy_coef": 0.1},
    "cgql_linex": {"mode": "linex", "inv_temp": 3.0, "guidance_coef": 0.1, "noisy_coef": 0.1},
    "qsm": {"alpha": 10.0, "inv_temp": 3.0},
    "dac": {"alpha": 1.0},
    "rql": {"alpha": 3.0, "expectile": 0.9, "ema": 0.999},
    "qgf": {"kappa": 0.9, "guidance_weight": 0.5},
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
    "fedit": {
        "critic": "critic",
        "behavior": "actor_bc_flow",
        "edit": "edit_actor",
        "log_beta": "alpha",
    },
    "ifql": {
        "critic": "critic",
        "value": "value",
        "behavior": "actor_flow",
    },
    "fawac": {
        "critic": "critic",
        "value": "value",
        "policy": "actor",
    },
    "rebrac": {
        "critic": "critic",
        "policy": "actor",
    },
    "rlpd": {
        "critic": "critic",
        "policy": "actor",
        "log_beta": "alpha",
    },
    "cgql": {"critic": "critic", "behavior": "actor"},
    "cgql_mse": {"critic": "critic", "behavior": "actor"},
    "cgql_linex": {"critic": "critic", "behavior": "actor"},
    "qsm": {"critic": "critic", "policy": "actor"},
    "dac": {"critic": "critic", "policy": "actor"},
    "rql": {"critic": "critic", "policy": "actor"},
    "qgf": {"critic": "critic", "value": "value", "behavior": "actor_flow"},
}
TARGETS = {
    "fql": ("critic",),
    "fbrac": ("critic",),
    "bam": ("critic", "behavior"),
    "dsrl": ("critic", "behavior"),
    "qam_fql": ("critic", "behavior"),
    "qam_edit": ("critic", "behavior"),
    "trqam": ("critic", "behavior"),
    "fedit": ("critic",),
    "ifql": ("critic",),
    "fawac": ("critic",),
    "rebrac": ("critic", "policy"),
    "rlpd": ("critic",),
    "cgql": ("critic", "behavior"),
    "cgql_mse": ("critic", "behavior"),
    "cgql_linex": ("critic", "behavior"),
    "qsm": ("critic",),
    "dac": ("critic",),
    "rql": ("critic", "policy"),
    "qgf": ("critic",),
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
    "fedit": ("next_action", "next_edit_eps", "bc_x0", "actor", "edit_eps"),
    "ifql": ("bc_x0",),
    "fawac": ("next_action", "bc_x0"),
    "rebrac": ("next_action",),
    "rlpd": ("next_action_eps", "actor_eps"),
    "cgql": ("next_action", "bc_x0"),
    "cgql_mse": ("next_action", "noisy_x0", "bc_x0"),
    "cgql_linex": ("next_action", "noisy_x0", "bc_x0"),
    "qsm": ("next_action", "bc_noise"),
    "dac": ("next_action", "bc_noise"),
    "rql": ("next_action", "bc_x0"),
    "qgf": ("bc_x0",),
}
# The uniform draws, if they are others.
TIMES = {
    "cgql_mse": ("noisy_t", "bc_t"),
    "cgql_linex": ("noisy_t", "bc_t"),
    "qsm": (),
    "dac": (),
    "rql": ("reverse_t", "bc_t"),
}
# How many of them make a'.
ACTING_DRAWS = {"qam_edit": 2, "fedit": 2}
# The draws with which the reference acts.
ACTS = {
    "fedit": ("act", "act_edit_eps"),
    "ifql": ("act",),
    "fawac": ("act",),
    "rebrac": ("act",),
    "rlpd": ("act_eps",),
    "rql": ("act",),
    "qgf": ("act",),
}

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
    "fedit": {
        "flow_loss": "actor/bc_flow_loss",
        "policy_loss": "actor/actor_loss",
        "beta_loss": "actor/edit_alpha_loss",
        "entropy": "actor/edit_entropy",
    },
    "ifql": {
        "flow_loss": "actor/actor_loss",
        "value_loss": "value/value_loss",
        "value": "value/v_mean",
    },
    "fawac": {
        "flow_loss": "actor/actor_loss",
        "value_loss": "critic/value_loss",
    },
    "rebrac": {
        "actor_loss": "actor/actor_loss",
        "bc_loss": "actor/bc_loss",
        "policy_loss": "actor/total_loss",
    },
    "rlpd": {
        "actor_loss": "actor/actor_loss",
        "beta_loss": "actor/alpha_loss",
        "bc_loss": "actor/bc_loss",
        "beta": "actor/alpha",
        "entropy": "actor/entropy",
        "value": "actor/q",
        "policy_loss": "actor/total_loss",
    },
    "cgql": {"flow_loss": "actor/flow_loss"},
    "cgql_mse": {"flow_loss": "actor/flow_loss", "noisy_loss": "critic/noisy_critic_loss"},
    "cgql_linex": {"flow_loss": "actor/flow_loss", "noisy_loss": "critic/noisy_critic_loss"},
    "qsm": {},
    "dac": {},
    "qgf": {
        "flow_loss": "actor/actor_loss",
        "value_loss": "value/value_loss",
        "value": "value/v_mean",
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
    times = TIMES.get(name, ("bc_t",))
    return losses_with_reference_draws(SCRIPTS[name], case, DRAWS[name], times)


def test_losses_match_the_reference(name, case, gradients_and_metrics):
    _, metrics = gradients_and_metrics
    if name == "rql":
        assert_close(metrics["critic_loss"], case.arrays["out/critic_loss"])
        assert_close(metrics["flow_loss"], case.arrays["out/bc_loss"])
        assert_close(metrics["value"], case.arrays["out/value"])
        return
    for ours, reference in {**CRITIC_METRICS, **METRICS[name]}.items():
        expected = case.arrays.get(f"info/{reference}")
        if ours == "q_mean" and "out/q" in case.arrays:
            expected = case.arrays["out/q"].mean()  # IFQL's reference has y there
        assert_close(metrics[ours], expected)
    info = {key.rpartition("/")[2]: array for key, array in case.arrays.items() if "info/" in key}
    if name in ("qsm", "dac"):
        assert_close(metrics["bc_loss"], case.arrays["out/bc_loss"])
        assert_close(metrics["actor_loss"], case.arrays["out/actor_loss"])
    if name == "bam":
        both_terms = metrics["path_loss"] - case.args.inv_temp * metrics["value"]
        assert_close(both_terms, info["bam_loss"])
    if name == "qam_fql":
        assert_close(-metrics["value"], info["fql_q_loss"])
    if name in ("qam_edit", "fedit"):
        assert_close(-metrics["value"], info["edit_q_loss"])
        assert_close(metrics["edit_loss"], info["edit_q_loss"] + info["edit_entropy_loss"])


def test_gradients_match_the_reference(name, case, gradients_and_metrics):
    gradients, _ = gradients_and_metrics
    reference = nested(case.arrays, "grad")
    assert_close(gradients, of_networks(reference, NETWORKS[name]))


def test_next_actions_match_the_reference(name, case):
    if name in ("ifql", "rql", "qgf"):
        pytest.skip("it has no a'")
    draws = DRAWS[name][: ACTING_DRAWS.get(name, 1)]
    noises = [case.arrays[f"noise/{draw}"] for draw in draws]
    acting = {**case.params, "target": case.target_params}
    if name == "rebrac":
        acting = case.target_params
    policy_actions = partial(SCRIPTS[name].policy_actions, case.args, case.networks)
    actions = policy_actions(acting, case.batch.next_observations, *noises)
    assert_close(actions, case.arrays["out/next_actions"])


@pytest.mark.parametrize("name", ACTS)
def test_acting_matches_the_reference(name):
    """Where the reference acts, too: ReBRAC with its noise, IFQL by the best of 32.

    RQL's acts by the slow copy of the policy, as in evaluations.
    """
    case = case_of(name)
    act = partial(SCRIPTS[name].sample_actions, case.args, case.networks)
    draws = iter(ACTS[name])

    def next_draw(key, shape):
        return jnp.asarray(case.arrays[f"noise/{next(draws)}"]).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "normal", next_draw)
        params = {**case.params, "target": case.target_params}
        if name == "rql":
            params["policy"] = case.target_params["policy"]
        actions = act(params, case.batch.observations, jax.random.key(0))
    expected = "out/actions" if name in ("rql", "qgf") else "out/act"
    assert_close(actions, case.arrays[expected])
    assert list(draws) == []


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


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"kl_budget": 0.0}, "--kl-budget must be positive"),
        ({"lambda_scale": 0.0}, "--lambda-scale must be positive"),
        ({"pretrain_steps": -1}, "--pretrain-steps must be positive"),
    ],
)
def test_flags_of_trqam_that_can_not_be_used(values, words):
    with pytest.raises(ValueError, match=words):
        trqam.Args(**values)


# ------------------------------------------------------------------------------------------ ReBRAC


def test_targets_of_rebrac_move_at_every_other_step():
    """The first step is 1; critic and policy move at every one."""
    case = case_of("rebrac")
    state = rebrac.init_state(case.args, case.networks, 6, 3, jax.random.key(0))
    update = jax.jit(partial(rebrac.update, case.args, case.networks))
    for moves in (False, True, False, True):
        after, _ = update(state, case.batch, jax.random.key(1))
        for network in ("critic", "policy"):
            targets = (after.target_params[network], state.target_params[network])
            assert all_equal(*targets) != moves or state.step == 1  # copies at first
            assert not all_equal(after.params[network], state.params[network])
        state = after


def test_rebrac_starts_near_zero():
    """The last kernel is a tenth of Xavier's: uniform within sqrt(3 * 0.01 / mean fan)."""
    case = case_of("rebrac")
    state = rebrac.init_state(case.args, case.networks, 6, 3, jax.random.key(0))
    kernel = np.asarray(state.params["policy"]["mean_net"]["kernel"])
    limit = np.sqrt(3 * 0.01 / ((kernel.shape[0] + kernel.shape[1]) / 2))
    assert 0.9 * limit < np.abs(kernel).max() <= limit


# ------------------------------------------------------------------------------------------- CGQL


def test_guidance_of_a_gaussian_is_exact():
    """Data N(0, I) and Q linear: (.. + x) / t is the velocity of a flow with the score of Q."""
    args = cgql.Args(mode="simple", inv_temp=2.0, guidance_coef=1.0)
    slope = jnp.array([0.5, -1.0])

    def velocity(x, t):
        return jnp.zeros_like(x)

    def q(inputs):
        return (inputs[..., :2] @ slope)[None]

    guided = cgql.guided_velocity(args, velocity, q)
    x = jnp.array([[0.3, 0.4]])
    t = jnp.array([[0.25]])
    # A score s belongs to the velocity (x + (1 - t) s) / t of the path of (2).
    assert_allclose(guided(x, t), (x + 0.75 * 2.0 * slope) / 0.25, rtol=1e-6)
    assert_allclose(guided(x, 0 * t), jnp.zeros((1, 2)))
    no_value = cgql.Args(mode="simple", inv_temp=0.0, guidance_coef=1.0)
    assert cgql.guided_velocity(no_value, velocity, q) is velocity


def test_linex_is_least_where_the_two_agree():
    args = cgql.Args(mode="linex", inv_temp=2.0)
    data_q = jnp.array([-10.0])
    slope = jax.grad(lambda q: cgql.noisy_error(args, q, data_q)[0])
    assert float(slope(data_q)[0]) == pytest.approx(0, abs=1e-6)
    assert float(slope(data_q - 1)[0]) < 0 < float(slope(data_q + 1)[0])
    assert float(slope(data_q - 3)[0]) == -2  # beyond the jump at d = 5 it is a straight line


def test_modes_of_cgql():
    coefficients = []
    for mode in ("simple", "mse", "linex"):
        coefficients.append(cgql.Args(env_id="puzzle-3x3-play-task1", mode=mode).noisy_coef)
    assert coefficients == [0.0, 0.1, 0.001]
    with pytest.raises(ValueError, match="--mode must be simple, mse, linex, not max"):
        cgql.Args(mode="max")


# ----------------------------------------------------------------------------------------- QSM, DAC


@pytest.mark.parametrize("script", [qsm, dac])
def test_the_schedule_is_the_references(script):
    arrays = case_of("qsm").arrays
    alpha, abar = script.vp_schedule(10)
    assert_allclose(alpha, arrays["out/alpha"][1:], rtol=1e-5)
    assert_allclose(abar, arrays["out/abar"], rtol=1e-5)


@pytest.mark.parametrize("sample", [qsm.sample_by_prediction, dac.sample_by_posterior])
def test_a_perfect_noise_prediction_samples_the_action(sample):
    """If all data are one action, the noise in x_k is known, and x_0 is that action."""
    action = jnp.array([0.3, -0.6])

    def epsilon(x, k):
        _, abar = qsm.vp_schedule(10)
        return (x - jnp.sqrt(abar[k]) * action) / jnp.sqrt(1 - abar[k])

    noise = jax.random.normal(jax.random.key(0), (10, 50, 2))
    assert_allclose(sample(epsilon, noise), jnp.broadcast_to(action, (50, 2)), atol=1e-4)


# ----------------------------------------------------------------------------------- IFQL and FAWAC


def test_value_of_ifql_is_the_expectile():
    """Trained on values -1 and 1, half each, it goes to 2 kappa - 1 (kappa = 0.9: 0.8)."""
    args = ifql.Args(hidden_dims=(16,), num_critics=1, horizon=1, kappa=0.9, rho=0.0)
    networks = ifql.make_networks(args, 1, 1)
    state = ifql.init_state(args, networks, 1, 1, jax.random.key(0))
    ones = jnp.ones(64)
    values = jnp.tile(jnp.array([-1.0, 1.0]), 32)
    batch = ifql.Batch(jnp.zeros((64, 1)), values[:, None], ones, ones, ones, jnp.zeros((64, 1)))

    def q(observations, actions):
        return actions[..., 0][None]

    def loss(params):
        total, _ = ifql.policy_loss(
            args, networks, params, state.target_params, batch, q, q, jax.random.key(0)
        )
        return total

    @jax.jit
    def step(params):
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))

    params = state.params
    for _ in range(400):
        params = step(params)
    value = networks.value.apply({"params": params["value"]}, jnp.zeros((1, 1)))
    assert float(value[0]) == pytest.approx(0.8, abs=0.02)


def test_weights_of_fawac():
    """exp(inv_temp (Q - V)), at most 100, and for chunks that fit alone."""
    case = case_of("fawac")
    observations = case.batch.observations
    value = case.closure("value", case.params)(observations)

    def weight_of(advantage):
        def q(observations, actions):
            return (value + advantage)[None]

        shared = case.shared(case.params)
        _, metrics = fawac.policy_loss(*shared, q, q, jax.random.key(0))
        return float(metrics["weight"])

    assert weight_of(0.0) == pytest.approx(1, rel=1e-5)
    assert weight_of(0.5) == pytest.approx(np.exp(4.0 * 0.5), rel=1e-4)
    assert weight_of(5.0) == 100


# -------------------------------------------------------------------------------------------- RQL


def test_reversal_is_the_references():
    case = case_of("rql")
    arrays = case.arrays
    steps = arrays["noise/reverse_k"] / case.args.flow_steps
    distance = np.concatenate([arrays["noise/reverse_t"], steps])[:, None]
    v_policy = case.closure("policy", case.params, case.batch.observations)
    x = rql.reverse_ode(v_policy, case.batch.actions, distance, case.args.flow_steps)
    assert_close(x, arrays["out/x_f"])
    assert_close(1 - distance, arrays["out/f"])


def test_reversal_undoes_sampling():
    """Back by all of the time with fine steps, and forth again."""

    def velocity(x, t):
        return jnp.sin(3 * x) + t - 2 * t * x

    actions = jnp.array([[0.3, -0.8], [0.9, 0.0]])
    x0 = rql.reverse_ode(velocity, actions, jnp.ones((2, 1)), 2_000)
    assert np.abs(x0 - actions).min() > 0.05
    assert_allclose(rql.sample_ode(velocity, x0, 2_000), actions, atol=2e-3)
    assert_allclose(rql.reverse_ode(velocity, actions, jnp.zeros((2, 1)), 10), actions)


def test_losses_of_rql_leave_out_what_runs_over_an_episodes_end():
    """In the vectors every chunk is valid. Here the first is not, and its action says nothing."""
    case = case_of("rql")
    invalid = case.batch._replace(valid=case.batch.valid.at[0].set(0))
    other = invalid._replace(actions=invalid.actions.at[0].add(0.5))
    q = case.closure("critic", case.params)

    @jax.jit
    def losses(batch):
        shared = (case.args, case.networks, case.params, case.target_params, batch)
        loss_q, _ = rql.critic_loss(*shared, jax.random.key(0))
        loss_pi, _ = rql.policy_loss(*shared, q, q, jax.random.key(1))
        return loss_q, loss_pi

    assert_allclose(losses(invalid), losses(other), rtol=1e-6)
    valid_and_other = other._replace(valid=case.batch.valid)
    for ours, changed in zip(losses(case.batch), losses(valid_and_other), strict=True):
        assert abs(float(ours) - float(changed)) > 1e-3


def test_targets_of_rql_have_two_rates():
    """tau for the critic, and the policy's slow copy keeps the share ema of itself."""
    args = rql.Args(**{**vars(case_of("rql").args), "tau": 0.1, "ema": 0.7})
    case = case_of("rql")
    state = rql.init_state(args, case.networks, 6, 3, jax.random.key(0))
    state = state._replace(target_params=jax.tree.map(jnp.zeros_like, state.target_params))
    after, _ = jax.jit(partial(rql.update, args, case.networks))(
        state, case.batch, jax.random.key(1)
    )
    for network, rate in {"critic": 0.1, "policy": 0.3}.items():
        expected = jax.tree.map(lambda x: rate * x, state.params[network])  # noqa: B023
        pairs = (after.target_params[network], expected)
        jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-7), *pairs)


def test_rql_acts_by_the_slow_copy_in_evaluations_and_by_the_policy_online():
    """The online version, which tools/make_online.py merges."""
    text, num_conflicts = make_online.merge(make_online.ROOT / "baselines/rql.py")
    assert num_conflicts == 0
    online = types.ModuleType("rql_offline_to_online")
    online.__file__ = "rql_offline_to_online.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, online.__name__, online)  # dataclasses look there
        exec(text, vars(online))
    args = online.Args(
        env_id="pointmaze-medium-navigate-task1", horizon=1000, hidden_dims=(8,), eval_episodes=1
    )
    networks = online.make_networks(args, 2, 2)
    state = online.init_state(args, networks, 2, 2, jax.random.key(0))
    slow = jax.tree.map(jnp.zeros_like, state.target_params["policy"])
    state = state._replace(target_params={**state.target_params, "policy": slow})

    asked = []

    def act(params, observations, key):
        asked.append(params["policy"])
        return np.zeros((1, 2000))

    envs = gymnasium.vector.SyncVectorEnv(
        [lambda: online.ChunkedEpisode(online.make_env(args))],
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
    )
    params = {**state.params, "target": state.target_params}
    online.evaluate(args, act, params, envs, jax.random.key(0))
    assert len(asked) == 1
    assert all_equal(asked[0], slow)

    observation = np.zeros(2)
    states = jax.tree.map(lambda x: x[None], state)
    actions = online.make_act_online(args, networks)(states, observation, 0)
    params_key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31 - 2), 0)
    noise = jax.random.normal(params_key, (1, 2000))
    expected = online.policy_actions(args, networks, state.params, observation[None], noise)
    assert_allclose(actions.reshape(1, -1), expected, atol=1e-5)


@pytest.mark.parametrize("values", [{"expectile": 1.5}, {"ema": 1.01}])
def test_shares_of_rql_are_at_most_one(values):
    with pytest.raises(ValueError, match="--expectile and --ema are at most 1"):
        rql.Args(**values)


# -------------------------------------------------------------------------------------------- QGF


def test_guidance_of_qgf_pulls_the_end_of_a_straight_line():
    """By Q's gradient there, which a velocity that depends on x does not change on its way back."""
    args = qgf.Args(guidance_weight=0.25)
    best = jnp.array([0.5, -1.0])

    def velocity(x, t):
        return 0.8 * x + t

    def q(actions):
        return -((actions - best) ** 2).sum(axis=-1)[None] * jnp.array([[1.0], [3.0]])

    guided = qgf.guide_by_end(args, velocity, q)
    x = jnp.array([[0.1, -0.3], [0.2, 2.0]])
    t = jnp.array([[0.5], [0.5]])
    v = 0.8 * x + 0.5
    end = jnp.clip(x + 0.5 * v, -1, 1)
    assert end[1, 1] == 1
    assert_allclose(guided(x, t), v + 0.25 * 2 * 2 * (best - end), rtol=1e-6)
