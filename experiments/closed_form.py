"""What each method makes of a problem whose answer is known: python experiments/closed_form.py

A bandit with two actions. Behavior: four equal Gaussians at (+-0.5, +-0.5), standard deviation
0.15. Value: Q(a) = 2 a_1 + 0.7 a_2 - |a|^2 / 2. What QAM promises at inverse temperature 1,
behavior(a) exp(Q(a)) / Z, is a mixture of Gaussians again. Every method's own policy_loss, imported
from its script, is trained on it with the analytic Q handed in, once for each coefficient of a
small grid; the figure shows behavior, target, and what each method makes of it at its best
coefficient. (CGQL asks its critic while it acts: there Q is put in the critic's place, and its
modes mse and linex, which train a critic for that, are left out.) Distance: squared MMD
(V-statistic), RBF kernels of width 0.1, 0.3, 1.0 summed, 3,000 samples.

Exact is "what the base chain samples, times exp(Q)": with few steps that chain is not the data. So
for the two methods that match adjoints, at 10 and 30 steps, also: the distance of the base chain
(behavior, with the noise of the rollout) from the data, and that of the trained policy from the
base chain's own target, its samples drawn again with weights exp(Q). The diffusion once more with
1 - alpha_k in place of sigma_k^2, the other end of the variances that a step may have.

Then the health of the gradient: the norm of the policy loss's gradient, before clipping, for T = 5,
10, 20, 40 steps of the flow, for the method that regresses onto the adjoint (QAM) and the two that
backpropagate through the steps (FBRAC, BAM); on the bandit during training, and with --checkpoint
RUN_DIR on the networks of a finished run of qam_offline.py.

Files: bandit.png, bandit.csv, chains.csv, gradients.png, gradients.csv in --output-dir.
"""

import argparse
import copy
import csv
import dataclasses
import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

STD = 0.15
MEANS = np.array([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
# The target: the square of a Gaussian's exponent completed with that of Q.
PRECISION = 1 / STD**2 + 1
TARGET_STD = PRECISION**-0.5
TARGET_MEANS = (MEANS / STD**2 + [2.0, 0.7]) / PRECISION
TARGET_LOG_WEIGHTS = PRECISION * (TARGET_MEANS**2).sum(axis=1) / 2
TARGET_LOG_WEIGHTS -= (MEANS**2).sum(axis=1) / (2 * STD**2)
KERNEL_WIDTHS = (0.1, 0.3, 1.0)
NUM_SAMPLES = 3000
NUM_CHAIN_SAMPLES = 30_000  # more, for the chain's target is drawn from them

# Script: its coefficient, and the values tried. The target is stated for inv_temp 1.
GRIDS = {
    "qam_offline": ("inv_temp", (1.0,)),
    "qam_diffusion_variant": ("inv_temp", (1.0,)),
    "fql": ("alpha", (3.0, 10.0, 30.0)),
    "dsrl": ("noise_scale", (1.0, 1.5, 2.5)),
    "fbrac": ("alpha", (3.0, 10.0, 30.0)),
    "bam": ("inv_temp", (3.0, 10.0, 30.0)),
    "fawac": ("inv_temp", (1.0,)),
    "cgql": ("guidance_coef", (0.003, 0.01, 0.03)),
    "cgql_mse": ("guidance_coef", (0.03, 0.1, 0.3)),
    "cgql_linex": ("guidance_coef", (0.03, 0.1, 0.3)),
    "qsm": ("inv_temp", (1.0, 3.0, 10.0)),
    "dac": ("alpha", (0.5, 1.0, 3.0)),
}
NAMES = {
    "qam_offline": "QAM",
    "qam_diffusion_variant": "QAM, diffusion",
    "fql": "FQL",
    "dsrl": "DSRL",
    "fbrac": "FBRAC",
    "bam": "BAM",
    "fawac": "FAWAC",
    "cgql": "CGQL",
    "cgql_mse": "CGQL-M",
    "cgql_linex": "CGQL-L",
    "qsm": "QSM",
    "dac": "DAC",
}
# Other flags of CGQL's modes. inv_temp is the paper's but for linex, whose loss, too, has it: with
# 10, most of the range of Q here is beyond that loss's clip.
FLAGS = {
    "cgql": {"inv_temp": 10.0},
    "cgql_mse": {"mode": "mse", "inv_temp": 10.0, "noisy_coef": 1.0},
    "cgql_linex": {"mode": "linex", "inv_temp": 3.0, "noisy_coef": 1.0},
}
MATCHING = ("qam_offline", "qam_diffusion_variant")
GRADIENT_METHODS = ("qam_offline", "fbrac", "bam")
GRADIENT_STEPS = (5, 10, 20, 40)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------- the bandit


def value(actions):
    """Q: (..., 2) -> (...)."""
    return 2 * actions[..., 0] + 0.7 * actions[..., 1] - (actions**2).sum(-1) / 2


def draw(rng, means, std, log_weights, n) -> np.ndarray:
    """n samples (n, 2) of the mixture of Gaussians at `means` (4, 2)."""
    weights = np.exp(log_weights - log_weights.max())
    modes = rng.choice(len(means), n, p=weights / weights.sum())
    return means[modes] + std * rng.normal(size=(n, 2))


def draw_behavior(rng, n: int) -> np.ndarray:
    return draw(rng, MEANS, STD, np.zeros(4), n)


def draw_target(rng, n: int) -> np.ndarray:
    return draw(rng, TARGET_MEANS, TARGET_STD, TARGET_LOG_WEIGHTS, n)


def mean_kernel(a, b) -> float:
    """Mean over all pairs of the sum of RBF kernels of three widths."""
    a_squares = (a**2).sum(axis=1)
    b_squares = (b**2).sum(axis=1)
    squares = a_squares[:, None] + b_squares - 2 * a @ b.T  # (n, m)
    total = 0.0
    for width in KERNEL_WIDTHS:
        total += np.exp(-squares / (2 * width**2)).mean()
    return total


def mmd(a, b) -> float:
    """Squared MMD (V-statistic) of samples a (n, 2), b (m, 2)."""
    within = mean_kernel(a, a) + mean_kernel(b, b)
    return float(within - 2 * mean_kernel(a, b))


def mixture_velocity(x, t, means, std, log_weights):
    """E[a - x_0 | x_t = x] for Gaussians at `means`: x (..., 2), t (..., 1) -> (..., 2).

    Given the mode, x_t = (1 - t) x_0 + t a is Gaussian, and the expectation linear in x.
    """
    variance = (1 - t) ** 2 + (std * t) ** 2
    offsets = x[..., None, :] - t[..., None] * means  # (..., 4, 2)
    log_weights = log_weights - (offsets**2).sum(-1) / (2 * variance)
    weights = jax.nn.softmax(log_weights, axis=-1)  # (..., 4) of the modes, given x
    slope = (t * std**2 - (1 - t)) / variance
    velocities = means + slope[..., None] * offsets  # (..., 4, 2)
    return (weights[..., None] * velocities).sum(-2)


def behavior_velocity(x, t):
    """The behavior's: x (..., 2), t (..., 1) -> (..., 2)."""
    return mixture_velocity(x, t, MEANS, STD, np.zeros(4))


def target_velocity(x, t):
    """The target's: x (..., 2), t (..., 1) -> (..., 2)."""
    return mixture_velocity(x, t, TARGET_MEANS, TARGET_STD, TARGET_LOG_WEIGHTS)


# --------------------------------------------------------------------------------- training on it


def load(name: str):
    """A method's script as a module."""
    if name.startswith("cgql"):
        name = "cgql"  # all modes
    return importlib.import_module(name if name.startswith("qam") else f"baselines.{name}")


def steps_flag(script) -> str:
    """What the script calls the steps from noise to action."""
    fields = [field.name for field in dataclasses.fields(script.Args)]
    return "flow_steps" if "flow_steps" in fields else "diffusion_steps"


def make_args(script, flow_steps: int, **flags):
    own = {steps_flag(script): flow_steps, **flags}
    return script.Args(
        env_id="pointmaze-medium-navigate",
        hidden_dims=(128, 128, 128),
        num_critics=1,
        horizon=1,
        learning_rate=1e-3,
        rho=0.0,
        tau=0.01,
        **own,
    )


def make_batch(script, key_mode, key_action, size: int):
    """A batch of behavior's actions, rewarded with Q. There is one state, and nothing follows."""
    means = jnp.asarray(MEANS, jnp.float32)
    modes = means[jax.random.randint(key_mode, (size,), 0, 4)]
    actions = modes + STD * jax.random.normal(key_action, (size, 2))
    ones = jnp.ones(size)
    state = jnp.zeros((size, 1))
    return script.Batch(state, actions, value(actions), jnp.zeros(size), ones, state)


def learns_critic(args) -> bool:
    """Whether the method needs a critic of noisy actions, which is not known."""
    return getattr(args, "mode", "simple") != "simple"


def policy_update(script, args, networks, state, key):
    """A gradient step on policy_loss: (state, norm of the gradient before clipping).

    A critic for noisy actions learns beside it, by critic_loss; the others are known.
    """
    key_mode, key_action, key_loss = jax.random.split(key, 3)
    batch = make_batch(script, key_mode, key_action, args.batch_size)
    target_params = state.target_params

    def q(observations, actions):
        return value(actions)[None]  # (K=1, B)

    def loss(params):
        total, _ = script.policy_loss(args, networks, params, target_params, batch, q, q, key_loss)
        if not learns_critic(args):
            return total
        key_critic = jax.random.fold_in(key_loss, 1)
        arguments = (args, networks, params, target_params, batch, key_critic)
        critic, _ = script.critic_loss(*arguments)
        return total + critic

    grads = jax.grad(loss)(state.params)
    updates, opt_state = script.make_optimizer(args).update(grads, state.opt_state, state.params)
    before = {network: state.params[network] for network in target_params}
    state = state._replace(
        params=optax.apply_updates(state.params, updates),
        target_params=optax.incremental_update(before, target_params, args.tau),
        opt_state=opt_state,
        step=state.step + 1,
    )
    return state, optax.tree.norm(grads)


def sample_base_chain(script, networks, params: dict, noise):
    """What adjoint matching starts from: behavior with the rollout's noise (T, n, 2) -> (n, 2)."""
    observations = jnp.zeros((noise.shape[1], 1))
    base = partial(networks.behavior.apply, {"params": params["behavior"]}, observations)
    if hasattr(script, "sample_memoryless_sde"):
        sample = script.sample_memoryless_sde
    else:
        sample = script.sample_ancestral
    states = sample(base, base, noise[0], noise[1:])
    return states[-1]


class KnownCritic(nn.Module):
    """Q for a method that asks its critic while it acts; a time behind the action is left out."""

    @nn.compact
    def __call__(self, observations, actions):
        return value(actions[..., :2])[None]  # (K=1, ...)


class Trained(NamedTuple):
    """What training leaves, with a leading axis of coefficients C."""

    samples: np.ndarray  # (C, NUM_SAMPLES, 2) of the policy
    norms: np.ndarray  # (C, num_steps) of the gradient before clipping
    chain: np.ndarray | None  # (C, num_chain, 2) of the base chain


def train(name, values, flow_steps, num_steps, seed, num_chain=0) -> Trained:
    """Train a method's losses on the bandit, once a value of its coefficient, side by side."""
    coefficient, _ = GRIDS[name]
    flags = FLAGS.get(name, {})
    setting = (coefficient, values, flow_steps, num_steps, seed, num_chain)
    return train_script(load(name), *setting, **flags)


def train_script(script, name, values, flow_steps, num_steps, seed, num_chain=0, **flags):
    """The same for any script as a module, the name of the coefficient, and more flags."""
    args = make_args(script, flow_steps, **flags)
    networks = script.make_networks(args, 1, 2)
    key = jax.random.key(seed)

    def one_run(coefficient):
        own = copy.copy(args)
        setattr(own, name, coefficient)
        state = script.init_state(own, networks, 1, 2, key)
        known = networks
        if not learns_critic(args):
            known = networks._replace(critic=KnownCritic())

        def one_update(state, step):
            key_step = jax.random.fold_in(key, step)
            return policy_update(script, own, known, state, key_step)

        state, norms = jax.lax.scan(one_update, state, jnp.arange(num_steps))
        acting = {**state.params, "target": state.target_params}
        observations = jnp.zeros((NUM_SAMPLES, 1))
        key_act = jax.random.key(seed + 1)
        samples = script.sample_actions(own, known, acting, observations, key_act)
        chain = None
        if num_chain:
            key_chain = jax.random.key(seed + 2)
            noise = jax.random.normal(key_chain, (flow_steps, num_chain, 2))
            chain = sample_base_chain(script, networks, state.target_params, noise)
        return Trained(samples, norms, chain)

    all_runs = jax.jit(jax.vmap(one_run))
    return jax.device_get(all_runs(jnp.asarray(values)))


def chain_distances(rng, sample, chain, data, target) -> list[float]:
    """MMD: policy to target, policy to the chain's target, chain to data, the targets' own."""
    weights = np.exp(value(chain.astype(float)))
    chosen = rng.choice(len(chain), len(target), p=weights / weights.sum())
    chain_target = chain[chosen]
    return [
        mmd(sample, target),
        mmd(sample, chain_target),
        mmd(chain[: len(data)], data),
        mmd(chain_target, target),
    ]


def widened(schedule):
    """A diffusion's schedule with 1 - alpha_k instead of sigma_k^2 in all steps that have noise."""

    def with_1_minus_alpha(k, num_steps):
        signal, spread, keep, add, sigma = schedule(k, num_steps)
        sigma = jnp.where(k > 1, add, sigma)
        return jnp.stack([signal, spread, keep, add, sigma])

    return with_1_minus_alpha


# ------------------------------------------------------------------------------ the measurements


def write_csv(path: Path, header: str, rows: list) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split())
        writer.writerows(rows)


def distances_to(target, samples) -> list[float]:
    """Of each sample of (C, n, 2); infinite where training has gone astray."""
    distances = []
    for sample in samples:
        finite = np.isfinite(sample).all()
        distances.append(mmd(sample, target) if finite else float("inf"))
    return distances


def run_bandit(options, rng) -> dict[str, float]:
    """bandit.csv and bandit.png: the best coefficient of each method."""
    target = draw_target(rng, NUM_SAMPLES)
    again = draw_target(rng, NUM_SAMPLES)
    behavior = draw_behavior(rng, NUM_SAMPLES)
    distance = mmd(behavior, target)
    floor = mmd(again, target)
    rows = [("behavior", "", "", distance), ("target, drawn again", "", "", floor)]
    panels = [("behavior", behavior, distance), ("target", target, floor)]
    best_values = {}
    for name, (coefficient, values) in GRIDS.items():
        started = time.perf_counter()
        trained = train(name, values, options.flow_steps, options.steps, options.seed)
        distances = distances_to(target, trained.samples)
        for i in range(len(values)):
            rows.append((NAMES[name], coefficient, values[i], distances[i]))
        best = int(np.argmin(distances))
        best_values[name] = values[best]
        title = f"{NAMES[name]}, {coefficient} {values[best]:g}"
        panels.append((title, trained.samples[best], distances[best]))
        seconds = time.perf_counter() - started
        print(f"{title:24} MMD {distances[best]:.4f}  ({seconds:.0f} s)", flush=True)
    write_csv(options.output_dir / "bandit.csv", "method coefficient value mmd", rows)
    draw_panels(options.output_dir / "bandit.png", panels)
    return best_values


def draw_panels(path: Path, panels: list) -> None:
    """A scatter of each (title, samples, distance), four in a row."""
    num_rows = -(-len(panels) // 4)
    figure = Figure(figsize=(2.3 * 4, 2.7 * num_rows))
    axes = figure.subplots(num_rows, 4, sharex=True, sharey=True).ravel()
    for i, (title, sample, distance) in enumerate(panels):
        axes[i].scatter(*sample.T, s=1, alpha=0.4, linewidths=0)
        axes[i].set_title(f"{title}\nMMD {distance:.4f}", fontsize=8)
        axes[i].set_aspect("equal")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].set_xlim(-1.1, 1.1)
    axes[0].set_ylim(-1.1, 1.1)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def run_chains(options, rng) -> None:
    """chains.csv: the methods that match adjoints, against what their own base chain promises."""
    target = draw_target(rng, NUM_SAMPLES)
    behavior = draw_behavior(rng, NUM_SAMPLES)
    rows = []

    def add_row(label, name, flow_steps):
        seed = options.seed
        trained = train(name, (1.0,), flow_steps, options.steps, seed, NUM_CHAIN_SAMPLES)
        sample = trained.samples[0]
        distances = chain_distances(rng, sample, trained.chain[0], behavior, target)
        rows.append((label, flow_steps, *distances))
        to_target, to_chain, of_chain, _ = distances
        words = f"{to_target:.4f} to target, {to_chain:.4f} to the chain's"
        print(f"{label:25} {flow_steps:2} steps: {words}, {of_chain:.4f} chain to data", flush=True)

    for flow_steps in (options.flow_steps, 30):
        for name in MATCHING:
            add_row(NAMES[name], name, flow_steps)
        diffusion = load("qam_diffusion_variant")
        own_schedule = diffusion.schedule
        diffusion.schedule = widened(own_schedule)
        add_row("QAM, diffusion, 1 - alpha", "qam_diffusion_variant", flow_steps)
        diffusion.schedule = own_schedule
    header = "method steps policy_to_target policy_to_chain_target chain_to_data"
    write_csv(options.output_dir / "chains.csv", f"{header} chain_target_to_target", rows)


def read_run(qam, run_dir: str):
    """Arguments, dataset and environment of a run."""
    record = json.loads((Path(run_dir) / "args.json").read_text())
    values = {field.name: record[field.name] for field in dataclasses.fields(qam.Args)}
    values["hidden_dims"] = tuple(values["hidden_dims"])
    args = qam.Args(**values)
    env = qam.make_env(args)
    dataset = qam.load_dataset(args, Path(record["data"]["path"][0]), env)
    return args, jax.device_put(dataset), env


def first_seed(tree):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), tree)


def gradient_norm(script, args, networks, params, target_params, dataset, q, target_q, key):
    """Norm of the gradient of the policy loss on a batch of the dataset."""
    key_indices, key_loss = jax.random.split(key)
    num_starts = len(dataset.rewards) - args.horizon + 1
    indices = jax.random.randint(key_indices, (args.batch_size,), 0, num_starts)
    batch = script.gather_chunks(dataset, indices, args.horizon, args.discount)

    def loss(params):
        arguments = (args, networks, params, target_params, batch, q, target_q, key_loss)
        return script.policy_loss(*arguments)

    grads, _ = jax.grad(loss, has_aux=True)(params)
    return optax.tree.norm(grads)


def same_setting(script, args, flow_steps: int):
    """A script's arguments for the setting of a run of QAM, with the same optimum in principle."""
    values = {}
    for field in dataclasses.fields(script.Args):
        if hasattr(args, field.name):
            values[field.name] = getattr(args, field.name)
    values["flow_steps"] = flow_steps
    if script.__name__ == "baselines.fbrac":
        values["alpha"] = 1 / args.inv_temp
    if script.__name__ == "baselines.bam":
        values["inv_temp"] = flow_steps * args.inv_temp
    return script.Args(**values)


def checkpoint_norms(run_dir: str, flow_steps: int, batches: int) -> dict[str, np.ndarray]:
    """{script: norms (batches,) of the gradient of its policy loss} at a run of qam_offline.py.

    FBRAC's flow is the run's policy, the critic is the run's. The losses are on scales of their own
    (sums over T steps, or not), so compare how a method's norm spreads and how it grows with T, not
    one method's level with another's.
    """
    qam = load("qam_offline")
    args, dataset, env = read_run(qam, run_dir)
    states = qam.load_checkpoint(run_dir)["states"]
    params = first_seed(states["params"])
    targets = first_seed(states["target_params"])
    keys = jax.random.split(jax.random.key(0), batches)
    dims = (env.observation_space.shape[0], env.action_space.shape[0])
    norms = {}
    for name in GRADIENT_METHODS:
        script = load(name)
        own = same_setting(script, args, flow_steps)
        networks = script.make_networks(own, *dims)
        q = partial(networks.critic.apply, {"params": params["critic"]})
        target_q = partial(networks.critic.apply, {"params": targets["critic"]})
        flows = [network for network in networks._fields if network != "critic"]
        policy_params = {flow: params[flow] for flow in flows}
        fixed = (script, own, networks, policy_params, targets, dataset, q, target_q)
        norm = partial(gradient_norm, *fixed)
        measure = jax.jit(partial(jax.lax.map, norm))
        norms[name] = np.asarray(measure(keys))
    return norms


def run_gradients(options, best_values: dict[str, float]) -> None:
    """gradients.csv and gradients.png."""
    rows = []

    def add_row(place, name, flow_steps, norms):
        low, middle, high = np.quantile(norms, (0.05, 0.5, 0.95))
        rows.append((place, NAMES[name], flow_steps, low, middle, high))
        words = f"gradient norm {low:.3g} {middle:.3g} {high:.3g} (5, 50, 95 %)"
        print(f"{place:10} {NAMES[name]:5} T {flow_steps:2}  {words}", flush=True)

    for flow_steps in GRADIENT_STEPS:
        for name in GRADIENT_METHODS:
            coefficient = best_values[name]
            if name == "bam":
                # Its matching term is a sum over the steps.
                coefficient *= flow_steps / options.flow_steps
            num_steps = options.gradient_steps
            trained = train(name, [coefficient], flow_steps, num_steps, options.seed)
            add_row("bandit", name, flow_steps, trained.norms[0, num_steps // 2 :])
        if options.checkpoint is not None:
            for name, norms in checkpoint_norms(options.checkpoint, flow_steps, 100).items():
                add_row("checkpoint", name, flow_steps, norms)
    write_csv(options.output_dir / "gradients.csv", "where method flow_steps p05 p50 p95", rows)
    draw_gradients(options.output_dir / "gradients.png", rows)


def draw_gradients(path: Path, rows: list) -> None:
    places = sorted({row[0] for row in rows})
    figure = Figure(figsize=(4.2 * len(places), 3.2))
    for i, place in enumerate(places):
        axis = figure.add_subplot(1, len(places), i + 1)
        for name in GRADIENT_METHODS:
            label = NAMES[name]
            own = [row[3:] for row in rows if row[:2] == (place, label)]
            low, middle, high = np.array(own).T
            axis.plot(GRADIENT_STEPS, middle, marker="o", label=label)
            axis.fill_between(GRADIENT_STEPS, low, high, alpha=0.2)
        axis.set_title(place)
        axis.set_xlabel("T, steps of the flow")
        axis.set_ylabel("norm of the policy loss's gradient")
        axis.loglog()
        axis.set_xticks(GRADIENT_STEPS, GRADIENT_STEPS)
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3000, help="updates a method")
    parser.add_argument("--flow-steps", type=int, default=10)
    parser.add_argument("--gradient-steps", type=int, default=200, help="updates a T, for the norm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="folder of a finished run of qam_offline.py")
    parser.add_argument("--output-dir", type=Path, default=Path("results/closed-form"))
    options = parser.parse_args()
    if options.checkpoint is not None and not Path(options.checkpoint, "args.json").exists():
        fail(f"--checkpoint {options.checkpoint} is no run's folder")
    if min(options.steps, options.gradient_steps) < 1 or options.flow_steps < 2:
        fail("--steps and --gradient-steps must be at least 1, --flow-steps at least 2")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    best_values = run_bandit(options, rng)
    run_chains(options, rng)
    run_gradients(options, best_values)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))  # for the scripts
    main()
