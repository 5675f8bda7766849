"""The baselines' losses and gradients against reference vectors, and the tanh-Gaussian against scipy."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from test_algorithm import close, nested

from baselines import bam, dsrl, fbrac, fql

FQL = {"critic": "critic", "flow": "actor_bc_flow", "one_step": "actor_onestep_flow"}  # our name: the reference's
DSRL = {"critic": "critic", "flow": "actor_bc_flow", "actor": "actor", "latent_critic": "z_critic", "log_beta": "alpha"}
CASES = {  # script: its coefficient, its networks, the reference's names of its draws in order by shape, of its losses
    fql: (dict(alpha=30.0), FQL, {(8, 6): ["next_action", "bc_x0", "actor"]}),
    fbrac: (dict(alpha=10.0), {"critic": "critic", "flow": "actor_flow"}, {(8, 6): ["next_action", "bc_x0", "actor"]}),
    bam: (
        dict(inv_temp=3.0),
        {"critic": "critic", "slow": "actor_slow", "fast": "actor_fast"},
        {(8, 6): ["next_action", "bc_x0", "sde_x0"], (9, 8, 6): ["sde"]},
    ),
    dsrl: (
        dict(noise_scale=1.2),
        DSRL,
        {(8, 6): ["next_latent_eps", "bc_x0", "latent_distill", "actor_latent_eps"]},
    ),
}
LOSSES = {
    fql: {"flow_loss": "actor/bc_flow_loss", "distillation_loss": "actor/distill_loss"},
    fbrac: {"flow_loss": "actor/bc_flow_loss"},
    bam: {"flow_loss": "actor/flow_loss"},
    dsrl: {
        "flow_loss": "actor/flow_loss",
        "actor_loss": "actor/actor_loss",
        "latent_loss": "critic/distill_loss",
        "beta_loss": "actor/alpha_loss",
        "beta": "actor/alpha",
        "entropy": "actor/entropy",
    },
}


@pytest.fixture(scope="module", params=CASES, ids=lambda script: script.__name__)
def case(request):
    """A script's losses, metrics and gradients at the reference's parameters and draws."""
    script = request.param
    coefficient, names, draws = CASES[script]
    file = Path(__file__).parent / f"data/{script.__name__.split('.')[-1]}_case_a.npz"
    arrays = dict(np.load(file))
    trees = nested(arrays, "params")
    params = {name: trees[key] for name, key in names.items()}
    target_params = {name: trees[f"target_{key}"] for name, key in names.items() if f"target_{key}" in trees}
    target_params.pop("fast", None)  # the reference keeps a copy that no loss reads
    if script is dsrl:
        params["log_beta"] = params["log_beta"]["log_value"]
    args = script.Args(hidden_dims=(32,) * 4, num_critics=3, horizon=2, discount=0.99, rho=0.5, **coefficient)
    networks = script.make_networks(args, 6, 3)
    dataset = script.Dataset(*(jnp.asarray(arrays[f"dataset/{field}"]) for field in script.Dataset._fields))
    batch = script.gather_chunks(dataset, jnp.asarray(arrays["indices"]), args.horizon, args.discount)
    draws = {shape: iter(queue) for shape, queue in draws.items()}

    def losses(params):
        q = partial(networks.critic.apply, {"params": jax.lax.stop_gradient(params["critic"])})
        target_q = partial(networks.critic.apply, {"params": target_params["critic"]})
        shared, key = (args, networks, params, target_params, batch), jax.random.key(0)
        loss_q, metrics_q = script.critic_loss(*shared, key)
        loss_pi, metrics_pi = script.policy_loss(*shared, q, target_q, key)
        return loss_q + loss_pi, metrics_q | metrics_pi | {"policy_loss": loss_pi}

    with pytest.MonkeyPatch.context() as patch:
        drawn = jax.random.uniform  # older versions of flax call it when they check the shapes of kernels
        times = lambda key, shape, *rest: jnp.asarray(arrays["noise/bc_t"]) if not rest else drawn(key, shape, *rest)
        patch.setattr(jax.random, "uniform", times)
        patch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(arrays[f"noise/{next(draws[shape])}"]))
        grads, metrics = jax.grad(losses, has_aux=True)(params)
    assert all(next(queue, None) is None for queue in draws.values())  # every draw was used
    return script, arrays, names, params, target_params, grads, metrics


def test_losses_match_the_reference(case):
    script, arrays, _, _, _, _, metrics = case
    close(metrics["critic_loss"], arrays["info/critic/critic_loss"])
    close(metrics["q_mean"], arrays["info/critic/q_mean"])
    for ours, reference in LOSSES[script].items():
        close(metrics[ours], arrays[f"info/{reference}"])
    if script in (fql, fbrac):
        close(metrics["policy_loss"], arrays["info/actor/actor_loss"])
    if script is bam:  # the reference's two terms, the first with the value
        close(metrics["path_loss"], arrays["info/actor/bc_loss"])
        close(metrics["path_loss"] - 3.0 * metrics["value"], arrays["info/actor/bam_loss"])
    if script is dsrl:
        close(metrics["policy_loss"], arrays["info/actor/total_loss"] + arrays["info/critic/distill_loss"])


def test_gradients_match_the_reference(case):
    script, arrays, names, _, _, grads, _ = case
    for name, key in names.items():
        reference = nested(arrays, "grad")[key]
        close(grads[name], reference["log_value"] if name == "log_beta" else reference)


def test_next_actions_match_the_reference(case):
    script, arrays, _, params, target_params, _, _ = case
    args = script.Args(hidden_dims=(32,) * 4, num_critics=3, horizon=2, **CASES[script][0])
    noise = arrays["noise/next_latent_eps" if script is dsrl else "noise/next_action"]
    observations = arrays["batch/next_observations"][:, -1]
    acting = params | {"target": target_params}
    actions = script.policy(args, script.make_networks(args, 6, 3), acting, observations, noise)
    close(actions, arrays["out/next_actions"])


def test_tanh_gaussian_is_scipys_also_where_tanh_is_flat():
    """log pi(e) at e = tanh(u), by the change of variables in double precision; and far out, where 1 - e^2 is 0."""
    mean, log_std, noise = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.2, -1.0]), np.array([1.0, -0.7, 0.4])
    e, log_density = dsrl.sample_tanh_gaussian(*map(jnp.float32, (mean, log_std, noise)))
    u = mean + np.exp(log_std) * noise
    expected = scipy.stats.norm.logpdf(u, mean, np.exp(log_std)) - np.log1p(-(np.tanh(u) ** 2))
    np.testing.assert_allclose(e, np.tanh(u), rtol=1e-6)
    np.testing.assert_allclose(log_density, expected.sum(), rtol=1e-5)
    _, far = dsrl.sample_tanh_gaussian(jnp.array([30.0]), jnp.array([0.0]), jnp.array([0.0]))
    assert float(far) == pytest.approx(scipy.stats.norm.logpdf(0.0) - 2 * (np.log(2) - 30.0), rel=1e-6)


@pytest.mark.parametrize("case", [dsrl], indirect=True)
def test_dsrl_acts_by_the_target_flow(case):
    _, arrays, _, params, target_params, _, _ = case
    args = dsrl.Args(hidden_dims=(32,) * 4, num_critics=3, horizon=2, noise_scale=1.2)
    networks, observations = dsrl.make_networks(args, 6, 3), arrays["batch/observations"]
    act = lambda params: dsrl.sample_actions(args, networks, params, observations, jax.random.key(0))
    expected = act(params | {"flow": target_params["flow"]})
    np.testing.assert_array_equal(act(params | {"target": target_params}), expected)
    assert not np.allclose(act(params), expected)
