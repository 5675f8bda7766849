"""The lesson's pictures and numbers: python dev/lesson_figures.py

On the bandit of experiments/closed_form.py, whose behavior flow is known in closed form. Writes
docs/lesson/flow.png, sde.png, adjoint.png, policy.png, and into docs/lesson/numbers.md the table of
the numbers that the chapters quote, with seeds and draws. Everything is computed by the functions
of qam_offline.py. A quarter of an hour on two cores.
"""

import re
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

NUM_SAMPLES = 3000  # for a distance, and in pictures
NUM_PATHS = 20_000  # for a quantile
TABLE = re.compile(r"(<!-- numbers of dev/lesson_figures.py -->\n).*?(<!-- end -->)", re.S)
base = closed_form.behavior_velocity
rows = []  # of the table


def tell(chapter, what, numbers, seed="", draws=""):
    """A row of the table: numbers as the chapter has them, and of how many draws they are.

    Markdown's tables know no vertical bars.
    """
    rows.append(f"| {chapter} | {what} | {numbers} | {seed} | {draws} |")
    print(f"{chapter}: {what}: {numbers}", flush=True)


def listed(values, digits=2):
    return ", ".join(f"{value:.{digits}f}" for value in values)


def draw_noise(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def ode_states(velocity, x0, num_steps):
    """x_0 .. x_T by (3), all of them."""
    xs = [x0]
    for i in range(num_steps):
        t = jnp.full_like(x0[:, :1], i / num_steps)
        xs.append(xs[i] + velocity(xs[i], t) / num_steps)
    return jnp.stack(xs)


def sde_states(velocity, num_steps, seed=0, num_paths=NUM_SAMPLES):
    """x_0 .. x_T by (4), with the bandit's behavior flow as the base."""
    noise = draw_noise(seed, num_steps, num_paths, 2)
    return qam.sample_memoryless_sde(velocity, base, noise[0], noise[1:])


def correlation(xs):
    """Between where a sample starts and where it ends, mean over the coordinates."""
    start, end = np.asarray(xs[0]), np.asarray(xs[-1])
    return np.mean([np.corrcoef(start[:, i], end[:, i])[0, 1] for i in range(2)])


def terminal_adjoint(actions):
    """g of (5) at inv_temp 1."""
    return -jax.grad(lambda actions: closed_form.value(actions).sum())(actions)


def adjoints_of(xs, start, own_time=False, of_next=False):
    """What (6) is given, g_0 .. g_{T-1}: by (5) from `start` at x_T, or with a step made exact.

    own_time: v is taken at t_i, where step i begins. of_next: term i has g_{i+1}.
    """
    h = 1 / (len(xs) - 1)

    def earlier(x, t):
        return base(x, t - h)

    adjoints = qam.lean_adjoint(earlier if own_time else base, xs[:-1], start)
    if of_next:
        adjoints = jnp.concatenate([adjoints[1:], start[None]])
    return adjoints


def train_policy(num_steps, seed=0, num_updates=3000, **exact):
    """The policy's velocity: behavior's, and a network that is added to it, trained by (6)."""
    network = qam.MLP((64, 64, 64), 2)
    params = network.init(jax.random.key(seed), jnp.zeros((1, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_updates))

    def velocity_of(params):
        def velocity(x, t):
            return base(x, t) + network.apply(params, jnp.concatenate([x, t], axis=-1))

        return velocity

    def loss(params, key):
        noise = jax.random.normal(key, (num_steps, 256, 2))
        xs = qam.sample_memoryless_sde(velocity_of(params), base, noise[0], noise[1:])
        xs = jax.lax.stop_gradient(xs)
        adjoints = adjoints_of(xs, terminal_adjoint(xs[-1]), **exact)
        return qam.adjoint_matching_loss(velocity_of(params), base, xs[:-1], adjoints)

    def update(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(jax.random.key(seed + 1), num_updates)
    carry = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, keys))(carry)
    return velocity_of(params)


def least_slope(policy):
    """Of a_1 after the step from t = 0.6 over a_1 before, at T = 5 and a_2 = 0.5: a fold if < 0."""
    before = np.linspace(-1.5, 2, 141)
    points = jnp.stack([before, jnp.full(141, 0.5)], axis=1)
    after = points + policy(points, jnp.full((141, 1), 0.6)) / 5
    return np.diff(after[:, 0]).min() / np.diff(before)[0]


# ---------------------------------------------------------------------------------------- pictures


def panels(count):
    figure = Figure(figsize=(2.6 * count, 2.7), layout="constrained")
    axes = figure.subplots(1, count)
    for one in axes:
        one.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
    return figure, axes


def draw_states(name, xs, times):
    """Clouds of samples on the way from noise to actions, colored by where each path began."""
    figure, axes = panels(len(times))
    start = np.asarray(xs[0, :1000])
    quadrants = 2 * (start[:, 0] > 0) + (start[:, 1] > 0)
    colors = np.array(["#b35806", "#2b83ba", "#542788", "#4d9221"])[quadrants]
    for one, t in zip(axes, times, strict=True):
        x = np.asarray(xs[round(t * (len(xs) - 1)), :1000])
        one.scatter(*x.T, s=3, color=colors)
        one.set_title(f"t = {t:g}", fontsize=10)
    figure.savefig(FOLDER / name, dpi=90)


def draw_adjoint(xs, adjoints, start):
    """One path of the SDE, and at each state the way that -g_i points; the sizes of all g_i."""
    num_steps = len(adjoints)
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = num_steps // 2  # before, the noise is so large that one sees nothing else
    x = np.asarray(xs[first:, 3])
    ways = -np.asarray(adjoints[first:, 3])
    left.plot(*x.T, "-o", color="0.5", markersize=4, linewidth=1, label="second half of a path")
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 6, "label": "$-g_i / 6$"}
    left.quiver(*x[:-1].T, *ways.T, color="#b35806", **arrows)
    left.plot(*(x[:-1] + ways / 6).T, ".", alpha=0)  # so that the arrows' tips are inside
    left.plot(*x[-1], "*", color="#2b83ba", markersize=14, label="its end, the action $x_T$")
    left.set(aspect="equal", xlabel="$a_1$", ylabel="$a_2$", title=f"one path, T = {num_steps}")
    left.margins(0.1)
    left.legend(fontsize=8, loc="lower right")
    sizes = np.linalg.norm(np.asarray(adjoints), axis=-1)  # (T, B)
    t = np.arange(num_steps) / num_steps
    band = np.quantile(sizes, [0.1, 0.9], axis=1)
    right.fill_between(t, *band, color="#b35806", alpha=0.25, label="$|g_i|$, 80 % of the paths")
    median = np.median(sizes, axis=1)
    right.plot(t, median, color="#b35806", label="$|g_i|$, median")
    size = np.median(np.linalg.norm(start, axis=-1))
    right.axhline(size, color="#2b83ba", linestyle="--", label="$|\\nabla Q|$ at $x_T$, median")
    peak = band[1].argmax()
    what = "widest band of 80 %: t, its upper end, median of g_i; median of grad Q"
    numbers = listed([t[peak], band[1, peak], median[peak], size], 1)
    tell(5, f"{what}, T = {num_steps}", numbers, 0, sizes.shape[1])
    right.set(xlabel="t", title=f"sizes over {sizes.shape[1]:,} paths, T = {num_steps}")
    right.legend(fontsize=8, loc="upper left")
    right.grid(alpha=0.3)
    figure.savefig(FOLDER / "adjoint.png", dpi=90)


def draw_policy(samples):
    figure, axes = panels(len(samples))
    for one, (title, x) in zip(axes, samples.items(), strict=True):
        one.plot(x[:1500, 0], x[:1500, 1], ".", color="0.3", markersize=2)
        one.set(xlim=(-1.2, 1.5), ylim=(-1.2, 1.5))
        one.set_title(title, fontsize=10)
    figure.savefig(FOLDER / "policy.png", dpi=90)


# ----------------------------------------------------------------------------------------- numbers


def plain_steps(num_steps, seed=0):
    """x_T (B, 2) by (3) of NUM_PATHS samples, and d x_T / d x_0 (B, 2, 2)."""

    def end(x0):
        return qam.sample_ode(base, x0[None], num_steps)[0]

    x0 = draw_noise(seed, NUM_PATHS, 2)
    return jax.vmap(end)(x0), jax.jit(jax.vmap(jax.jacobian(end)))(x0)


def gradients_through_plain_steps():
    """Chapter 1 and the figure: what backpropagation through (3) makes of a gradient."""
    for num_steps in (10, 100):
        x_last, jacobians = plain_steps(num_steps)
        sizes = np.linalg.norm(jacobians, ord=2, axis=(1, 2))
        what = f"norm of d x_T / d x_0, T = {num_steps}: 1 %, median, 99 %, largest"
        tell(1, what, listed(np.quantile(sizes, [0.01, 0.5, 0.99, 1])), 0, NUM_PATHS)
        if num_steps == 10:
            g = terminal_adjoint(x_last)
            carried = jnp.einsum("bij,bi->bj", jacobians, g)
            ratios = np.linalg.norm(carried, axis=-1) / np.linalg.norm(g, axis=-1)
            what = "gradient at x_0 over that at x_T: median, share above 1, largest"
            numbers = [np.median(ratios), (ratios > 1).mean(), ratios.max()]
            tell("figure", f"{what}, T = 10", listed(numbers), 0, NUM_PATHS)
    others = []
    for seed in range(1, 6):
        _, jacobians = plain_steps(100, seed)
        others.append(np.quantile(np.linalg.norm(jacobians, ord=2, axis=(1, 2)), 0.99))
    what = "the same, 99 %, T = 100, least and most of five draws"
    tell(1, what, listed([min(others), max(others)], 1), "1 to 5", NUM_PATHS)


def distances_between_draws(target):
    """Chapter 1: of the target, from other draws of it."""
    others = []
    for seed in range(1, 9):
        again = closed_form.draw_target(np.random.default_rng(seed), NUM_SAMPLES)
        others.append(closed_form.mmd(again, target))
    what = "distance of the target drawn again, least and most of eight draws"
    tell(1, what, listed([min(others), max(others)], 3), "1 to 8", NUM_SAMPLES)


def distances_to_the_data(data, again):
    """Chapters 2 and 3."""
    tell(
        2,
        "distance of a second draw of the data",
        f"{closed_form.mmd(again, data):.3f}",
        0,
        NUM_SAMPLES,
    )
    all_steps = (1, 2, 5, 10, 30, 100)
    plain = [ode_states(base, draw_noise(1, NUM_SAMPLES, 2), n) for n in all_steps]
    noisy = [sde_states(base, n) for n in all_steps[1:]]

    def distances(runs):
        return [closed_form.mmd(np.asarray(xs[-1]), data) for xs in runs]

    what = "distance to the data, T = 1, 2, 5, 10, 30, 100"
    tell(2, what, listed(distances(plain), 3), 1, NUM_SAMPLES)
    what = "correlation of start and end, plain steps, T = 2, 5, 10, 30, 100"
    tell(3, what, listed([correlation(xs) for xs in plain[1:]]), 1, NUM_SAMPLES)
    what = "the same, noisy steps"
    tell(3, what, listed([correlation(xs) for xs in noisy]), 0, NUM_SAMPLES)
    what = "distance to the data, noisy steps, T = 2, 5, 10, 30, 100"
    tell(3, what, listed(distances(noisy), 3), 0, NUM_SAMPLES)
    for n in (5, 10):
        others = distances([sde_states(base, n, seed) for seed in range(6)])
        what = f"the same, T = {n}, least and most of six draws"
        tell(3, what, listed([min(others), max(others)], 3), "0 to 5", NUM_SAMPLES)


def sizes_of_adjoints():
    """Chapter 5."""
    for num_steps in (10, 100):
        xs = sde_states(base, num_steps, num_paths=NUM_PATHS)
        g = terminal_adjoint(xs[-1])
        at_end = jnp.linalg.norm(g, axis=-1)  # (B,)
        sizes = jnp.linalg.norm(adjoints_of(xs, g), axis=-1)  # (T, B)
        means = [sizes[i].mean() for i in (0, num_steps // 2, num_steps - 1)]
        what = "mean size of g_i at t = 0, in the middle, in the last step, and of grad Q"
        tell(5, f"{what}, T = {num_steps}", listed([*means, at_end.mean()]), 0, NUM_PATHS)
        ratios = np.asarray(sizes[num_steps // 2] / at_end)
        quantiles = np.quantile(ratios, [0.5, 0.9, 0.99, 1])
        what = "size of g_i over that of grad Q in the middle: median, 90 %, 99 %, largest"
        tell(5, f"{what}, T = {num_steps}", listed(quantiles, 1), 0, NUM_PATHS)
    xs = sde_states(base, 10, num_paths=NUM_PATHS)
    g = terminal_adjoint(xs[-1])
    adjoints = adjoints_of(xs, g, own_time=True)
    ratios = np.linalg.norm(adjoints[-1], axis=-1) / np.linalg.norm(g, axis=-1)
    what = "the same in the last step with v at t_i: median, 99 %, T = 10"
    tell(5, what, listed(np.quantile(ratios, [0.5, 0.99])), 0, NUM_PATHS)


def loss_over_charge(num_steps=5):
    """Chapter 6: (6) without a value, over what chapter 4 charges; a constant push in each step."""
    h = 1 / num_steps
    t = jnp.arange(num_steps).reshape(-1, 1, 1) * h
    pushes = draw_noise(0, num_steps, 1, 2)  # in deviations of a step's noise
    pushes = pushes.at[-1].set(0)  # the last step has no noise and no push
    xs = draw_noise(1, num_steps, 1, 2)

    def policy(x, t_of_x):
        # A push moves a step by sqrt(h) sigma, a velocity by 2 h.
        return base(x, t_of_x) + qam.memoryless_sigma(t, h) * pushes / (2 * jnp.sqrt(h))

    loss = qam.adjoint_matching_loss(policy, base, xs, jnp.zeros_like(xs))
    charge = (pushes**2).sum() / 2
    what = f"L_AM at g = 0 over chapter 4's charge, no push in the last step, T = {num_steps}"
    tell(6, what, f"{loss / charge:.1f}", 0, "one path")


def distances_to_the_target(data, target):
    """Chapters 4 and 9: trains policies; (title, samples) for the picture."""
    moves = np.linalg.norm(closed_form.TARGET_MEANS - closed_form.MEANS, axis=1)
    tell(4, "how far a peak moves: least, most", listed([moves.min(), moves.max()]), "", "exact")
    what = "distance of behavior to the target"
    tell(4, what, f"{closed_form.mmd(data, target):.3f}", 0, NUM_SAMPLES)
    samples = {"behavior": data, "target": target}
    noise = draw_noise(2, NUM_SAMPLES, 2)
    at_best = []
    trained = []
    for num_steps in (5, 10, 30):
        xs = ode_states(closed_form.target_velocity, noise, num_steps)
        at_best.append(closed_form.mmd(np.asarray(xs[-1]), target))
        xs = np.asarray(ode_states(train_policy(num_steps), noise, num_steps))
        trained.append(closed_form.mmd(xs[-1], target))
        samples[f"policy, T = {num_steps}"] = xs[-1]
        if num_steps == 5:
            right = np.quantile(xs[:, :, 0], 0.999, axis=1)[3:]
            what = "99.9 % of the policy's samples are left of: x_3, x_4, x_5, T = 5"
            tell(9, what, listed(right), "0, 2", NUM_SAMPLES)
    what = "distance of the target's own velocity to the target, T = 5, 10, 30"
    tell(4, what, listed(at_best, 3), 2, NUM_SAMPLES)
    tell(4, "distance of the policy, the same", listed(trained, 3), "0, 2", NUM_SAMPLES)
    changes = {
        "as the file": {},
        "v at t_i": {"own_time": True},
        "g_{i+1}": {"of_next": True},
        "both": {"own_time": True, "of_next": True},
    }
    for num_steps in (5, 10, 30):
        for title, change in changes.items():
            policies = [train_policy(num_steps, seed, **change) for seed in (0, 1)]
            distances = []
            for policy in policies:
                actions = qam.sample_ode(policy, noise, num_steps)
                distances.append(closed_form.mmd(np.asarray(actions), target))
            what = f"distance of the policy, T = {num_steps}, {title}"
            tell(9, what, listed(distances, 3), "0 and 1, 2", NUM_SAMPLES)
            if num_steps == 5:
                what = f"least slope of the step from t = 0.6 at a_2 = 0.5, T = 5, {title}"
                tell(9, what, listed(map(least_slope, policies)), "0 and 1", "a grid")
    return samples


def main():
    rng = np.random.default_rng(0)
    data = closed_form.draw_behavior(rng, NUM_SAMPLES)
    target = closed_form.draw_target(rng, NUM_SAMPLES)
    again = closed_form.draw_behavior(rng, NUM_SAMPLES)
    draw_states("flow.png", ode_states(base, draw_noise(1, NUM_SAMPLES, 2), 30), (0, 0.3, 0.6, 1))
    draw_states("sde.png", sde_states(base, 30), (0, 0.3, 0.6, 1))
    xs = sde_states(base, 30)
    g = terminal_adjoint(xs[-1])
    draw_adjoint(xs, adjoints_of(xs, g), g)
    gradients_through_plain_steps()
    distances_between_draws(target)
    distances_to_the_data(data, again)
    sizes_of_adjoints()
    loss_over_charge()
    draw_policy(distances_to_the_target(data, target))

    path = FOLDER / "numbers.md"
    head = "| chapter | what | numbers | seed | draws |\n|---|---|---|---|---|"
    rows.sort(key=lambda row: row[2])  # by chapter
    table = "\n".join([head, *rows])
    path.write_text(TABLE.sub(rf"\1\n{table}\n\n\2", path.read_text()))


if __name__ == "__main__":
    main()
