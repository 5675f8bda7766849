"""What each method makes of a problem whose answer is known: python tools/closed_form.py [--checkpoint RUN_DIR]

A bandit with two actions. Behaviour: four equal Gaussians at (+-0.5, +-0.5), standard deviation 0.15. Value: Q(a) =
2 a_1 + 0.7 a_2 - |a|^2 / 2. What QAM promises at inverse temperature 1, behaviour(a) exp(Q(a)) / Z, is a mixture of
Gaussians again. Every method's own policy_loss, imported from its script, is trained on it with the analytic Q handed
in, once for each coefficient of a small grid; the figure shows behaviour, target, and what each method makes of it at
its best coefficient. Distance: squared MMD (V-statistic), RBF kernels of width 0.1, 0.3, 1.0 summed, 3,000 samples.

Exact is "what the base chain samples, times exp(Q)": with few steps that chain is not the data. So for the two methods
that match adjoints, at 10 and 30 steps, also: the distance of the base chain (slow, with the noise of the rollout) from
the data, and that of the trained policy from the base chain's own target, its samples drawn again with weights exp(Q).
The diffusion once more with 1 - alpha_k in place of sigma_k^2, the other end of the variances that a step may have.

Then the health of the gradient: the norm of the policy loss's gradient, before clipping, for T = 5, 10, 20, 40 steps of
the flow, for the method that regresses onto the adjoint (QAM) and the two that backpropagate through the steps (FBRAC,
BAM); on the bandit during training, and with --checkpoint on the networks of a finished run of qam_offline.py.
Files: bandit.png, bandit.csv, chains.csv, gradients.png, gradients.csv in --output-dir.
"""

import argparse
import csv
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

MEANS = np.array([[x, y] for x in (-0.5, 0.5) for y in (-0.5, 0.5)])
PRECISION = 1 / 0.15**2 + 1  # of a Gaussian of the target
TARGET_MEANS = (MEANS / 0.15**2 + [2.0, 0.7]) / PRECISION
TARGET_LOG_WEIGHTS = PRECISION * (TARGET_MEANS**2).sum(1) / 2 - (MEANS**2).sum(1) / (2 * 0.15**2)
GRIDS = {  # script: its coefficient, the values tried
    "qam_offline": ("inv_temp", (1.0,)),  # the coefficient that the target is stated for
    "qam_diffusion_variant": ("inv_temp", (1.0,)),
    "fql": ("alpha", (3.0, 10.0, 30.0)),
    "dsrl": ("noise_scale", (1.0, 1.5, 2.5)),
    "fbrac": ("alpha", (3.0, 10.0, 30.0)),
    "bam": ("inv_temp", (3.0, 10.0, 30.0)),
}
NAMES = {"qam_offline": "QAM", "qam_diffusion_variant": "QAM, diffusion", "fql": "FQL", "dsrl": "DSRL"}
NAMES |= {"fbrac": "FBRAC", "bam": "BAM"}


def value(actions):
    """Q: (..., 2) -> (...)."""
    return 2 * actions[..., 0] + 0.7 * actions[..., 1] - (actions**2).sum(-1) / 2


def draw(rng, means, std: float, log_weights, n: int) -> np.ndarray:
    """n samples (n, 2) of the mixture of Gaussians at `means` (4, 2)."""
    weights = np.exp(log_weights - log_weights.max())
    return means[rng.choice(len(means), n, p=weights / weights.sum())] + std * rng.normal(size=(n, 2))


def mmd(a, b) -> float:
    """Squared MMD (V-statistic) of samples a (n, 2), b (m, 2): sum of RBF kernels of width 0.1, 0.3, 1.0."""
    squares = lambda x, y: (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    kernel = lambda x, y: sum(np.exp(-squares(x, y) / (2 * width**2)).mean() for width in (0.1, 0.3, 1.0))
    return float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def behaviour_velocity(x, t):
    """E[a - x_0 | x_t = x] for the four Gaussians and x_t = (1 - t) x_0 + t a: x (..., 2), t (..., 1)."""
    variance = (1 - t) ** 2 + (0.15 * t) ** 2
    offsets = x[..., None, :] - t[..., None] * MEANS  # (..., 4, 2)
    weights = jax.nn.softmax(-(offsets**2).sum(-1) / (2 * variance), axis=-1)  # (..., 4)
    slope = (t * 0.15**2 - (1 - t)) / variance
    return (weights[..., None] * (MEANS + slope[..., None] * offsets)).sum(-2)


def load(name: str):
    import importlib

    return importlib.import_module(name if name.startswith("qam") else f"baselines.{name}")


def make_args(script, flow_steps: int, **changes):
    args = script.Args(env_id="pointmaze-medium-navigate", hidden_dims=(128, 128, 128), num_critics=1, horizon=1)
    changes |= {"flow_steps" if hasattr(args, "flow_steps") else "diffusion_steps": flow_steps}
    return script.resolve_args(dataclasses.replace(args, learning_rate=1e-3, rho=0.0, tau=0.01, **changes))[0]


def sample_base_chain(script, networks, params: dict, noise):
    """The chain that adjoint matching starts from: x_0 .. by slow with the rollout's noise (T, n, 2) -> (n, 2)."""
    base = partial(networks.slow.apply, {"params": params["slow"]}, jnp.zeros((noise.shape[1], 1)))
    chain = script.sample_memoryless_sde if hasattr(script, "sample_memoryless_sde") else script.sample_ancestral
    return chain(base, base, noise[0], noise[1:])[-1]


def train(name: str, values, flow_steps: int, num_steps: int, seed: int, chain: int = 0):
    """Train `name`'s policy_loss on the bandit, once a value of its coefficient, side by side.

    Returns samples (len(values), 3000, 2) and the norm of the gradient before clipping (len(values), num_steps); with
    `chain` also that many samples of the base chain (len(values), chain, 2).
    """
    script, coefficient = load(name), GRIDS[name][0]
    args = make_args(script, flow_steps)
    networks = script.make_networks(args, 1, 2)
    q = lambda s, a: value(a)[None]  # (K=1, B)
    means, batch_size = jnp.asarray(MEANS, jnp.float32), args.batch_size

    def one_run(coefficient_value):
        own = dataclasses.replace(args, **{coefficient: coefficient_value})
        state = script.init_state(own, networks, 1, 2, jax.random.key(seed))

        def one_update(state, step):
            key_mode, key_action, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
            modes = means[jax.random.randint(key_mode, (batch_size,), 0, 4)]
            actions = modes + 0.15 * jax.random.normal(key_action, (batch_size, 2))
            ones, zeros = jnp.ones(batch_size), jnp.zeros((batch_size, 1))
            batch = script.Batch(zeros, actions, ones, ones, ones, zeros)
            loss = lambda params: script.policy_loss(own, networks, params, state.target_params, batch, q, q, key_loss)
            grads, _ = jax.grad(loss, has_aux=True)(state.params)
            updates, opt_state = script.make_optimizer(own).update(grads, state.opt_state, state.params)
            online = {network: state.params[network] for network in state.target_params}
            targets = optax.incremental_update(online, state.target_params, own.tau)
            params = optax.apply_updates(state.params, updates)
            return script.TrainState(params, targets, opt_state, state.step + 1), optax.tree.norm(grads)

        state, norms = jax.lax.scan(one_update, state, jnp.arange(num_steps))
        steps = (flow_steps,) if hasattr(args, "diffusion_steps") else ()  # a diffusion acts with noise in each step
        noise = jax.random.normal(jax.random.key(seed + 1), (*steps, 3000, 2))
        params = state.params | {"target": state.target_params}
        found = script.policy(own, networks, params, jnp.zeros((3000, 1)), noise), norms
        noise = jax.random.normal(jax.random.key(seed + 2), (flow_steps, chain, 2))
        return (*found, sample_base_chain(script, networks, state.target_params, noise)) if chain else found

    return jax.device_get(jax.jit(jax.vmap(one_run))(jnp.asarray(values)))


def chain_distances(rng, sample, chain, data, target) -> tuple[float, float, float, float]:
    """MMD: policy to target, policy to the chain's target, chain to data, the chain's target to the target."""
    weights = np.exp(value(chain.astype(float)))
    own = chain[rng.choice(len(chain), len(target), p=weights / weights.sum())]
    pairs = (sample, target), (sample, own), (chain[: len(data)], data), (own, target)
    return tuple(mmd(a, b) for a, b in pairs)


def widened(schedule):
    """A diffusion's schedule with variance 1 - alpha_k instead of sigma_k^2 in all steps that have noise."""

    def with_1_minus_alpha(k, num_steps):
        signal, spread, keep, add, sigma = schedule(k, num_steps)
        return jnp.stack([signal, spread, keep, add, jnp.where(k > 1, add, sigma)])

    return with_1_minus_alpha


def run_chain(rng, label: str, name: str, steps: int, options, pair) -> tuple:
    """A row of chains.csv: `name` trained at inv_temp 1 with that many steps."""
    samples, _, chain = train(name, (1.0,), steps, options.steps, options.seed, 30_000)
    return label, steps, *chain_distances(rng, samples[0], chain[0], *pair)


def gradient_norm(script, args, networks, params, target_params, dataset, q, target_q, key):
    """Norm of the gradient of the policy loss on a batch of the dataset."""
    key_indices, key_loss = jax.random.split(key)
    indices = jax.random.randint(key_indices, (args.batch_size,), 0, len(dataset.rewards) - args.horizon + 1)
    batch = script.gather_chunks(dataset, indices, args.horizon, args.discount)
    loss = lambda params: script.policy_loss(args, networks, params, target_params, batch, q, target_q, key_loss)
    return optax.tree.norm(jax.grad(loss, has_aux=True)(params)[0])


def checkpoint_norms(run_dir: str, flow_steps: int, batches: int) -> dict[str, np.ndarray]:
    """{script: norms (batches,) of the gradient of its policy loss} at the networks of a run of qam_offline.py.

    FBRAC's flow is the run's fast. Its alpha is 1 / inv_temp, BAM's inv_temp T times the run's: the same optimum in
    principle. The losses are on scales of their own (sums over T steps, or not), so compare how a method's norm
    spreads and how it grows with T, not one method's level with another's. The critic is the run's.
    """
    qam = load("qam_offline")
    args, saved = qam.resolve_args(qam.Args(eval_only=run_dir))
    path = Path(saved["data"]["path"][0])
    env = qam.ChunkedEpisode(qam.split_env_id(args.env_id)[1], args.horizon)
    dataset = jax.device_put(qam.load_dataset(args, path, env))
    states = qam.load_checkpoint(run_dir)["states"]
    params, targets = (jax.tree.map(lambda x: jnp.asarray(x[0]), states[part]) for part in ("params", "target_params"))
    norms = {}
    for name in ("qam_offline", "fbrac", "bam"):
        script = load(name)
        own = {"fbrac": {"alpha": 1 / args.inv_temp}, "bam": {"inv_temp": flow_steps * args.inv_temp}}.get(name, {})
        shared = {k: v for k, v in vars(args).items() if k in vars(script.Args()) and k not in own}
        own = script.Args(**shared | own | {"flow_steps": flow_steps})
        networks = script.make_networks(own, *env.dims)
        q, target_q = (partial(networks.critic.apply, {"params": p["critic"]}) for p in (params, targets))
        policy_params = {"flow": params["fast"]} if name == "fbrac" else {k: params[k] for k in ("slow", "fast")}

        norm = partial(gradient_norm, script, own, networks, policy_params, targets, dataset, q, target_q)
        norms[name] = np.asarray(jax.jit(partial(jax.lax.map, norm))(jax.random.split(jax.random.key(0), batches)))
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="updates a method")
    parser.add_argument("--flow-steps", type=int, default=10)
    parser.add_argument("--gradient-steps", type=int, default=200, help="updates a T, for the gradient's norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="folder of a finished run of qam_offline.py")
    parser.add_argument("--output-dir", type=Path, default=Path("results/closed-form"))
    options = parser.parse_args()
    del sys.argv[1:]  # a script that goes on with a run would take these flags for its own
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    options.output_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    target = draw(rng, TARGET_MEANS, PRECISION**-0.5, TARGET_LOG_WEIGHTS, 3000)
    again = draw(rng, TARGET_MEANS, PRECISION**-0.5, TARGET_LOG_WEIGHTS, 3000)
    behaviour = draw(rng, MEANS, 0.15, np.zeros(4), 3000)
    rows = [("behaviour", "", "", mmd(behaviour, target)), ("target, drawn again", "", "", mmd(again, target))]
    panels, best_of, chains = [("behaviour", behaviour, rows[0][3]), ("target", target, rows[1][3])], {}, []
    pair, told = (behaviour, target), 0
    for name, (coefficient, values) in GRIDS.items():
        started = time.time()
        matching = name.startswith("qam")
        size = 30_000 if matching else 0
        samples, _, *chain = train(name, values, options.flow_steps, options.steps, options.seed, size)
        distances = [mmd(sample, target) if np.isfinite(sample).all() else float("inf") for sample in samples]
        rows += [(NAMES[name], coefficient, v, d) for v, d in zip(values, distances, strict=True)]
        best = int(np.argmin(distances))
        best_of[name] = values[best]
        panels.append((f"{NAMES[name]}, {coefficient} {values[best]:g}", samples[best], distances[best]))
        print(f"{panels[-1][0]:24} MMD {distances[best]:.4f}  ({time.time() - started:.0f} s)", flush=True)
        if matching:
            chains.append((NAMES[name], options.flow_steps, *chain_distances(rng, samples[0], chain[0][0], *pair)))
            chains.append(run_chain(rng, NAMES[name], name, 30, options, pair))
        if name == "qam_diffusion_variant":
            script, label = load(name), f"{NAMES[name]}, 1 - alpha"
            with_sigma, script.schedule = script.schedule, widened(script.schedule)
            chains += [run_chain(rng, label, name, steps, options, pair) for steps in (options.flow_steps, 30)]
            script.schedule = with_sigma
        for row in chains[told:]:
            told += 1
            print("{:25} {:2} steps: {:.4f} to target, {:.4f} to the chain's, {:.4f} chain to data".format(*row[:5]))
    with open(options.output_dir / "bandit.csv", "w", newline="") as file:
        csv.writer(file).writerows([("method", "coefficient", "value", "mmd"), *rows])
    with open(options.output_dir / "chains.csv", "w", newline="") as file:
        header = "method steps policy_to_target policy_to_chain_target chain_to_data chain_target_to_target".split()
        csv.writer(file).writerows([header, *chains])
    figure, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 2.7), sharex=True, sharey=True)
    for axis, (title, sample, distance) in zip(axes, panels, strict=True):
        axis.scatter(*sample.T, s=1, alpha=0.4, linewidths=0)
        axis.set(title=f"{title}\nMMD {distance:.4f}", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        axis.title.set_fontsize(8)
    figure.tight_layout()
    figure.savefig(options.output_dir / "bandit.png", dpi=150)

    rows, steps = [], (5, 10, 20, 40)
    for flow_steps in steps:
        for name in ("qam_offline", "fbrac", "bam"):
            coefficient_value = best_of[name] * (flow_steps / options.flow_steps if name == "bam" else 1)
            _, norms = train(name, [coefficient_value], flow_steps, options.gradient_steps, options.seed)
            rows.append(
                ("bandit", NAMES[name], flow_steps, *np.quantile(norms[0, len(norms[0]) // 2 :], (0.05, 0.5, 0.95)))
            )
        if options.checkpoint:
            for name, norms in checkpoint_norms(options.checkpoint, flow_steps, 100).items():
                rows.append(("checkpoint", NAMES[name], flow_steps, *np.quantile(norms, (0.05, 0.5, 0.95))))
        for row in rows[-6 if options.checkpoint else -3 :]:
            print("{:10} {:5} T {:2}  gradient norm {:.3g} {:.3g} {:.3g} (5, 50, 95 %)".format(*row), flush=True)
    with open(options.output_dir / "gradients.csv", "w", newline="") as file:
        csv.writer(file).writerows([("where", "method", "flow_steps", "p05", "p50", "p95"), *rows])
    places = ["bandit", "checkpoint"][: 1 + bool(options.checkpoint)]
    figure, axes = plt.subplots(1, len(places), figsize=(4.2 * len(places), 3.2), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        for name in ("qam_offline", "fbrac", "bam"):
            low, middle, high = np.array([row[3:] for row in rows if row[:2] == (place, NAMES[name])]).T
            axis.plot(steps, middle, marker="o", label=NAMES[name])
            axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(title=place, xlabel="T, steps of the flow", ylabel="norm of the policy loss's gradient", xscale="log")
        axis.set(yscale="log", xticks=steps, xticklabels=steps)
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(options.output_dir / "gradients.png", dpi=150)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
