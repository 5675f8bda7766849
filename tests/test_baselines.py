"""The baselines' losses and gradients against reference vectors, and DSRL's tanh-Gaussian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose
from vectors import assert_close, losses_with_reference_draws, nested, of_networks, read_case

from baselines import bam, dsrl, fbrac, fql

SCRIPTS = {"fql": fql, "fbrac": fbrac, "bam": bam, "dsrl": dsrl}
COEFFICIENTS = {
    "fql": {"alpha": 30.0},
    "fbrac": {"alpha": 10.0},
    "bam": {"inv_temp": 3.0},
    "dsrl": {"noise_scale": 1.2},
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
}
TARGETS = {
    "fql": ("critic",),
    "fbrac": ("critic",),
    "bam": ("critic", "behavior"),
    "dsrl": ("critic", "behavior"),
}

# The normal draws of critic_loss and policy_loss, in their order.
DRAWS = {
    "fql": ("next_action", "bc_x0", "actor"),
    "fbrac": ("next_action", "bc_x0", "actor"),
    "bam": ("next_action", "bc_x0", "sde_x0", "sde"),
    "dsrl": ("next_latent_eps", "bc_x0", "latent_distill", "actor_latent_eps"),
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
    if name == "bam":
        both_terms = metrics["path_loss"] - case.args.inv_temp * metrics["value"]
        assert_close(both_terms, case.arrays["info/actor/bam_loss"])


def test_gradients_match_the_reference(name, case, gradients_and_metrics):
    gradients, _ = gradients_and_metrics
    reference = nested(case.arrays, "grad")
    assert_close(gradients, of_networks(reference, NETWORKS[name]))


def test_next_actions_match_the_reference(name, case):
    noise = case.arrays[f"noise/{DRAWS[name][0]}"]
    acting = {**case.params, "target": case.target_params}
    policy_actions = partial(SCRIPTS[name].policy_actions, case.args, case.networks)
    actions = policy_actions(acting, case.batch.next_observations, noise)
    assert_close(actions, case.arrays["out/next_actions"])


def test_parameters_and_targets_are_those_of_the_reference(name, case):
    """As a run starts with them: the same networks, layers and shapes; and targets are copies."""
    script = SCRIPTS[name]
    key = jax.random.key(0)
    state = script.init_state(case.args, case.networks, 6, 3, key)
    of_run = jax.tree.map(jnp.shape, (state.params, state.target_params))
    of_case = jax.tree.map(jnp.shape, (case.params, case.target_params))
    assert of_run == of_case
    for target, array in state.target_params.items():
        jax.tree.map(np.testing.assert_array_equal, array, state.params[target])


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
