"""Other noisy rollouts for qam_offline.py, which takes the paper's Euler steps: an experiment beside the script.

    python tools/sde_variants.py bandit --flow-steps 5 10 20 40 --seeds 0 1         results/sde/bandit.csv
    python tools/sde_variants.py run calibrated --env-id pointmaze-medium-navigate-task1 --flow-steps 10 ...

"run" is `python qam_offline.py` with the flags that follow, but for equations (4) to (6); its run folder lies in one
named after the rollout. docs/derivation.md, section 8, derives the steps. With u = t_i + h each of them is
    x_{i+1} = x_i + h (p v(s, x_i, t_i) - k x_i / u) + sqrt(h) sigma noise_i,   L_AM with p in place of 2
euler       p = 2, k = 1, sigma^2 = 2 (1 - t_i + h) / u; adjoint of x_i, linearised at u: qam_offline.py's own
exact       the same step; the adjoint of x_{i+1}, through the very steps taken
posterior   k = (1 - u) / (1 - t_i), p = 1 + k t_i / u, sigma^2 = k p (1 - u) / u: x_{i+1} given x_i and x_1 = x_i +
            (1 - t_i) v; adjoints as in "exact"
calibrated  posterior with h p^2 L_BC(t_i) more variance, for x_1 is not certain given x_i; L_BC on the batch at hand
"""

import argparse
import csv
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import qam_offline as qam  # noqa: E402
from tools import closed_form  # noqa: E402

NAMES = ("euler", "exact", "posterior", "calibrated")


def rollout_step(sde: str, t, h, flow_loss):
    """(p, k, sigma) of the step from t (..); flow_loss: what "calibrated" and "posterior" add, in steps of t."""
    if sde in ("euler", "exact"):
        return 2.0, 1.0, qam.memoryless_sigma(t, h)
    k = (1 - t - h) / (1 - t)
    p = 1 + k * t / (t + h)
    added = h * p**2 * flow_loss[jnp.round(t / h).astype(int)]
    return p, k, jnp.sqrt(k * p * jnp.maximum(1 - t - h, 0) / (t + h) + added)


def sample_rollout(sde, velocity, base_velocity, x0, noise, flow_loss):
    """x0 (B, D), noise (T-1, B, D) -> x_0 .. x_T (T+1, B, D); the last step is the base's, without noise."""
    h, xs = 1 / (len(noise) + 1), [x0]
    for i in range(len(noise)):
        p, k, sigma = rollout_step(sde, jnp.float32(i * h), h, flow_loss)
        x, t = xs[-1], jnp.full((*x0.shape[:-1], 1), i * h)
        xs.append(x + h * (p * velocity(x, t) - k * x / (i * h + h)) + jnp.sqrt(h) * sigma * noise[i])
    last = base_velocity(xs[-1], jnp.full((*x0.shape[:-1], 1), 1 - h))
    return jnp.stack([*xs, xs[-1] + h * last])


def rollout_adjoints(sde, base_velocity, xs, terminal_adjoint, flow_loss):
    """States x_0 .. x_{T-1} (T, B, D), g at x_T (B, D) -> adjoints of x_1 .. x_T (T, B, D), exact for the base."""
    h, adjoints = 1 / len(xs), [terminal_adjoint]
    for i in range(len(xs) - 1, 0, -1):
        p, k, _ = rollout_step(sde, jnp.float32(i * h), h, flow_loss)
        if i == len(xs) - 1:
            p, k = 1.0, 0.0  # the last step: x + h v
        t = jnp.full((*xs.shape[1:-1], 1), i * h)
        mean = lambda x, p=p, k=k, t=t, i=i: x + h * (p * base_velocity(x, t) - k * x / (i * h + h))
        adjoints.append(jax.vjp(mean, xs[i])[1](adjoints[-1])[0])
    return jnp.stack(adjoints[::-1])


def rollout_matching_loss(sde, velocity, base_velocity, xs, adjoints, flow_loss):
    """Equation (6) with the step's own p and sigma."""
    xs, adjoints = jax.lax.stop_gradient((xs, adjoints))
    t = jnp.broadcast_to(jnp.arange(len(xs))[:, None, None] / len(xs), (*xs.shape[:-1], 1))  # (T, B, 1)
    p, _, sigma = rollout_step(sde, t, 1 / len(xs), flow_loss)
    difference = velocity(xs, t) - jax.lax.stop_gradient(base_velocity(xs, t))
    return jnp.mean(jnp.sum((p / sigma * difference + sigma * adjoints) ** 2, axis=(0, 2)))


def policy_loss(sde, args, networks, params, target_params, batch, q, target_q, key):
    """qam_offline.policy_loss with another rollout; the same draws."""
    key_x0, key_t, key_sde, key_noise = jax.random.split(key, 4)
    observations, shape = batch.observations, batch.actions.shape  # (B, D)
    slow = partial(networks.slow.apply, {"params": params["slow"]}, observations)
    fast = partial(networks.fast.apply, {"params": params["fast"]}, observations)
    base = partial(networks.slow.apply, {"params": target_params["slow"]}, observations)
    x0, t = jax.random.normal(key_x0, shape), jax.random.uniform(key_t, (shape[0], 1))
    behaviour_loss = qam.flow_matching_loss(slow, batch.actions, batch.valid, x0, t)
    flow_loss = jnp.zeros(args.flow_steps).at[-1].set(1.0)  # posterior: at the last step, where (6) divides by sigma
    if sde == "calibrated":
        loss_at = partial(qam.flow_matching_loss, base, batch.actions, batch.valid, x0)
        times = jnp.arange(args.flow_steps)[:, None, None] / args.flow_steps
        valid = jnp.maximum(batch.valid.mean(), 1e-6)  # the loss divides by B, the variance is of the valid rows
        flow_loss = jax.lax.stop_gradient(jax.vmap(loss_at)(times) / valid)  # (T,)
    x0, noise = jax.random.normal(key_sde, shape), jax.random.normal(key_noise, (args.flow_steps - 1, *shape))
    xs = jax.lax.stop_gradient(sample_rollout(sde, fast, base, x0, noise, flow_loss))  # (T+1, B, D)
    value = lambda a: target_q(observations, jnp.clip(a, -1, 1)).mean(axis=0).sum()
    g = -args.inv_temp * jax.grad(value)(xs[-1])  # (B, D)
    adjoints = rollout_adjoints(sde, base, xs[:-1], g, flow_loss)  # (T, B, D)
    matching_loss = rollout_matching_loss(sde, fast, base, xs[:-1], adjoints, flow_loss)
    metrics = {"flow_loss": behaviour_loss, "adjoint_loss": matching_loss, "adjoint_mean": jnp.abs(g).mean()}
    return behaviour_loss + matching_loss, metrics


def use(sde: str) -> None:
    """From here on qam_offline trains with that rollout."""
    if sde != "euler":
        qam.policy_loss = partial(policy_loss, sde)


def bandit(options) -> None:
    """MMD to the target of tools/closed_form.py at inv_temp 1, of what acts (the noiseless steps of fast)."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows, own = [], qam.policy_loss
    for flow_steps in options.flow_steps:
        for seed in options.seeds:
            rng = np.random.default_rng(seed)
            c = closed_form
            target = c.draw(rng, c.TARGET_MEANS, c.PRECISION**-0.5, c.TARGET_LOG_WEIGHTS, 3000)
            for sde in options.sdes:
                started, qam.policy_loss = time.time(), own
                use(sde)
                samples, _ = closed_form.train("qam_offline", (1.0,), flow_steps, options.steps, seed)
                rows.append((sde, flow_steps, seed, options.steps, closed_form.mmd(samples[0], target)))
                print(*rows[-1], f"({time.time() - started:.0f} s)", flush=True)
                with open(options.output, "w", newline="") as file:
                    csv.writer(file).writerows([("sde", "flow_steps", "seed", "steps", "mmd"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    trial = commands.add_parser("bandit")
    trial.add_argument("--flow-steps", type=int, nargs="+", default=[5, 10, 20, 40])
    trial.add_argument("--seeds", type=int, nargs="+", default=[0])
    trial.add_argument("--sdes", nargs="+", choices=NAMES, default=NAMES)
    trial.add_argument("--steps", type=int, default=3000)
    trial.add_argument("--output", type=Path, default=Path("results/sde/bandit.csv"))
    run = commands.add_parser("run")
    run.add_argument("sde", choices=NAMES)
    options, flags = parser.parse_known_args()
    del sys.argv[1:]
    if options.command == "bandit":
        if flags:
            parser.error(f"there is no {' '.join(flags)}")
        return bandit(options)
    use(options.sde)
    args = tyro.cli(qam.Args, args=flags)
    args.run_dir = f"{args.run_dir}/{options.sde}"
    qam.main(args)


if __name__ == "__main__":
    main()
