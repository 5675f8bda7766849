"""Write docs/reference_vectors.npz, a small case for ports: python dev/make_reference_vectors.py

Everything comes from the functions of qam_offline.py, on random parameters and noise. What the
arrays are, and a check of them in NumPy, stands in docs/reference_vectors.md.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/reference_vectors.npz"
sys.path.insert(0, str(ROOT))  # for the script
import qam_offline as qam  # noqa: E402

BATCH = 4  # B
OBSERVATION = 3  # O
ACTION = 2  # A
STEPS = 5  # T


def make_arrays():
    """{name: array}: parameters, draws, and what the equations make of them."""
    args = qam.Args(hidden_dims=(16, 16), num_critics=2, horizon=2, flow_steps=STEPS, inv_temp=3.0)
    networks = qam.make_networks(args, OBSERVATION, ACTION)
    key_state, key_s, key_x0, key_noise, key_batch = jax.random.split(jax.random.key(0), 5)
    state = qam.init_state(args, networks, OBSERVATION, ACTION, key_state)
    params = {
        "behavior": state.target_params["behavior"],
        "policy": state.params["policy"],
        "critic": state.target_params["critic"],
    }
    observations = jax.random.normal(key_s, (BATCH, OBSERVATION))
    dimension = args.horizon * ACTION  # D
    x0 = jax.random.normal(key_x0, (BATCH, dimension))
    noise = jax.random.normal(key_noise, (STEPS - 1, BATCH, dimension))
    matching, gradient = adjoint_matching(args, networks, params, observations, x0, noise)
    batch, losses, gradients = other_losses(args, networks, params, observations, key_batch)
    trees = {
        "params": params,
        "grad": {"policy": gradient, **gradients},
        **chunks(args),
    }
    arrays = {
        "inv_temp": args.inv_temp,
        "observations": observations,
        "x0": x0,
        "noise": noise,
        **matching,
        **batch,
        **losses,
        **flatten_dict(trees, sep="/"),
    }
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def adjoint_matching(args, networks, params, observations, x0, noise):
    """Equations (3) to (6): (results, the policy's gradient)."""

    def velocity(network, network_params):
        return partial(network.apply, {"params": network_params}, observations)

    base = velocity(networks.behavior, params["behavior"])
    policy = velocity(networks.policy, params["policy"])
    xs = qam.sample_memoryless_sde(policy, base, x0, noise)

    def total_value(actions):
        clipped = jnp.clip(actions, -1, 1)
        q = networks.critic.apply({"params": params["critic"]}, observations, clipped)
        return q.mean(axis=0).sum()

    g = -args.inv_temp * jax.grad(total_value)(xs[-1])
    adjoints = qam.lean_adjoint(base, xs[:-1], g)

    def loss_of(policy_params):
        policy = velocity(networks.policy, policy_params)
        return qam.adjoint_matching_loss(policy, base, xs[:-1], adjoints)

    loss, gradient = jax.value_and_grad(loss_of)(params["policy"])
    h = 1 / STEPS
    results = {
        "sigmas": qam.memoryless_sigma(jnp.arange(STEPS) * h, h),
        "xs": xs,
        "behavior_actions": jnp.clip(qam.sample_ode(base, x0, STEPS), -1, 1),
        "g": g,
        "adjoints": adjoints,
        "adjoint_loss": loss,
    }
    return results, gradient


def chunks(args):
    """Two episodes, of 5 transitions and of 3, and the chunk from every start: two dicts."""
    rng = np.random.default_rng(0)
    dataset = qam.Dataset(
        observations=rng.normal(size=(8, OBSERVATION)),
        actions=rng.uniform(-1, 1, (8, ACTION)),
        rewards=rng.normal(size=8),
        masks=np.array([1, 1, 1, 0, 1, 0, 1, 1]),
        terminals=np.array([0, 0, 0, 0, 1, 0, 0, 1]),
        next_observations=rng.normal(size=(8, OBSERVATION)),
    )
    starts = jnp.arange(8 - args.horizon + 1)
    dataset = jax.tree.map(jnp.asarray, dataset)
    batch = qam.gather_chunks(dataset, starts, args.horizon, args.discount)
    return {"data": dataset._asdict(), "chunks": batch._asdict()}


def other_losses(args, networks, params, observations, key):
    """Equations (1) and (2) on a batch: (its arrays, results, gradients by network).

    Q' has the parameters of Q, as at the start of a run; it is constant all the same.
    """
    keys = jax.random.split(key, 7)
    shape = (BATCH, args.horizon * ACTION)
    batch = {
        "actions": jax.random.uniform(keys[0], shape, minval=-1, maxval=1),
        "rewards": -jax.random.uniform(keys[1], (BATCH,)),
        "masks": jnp.array([1.0, 0.0, 1.0, 1.0]),
        "valid": jnp.array([1.0, 1.0, 0.0, 1.0]),
        "next_observations": jax.random.normal(keys[2], observations.shape),
        "next_x0": jax.random.normal(keys[3], shape),
        "flow_x0": jax.random.normal(keys[4], shape),
        "flow_t": jax.random.uniform(keys[5], (BATCH, 1)),
        "discount": args.discount,
        "rho": args.rho,
    }
    next_s = batch["next_observations"]
    next_actions = qam.policy_actions(args, networks, params, next_s, batch["next_x0"])
    next_q = networks.critic.apply({"params": params["critic"]}, next_s, next_actions)
    discount_h = args.discount**args.horizon
    y = qam.td_target(batch["rewards"], batch["masks"], next_q, discount_h, args.rho)

    def critic_loss(critic_params):
        q = networks.critic.apply({"params": critic_params}, observations, batch["actions"])
        return jnp.mean(batch["valid"] * (q - y) ** 2)

    def flow_loss(behavior_params):
        velocity = partial(networks.behavior.apply, {"params": behavior_params}, observations)
        flow_batch = [batch[name] for name in ("actions", "valid", "flow_x0", "flow_t")]
        return qam.flow_matching_loss(velocity, *flow_batch)

    results = {"next_actions": next_actions, "y": y}
    gradients = {}
    results["critic_loss"], gradients["critic"] = jax.value_and_grad(critic_loss)(params["critic"])
    results["flow_loss"], gradients["behavior"] = jax.value_and_grad(flow_loss)(params["behavior"])
    return batch, results, gradients


if __name__ == "__main__":
    np.savez_compressed(PATH, **make_arrays())
    print(f"{PATH}: {PATH.stat().st_size} bytes")
