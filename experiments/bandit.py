"""QAM where the answer is known, in less than a minute: python experiments/bandit.py

One state; actions of two numbers. Data: four equal Gaussians at (+-0.5, +-0.5), of width 0.15. With
Q(a) = 2 a_1 + 0.7 a_2 - |a|^2 / 2 given, no critic is learned, and the optimum behavior(a)
exp(inv_temp Q(a)) / Z is known. One flow imitates the data; the policy moves to where Q is high.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where qam_offline.py is
import qam_offline as qam  # noqa: E402

# %% The problem and its answer
MEANS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
STD = 0.15
SLOPE = np.array([2.0, 0.7])


def value(actions):
    """Q: (n, 2) -> (n,)."""
    return actions @ SLOPE - (actions**2).sum(axis=1) / 2


def optimum(inv_temp):
    """Four Gaussians again: means (4, 2), standard deviation, weights (4,).

    With squares completed, exponents are -precision |a - mean|^2 / 2 + log_weight.
    """
    precision = 1 / STD**2 + inv_temp
    means = (MEANS / STD**2 + inv_temp * SLOPE) / precision
    log_weights = precision * (means**2).sum(axis=1) / 2 - (MEANS**2).sum(axis=1) / (2 * STD**2)
    weights = np.exp(log_weights - log_weights.max())
    return means, precision**-0.5, weights / weights.sum()


def draw(rng, means, std, weights):
    """3,000 samples (n, 2) of a mixture of Gaussians."""
    modes = rng.choice(len(means), 3000, p=weights)
    return means[modes] + std * rng.normal(size=(3000, 2))


@jax.jit
def distance(a, b):
    """Squared MMD of samples (n, 2): as n grows, 0 if both are of one distribution."""
    total = 0
    for x, y, factor in ((a, a, 1), (b, b, 1), (a, b, -2)):
        squares = ((x[:, None] - y) ** 2).sum(axis=-1)  # (n, n)
        for width in (0.1, 0.3, 1.0):
            total += factor * jnp.exp(-squares / (2 * width**2)).mean()
    return total


# %% The algorithm
BATCH = 128  # B
NETWORK = qam.VelocityField(hidden_dims=(64, 64, 64), action_dim=2)
STATE = jnp.zeros(0)  # there is one state, so networks are told nothing of it


def loss(params, base_params, data, key, inv_temp, flow_steps):
    """(2) + (6) of qam_offline.py's docstring. base_params: of behavior', the slow copy."""
    key_data, key_x0, key_t, key_noise = jax.random.split(key, 4)
    v_behavior = partial(NETWORK.apply, params["behavior"], STATE)
    v_policy = partial(NETWORK.apply, params["policy"], STATE)
    v_base = partial(NETWORK.apply, base_params, STATE)

    # Behavior imitates the data.
    actions = jax.random.choice(key_data, data, (BATCH,))  # (B, 2)
    x0 = jax.random.normal(key_x0, (BATCH, 2))
    t = jax.random.uniform(key_t, (BATCH, 1))
    imitation = qam.flow_matching_loss(v_behavior, actions, jnp.ones(BATCH), x0, t)

    # The policy's noisy steps; Q's gradient at their end, carried back; regression onto that.
    noise = jax.random.normal(key_noise, (flow_steps, BATCH, 2))
    xs = qam.sample_memoryless_sde(v_policy, v_base, noise[0], noise[1:])  # (T+1, B, 2)
    g = -inv_temp * jax.grad(lambda actions: value(actions).sum())(xs[-1])  # (B, 2)
    adjoints = qam.lean_adjoint(v_base, xs[:-1], g)  # (T, B, 2)
    return imitation + qam.adjoint_matching_loss(v_policy, v_base, xs[:-1], adjoints)


def train(data, inv_temp, flow_steps, steps, seed):
    """Actions (n, 2) of the policy after so many updates."""
    key_behavior, key_policy, key_noise, key_updates = jax.random.split(jax.random.key(seed), 4)
    x0 = jax.random.normal(key_noise, data.shape)
    base_params = NETWORK.init(key_behavior, STATE, x0, 0.0)
    params = {"behavior": base_params, "policy": NETWORK.init(key_policy, STATE, x0, 0.0)}
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, base_params, opt_state, key):
        grads = jax.grad(loss)(params, base_params, data, key, inv_temp, flow_steps)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        base_params = optax.incremental_update(params["behavior"], base_params, 0.01)
        return params, base_params, opt_state

    for key in jax.random.split(key_updates, steps):
        params, base_params, opt_state = update(params, base_params, opt_state, key)
    return qam.sample_ode(partial(NETWORK.apply, params["policy"], STATE), x0, flow_steps)


# %% A run
class Args(NamedTuple):
    inv_temp: float = 1.0  # weight of Q; 0 is imitation
    flow_steps: tuple[int, ...] = (10, 30)  # T; a policy is trained for each
    steps: int = 1000  # updates
    seed: int = 0
    output: Path = Path("bandit.png")  # the picture


def run(args):
    """Train, print and draw: a figure. Distances (squared MMD) are to the target, the optimum."""
    if not (0 <= args.inv_temp < np.inf and args.steps > 0 and min(args.flow_steps, default=0) > 1):
        qam.fail("--inv-temp must be 0 or more, --steps 1 or more, --flow-steps 2 or more")
    rng = np.random.default_rng(args.seed)
    data = draw(rng, MEANS, STD, np.ones(4) / 4)
    target = draw(rng, *optimum(args.inv_temp))
    panels = {"data": data, "target, drawn again": draw(rng, *optimum(args.inv_temp))}
    for flow_steps in args.flow_steps:
        started = time.perf_counter()
        actions = train(data, args.inv_temp, flow_steps, args.steps, args.seed)
        panels[f"policy, T = {flow_steps}"] = jax.block_until_ready(actions)
        print(f"T = {flow_steps}: {args.steps} updates in {time.perf_counter() - started:.0f} s")
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 3), sharey=True)
    for axis, (name, actions) in zip(axes, panels.items(), strict=True):
        far = distance(actions, target)
        print(f"distance to the target, {name}: {far:.4f}")
        axis.plot(*actions.T, ".", markersize=1)
        axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xlabel="$a_1$", ylabel="$a_2$")
        axis.set(aspect="equal", title=f"{name}\ndistance {far:.4f}")
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    with qam.or_fail(f"--output {args.output} can't be written"):
        plt.figure().savefig(args.output)  # empty: a bad name is told before the training
    run(args).savefig(args.output, dpi=110, bbox_inches="tight")
    print(f"wrote {args.output}")
