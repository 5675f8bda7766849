"""The lesson's pictures and numbers: python dev/lesson_figures.py

On the bandit of experiments/closed_form.py, whose behavior flow is known in closed form. Writes
docs/lesson/flow.png, sde.png, adjoint.png, policy.png, and prints the numbers that the chapters
quote. Everything is computed by the functions of qam_offline.py.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/lesson"
sys.path.insert(0, str(ROOT))  # for the scripts
import qam_offline as qam  # noqa: E402
from experiments import closed_form  # noqa: E402

NUM_SAMPLES = 3000
base = closed_form.behavior_velocity


def draw_noise(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ode_states(velocity, x0, num_steps):
    """x_0 .. x_T by (3), all of them."""
    xs = [x0]
    for i in range(num_steps):
        t = jnp.full_like(x0[:, :1], i / num_steps)
        xs.append(xs[i] + velocity(xs[i], t) / num_steps)
    return jnp.stack(xs)


def sde_states(velocity, num_steps, seed=0):
    """x_0 .. x_T by (4), with the bandit's behavior flow as the base."""
    noise = draw_noise(seed, num_steps, NUM_SAMPLES, 2)
    return qam.sample_memoryless_sde(velocity, base, noise[0], noise[1:])


def correlation(xs):
    """Between where a sample starts and where it ends, mean over the coordinates."""
    start, end = np.asarray(xs[0]), np.asarray(xs[-1])
    return np.mean([np.corrcoef(start[:, i], end[:, i])[0, 1] for i in range(2)])


def terminal_adjoint(actions):
    """g of (5) at inv_temp 1."""
    return -jax.grad(lambda actions: closed_form.value(actions).sum())(actions)


def train_policy(num_steps, num_updates=3000):
    """The policy's velocity: behavior's, and a network that is added to it, trained by (6)."""
    network = qam.MLP((64, 64, 64), 2)
    params = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_updates))

    def velocity_of(params):
        def velocity(x, t):
            return base(x, t) + network.apply(params, jnp.concatenate([x, t], axis=-1))

        return velocity

    def loss(params, key):
        noise = jax.random.normal(key, (num_steps, 256, 2))
        xs = qam.sample_memoryless_sde(velocity_of(params), base, noise[0], noise[1:])
        xs = jax.lax.stop_gradient(xs)
        adjoints = qam.lean_adjoint(base, xs[:-1], terminal_adjoint(xs[-1]))
        return qam.adjoint_matching_loss(velocity_of(params), base, xs[:-1], adjoints)

    def update(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(1), num_updates)
    carry = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, keys))(carry)
    return velocity_of(params)


# ---------------------------------------------------------------------------------------- pictures


def panels(count):
    figure = Figure(figsize=(2.6 * count, 2.7), layout="constrained")
    axes = figure.subplots(1, count)
    for one in axes:
        one.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
    return figure, axes


def draw_states(name, xs, times):
    """Clouds of samples on the way from noise to actions; three samples keep their color."""
    figure, axes = panels(len(times))
    for one, t in zip(axes, times, strict=True):
        x = np.asarray(xs[round(t * (len(xs) - 1))])
        one.plot(x[:1000, 0], x[:1000, 1], ".", color="0.6", markersize=2)
        for sample, color in enumerate(("#b35806", "#2b83ba", "#542788")):
            one.plot(*x[sample], "o", color=color, markersize=7)
        one.set_title(f"t = {t:g}", fontsize=10)
    figure.savefig(FOLDER / name, dpi=90)


def draw_adjoint(xs, adjoints):
    """One path of the SDE, and at each state the way that -g_i points; the sizes of all g_i."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = len(adjoints) // 2  # before, the noise is so large that one sees nothing else
    x = np.asarray(xs[first:, 3])
    ways = -np.asarray(adjoints[first:, 3])
    left.plot(x[:, 0], x[:, 1], "-o", color="0.5", markersize=4, linewidth=1)
    left.quiver(*x[:-1].T, *ways.T, color="#b35806", angles="xy", scale_units="xy", scale=6)
    left.plot(*(x[:-1] + ways / 6).T, ".", alpha=0)  # so that the arrows' tips are inside
    left.plot(*x[-1], "*", color="#2b83ba", markersize=14)
    left.set(aspect="equal", title="the second half of a path; arrows: -g_i / 6")
    left.margins(0.1)
    sizes = np.linalg.norm(np.asarray(adjoints), axis=-1)  # (T, B)
    t = np.arange(len(adjoints)) / len(adjoints)
    right.fill_between(t, *np.quantile(sizes, [0.1, 0.9], axis=1), color="#b35806", alpha=0.25)
    right.plot(t, np.median(sizes, axis=1), color="#b35806")
    right.set(xlabel="t", title="|g_i|: median, and 80 % of the samples")
    right.grid(alpha=0.3)
    figure.savefig(FOLDER / "adjoint.png", dpi=90)


def draw_policy(samples):
    figure, axes = panels(len(samples))
    for one, (title, x) in zip(axes, samples.items(), strict=True):
        one.plot(x[:1500, 0], x[:1500, 1], ".", color="0.3", markersize=2)
        one.set(xlim=(-1.2, 1.5), ylim=(-1.2, 1.5))
        one.set_title(title, fontsize=10)
    figure.savefig(FOLDER / "policy.png", dpi=90)


def main():
    rng = np.random.default_rng(0)
    data = closed_form.draw_behavior(rng, NUM_SAMPLES)
    target = closed_form.draw_target(rng, NUM_SAMPLES)
    again = closed_form.draw_behavior(rng, NUM_SAMPLES)
    print(f"squared MMD: data drawn again {closed_form.mmd(again, data):.4f}")
    print(f"squared MMD: data to target {closed_form.mmd(data, target):.4f}")
    for num_steps in (1, 2, 5, 10, 30, 100):
        xs = ode_states(base, draw_noise(1, NUM_SAMPLES, 2), num_steps)
        distance = closed_form.mmd(np.asarray(xs[-1]), data)
        words = f"T = {num_steps}: ODE to data {distance:.4f}, correlation {correlation(xs):.2f}"
        if num_steps > 1:
            xs = sde_states(base, num_steps)
            distance = closed_form.mmd(np.asarray(xs[-1]), data)
            words += f"; SDE to data {distance:.4f}, correlation {correlation(xs):.2f}"
        print(words)

    for num_steps in (10, 100):
        xs = sde_states(base, num_steps)
        g = terminal_adjoint(xs[-1])
        at_end = jnp.linalg.norm(g, axis=-1)  # (B,)
        adjoints = qam.lean_adjoint(base, xs[:-1], g)
        sizes = jnp.linalg.norm(adjoints, axis=-1)  # (T, B)
        steps = (0, num_steps // 2, num_steps - 1)
        words = ", ".join(f"{sizes[i].mean():.2f}" for i in steps)
        print(f"T = {num_steps}: mean |g_i| at steps {steps}: {words}; at x_T {at_end.mean():.2f}")
        ratios = np.asarray(sizes[num_steps // 2] / at_end)
        quantiles = np.quantile(ratios, [0.5, 0.9, 0.99, 1])
        words = ", ".join(f"{x:.2f}" for x in quantiles)
        print(f"    |g_i| / |g| in the middle: median, 90 %, 99 %, largest: {words}")

    draw_states("flow.png", ode_states(base, draw_noise(1, NUM_SAMPLES, 2), 30), (0, 0.3, 0.6, 1))
    draw_states("sde.png", sde_states(base, 30), (0, 0.3, 0.6, 1))
    xs = sde_states(base, 30)
    draw_adjoint(xs, qam.lean_adjoint(base, xs[:-1], terminal_adjoint(xs[-1])))

    samples = {"behavior": data, "target": target}
    for num_steps in (5, 10, 30):
        policy = train_policy(num_steps)
        actions = np.asarray(qam.sample_ode(policy, draw_noise(2, NUM_SAMPLES, 2), num_steps))
        print(f"T = {num_steps}: policy to target {closed_form.mmd(actions, target):.4f}")
        samples[f"policy, T = {num_steps}"] = actions
        exact = ode_states(closed_form.target_velocity, draw_noise(2, NUM_SAMPLES, 2), num_steps)
        distance = closed_form.mmd(np.asarray(exact[-1]), target)
        print(f"T = {num_steps}: the target's own velocity to target {distance:.4f}")
    draw_policy(samples)


if __name__ == "__main__":
    main()
