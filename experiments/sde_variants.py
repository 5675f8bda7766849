"""Other noisy rollouts for qam_offline.py, which takes the paper's Euler steps.

    python experiments/sde_variants.py bandit --flow-steps 5 10 20 40 --seeds 0 1
    python experiments/sde_variants.py run calibrated --env-id pointmaze-medium-navigate-task1 ...

"bandit" writes results/sde/bandit.csv. "run" is `python qam_offline.py` with the flags that
follow, but for equations (4) to (6); its run folder lies in one named after the rollout.
docs/derivation.md, section 8, derives the steps. With u = t_i + h each of them is
    x_{i+1} = x_i + h (p v(s, x_i, t_i) - k x_i / u) + sqrt(h) sigma noise_i
and L_AM has p in place of 2.
euler       p = 2, k = 1, sigma^2 = 2 (1 - t_i + h) / u; the adjoint of x_i, linearized at u: all as
            in qam_offline.py
exact       the same step; the adjoint of x_{i+1}, through the very steps taken
posterior   k = (1 - u) / (1 - t_i), p = 1 + k t_i / u, sigma^2 = k p (1 - u) / u: x_{i+1} given x_i
            and x_1 = x_i + (1 - t_i) v; adjoints as in "exact"
calibrated  posterior with h p^2 L_BC(t_i) more variance, for x_1 is not certain given x_i; L_BC on
            the batch at hand
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the script
import qam_offline as qam  # noqa: E402
from experiments import closed_form  # noqa: E402

NAMES = ("euler", "exact", "posterior", "calibrated")
SCRIPTS_POLICY_LOSS = qam.policy_loss


def mean_step(velocity, x, t, h, coefficients):
    """A step from x (B, D) at t without its noise."""
    p, k = coefficients
    times = jnp.full_like(x[..., :1], t)  # (B, 1)
    return x + h * (p * velocity(x, times) - k * x / (t + h))


class Rollout(NamedTuple):
    """A rollout's (4) to (6): methods with the signatures of the functions in the script."""

    sde: str
    flow_loss: jax.Array | None = None  # (T,) what the variances of the last two rollouts add

    def coefficients(self, t, h):
        """p and k of the step from t (..)."""
        if self.sde in ("euler", "exact"):
            return 2.0, 1.0
        u = t + h
        k = (1 - u) / (1 - t)
        return 1 + k * t / u, k

    def sigma(self, t, h):
        """sigma of the step from t (..)."""
        if self.sde in ("euler", "exact"):
            return qam.memoryless_sigma(t, h)
        p, k = self.coefficients(t, h)
        u = t + h
        step_number = jnp.round(t / h).astype(int)
        # In the last step 1 - u is 0 but for rounding.
        variance = k * p * jnp.maximum(1 - u, 0) / u
        return jnp.sqrt(variance + h * p**2 * self.flow_loss[step_number])

    def sample(self, velocity, base_velocity, x0, noise):
        """x0 (B, D), noise (T-1, B, D) -> x_0 .. x_T (T+1, B, D); the last step is the base's."""
        h = 1 / (len(noise) + 1)
        xs = [x0]
        for i in range(len(noise)):
            t = jnp.float32(i * h)
            mean = mean_step(velocity, xs[-1], t, h, self.coefficients(t, h))
            xs.append(mean + jnp.sqrt(h) * self.sigma(t, h) * noise[i])
        xs.append(mean_step(base_velocity, xs[-1], 1 - h, h, (1.0, 0.0)))
        return jnp.stack(xs)

    def adjoints(self, base_velocity, xs, terminal_adjoint):
        """x_0 .. x_{T-1} (T, B, D), g at x_T (B, D) -> adjoints of x_1 .. x_T (T, B, D).

        Exact for the base: its steps, differentiated one after the other.
        """
        h = 1 / len(xs)
        adjoints = [terminal_adjoint]
        for i in range(len(xs) - 1, 0, -1):
            t = jnp.float32(i * h)
            coefficients = self.coefficients(t, h)
            if i == len(xs) - 1:
                coefficients = (1.0, 0.0)  # x + h v
            step = partial(mean_step, base_velocity, t=t, h=h, coefficients=coefficients)
            _, multiply_by_jacobian = jax.vjp(step, xs[i])
            adjoints += multiply_by_jacobian(adjoints[-1])
        return jnp.stack(adjoints[::-1])

    def matching_loss(self, velocity, base_velocity, xs, adjoints):
        """Equation (6) with the step's own p and sigma."""
        xs = jax.lax.stop_gradient(xs)
        adjoints = jax.lax.stop_gradient(adjoints)
        h = 1 / len(xs)
        t = jnp.arange(len(xs)).reshape(-1, 1, 1) * h  # (T, 1, 1)
        t = jnp.broadcast_to(t, (*xs.shape[:-1], 1))  # (T, B, 1)
        p, _ = self.coefficients(t, h)
        sigma = self.sigma(t, h)
        base = jax.lax.stop_gradient(base_velocity(xs, t))
        residual = p / sigma * (velocity(xs, t) - base) + sigma * adjoints
        return jnp.mean(jnp.sum(residual**2, axis=(0, 2)))


def behavior_losses(args, networks, target_params, batch, key):
    """L_BC of the base at each t_i (T,), on the rows that are valid."""
    behavior = {"params": target_params["behavior"]}
    velocity = partial(networks.behavior.apply, behavior, batch.observations)
    x0 = jax.random.normal(key, batch.actions.shape)
    loss_at = partial(qam.flow_matching_loss, velocity, batch.actions, batch.valid, x0)
    times = jnp.arange(args.flow_steps) / args.flow_steps
    losses = jax.vmap(loss_at)(times)
    # The loss divides by B.
    losses = losses / jnp.maximum(batch.valid.mean(), 1e-6)
    return jax.lax.stop_gradient(losses)


def policy_loss(sde, args, networks, params, target_params, batch, q, target_q, key):
    """The script's own policy_loss, with a rollout in place of its functions for (4) to (6)."""
    if sde == "calibrated":
        key_x0 = jax.random.split(key, 4)[0]  # that of the script's x_0
        flow_loss = behavior_losses(args, networks, target_params, batch, key_x0)
    else:
        # (6) divides by sigma, which posterior leaves 0 in the last step.
        flow_loss = jnp.zeros(args.flow_steps).at[-1].set(1.0)
    rollout = Rollout(sde, flow_loss)
    functions = {
        "sample_memoryless_sde": rollout.sample,
        "lean_adjoint": rollout.adjoints,
        "adjoint_matching_loss": rollout.matching_loss,
    }
    arguments = (args, networks, params, target_params, batch, q, target_q, key)
    with mock.patch.multiple(qam, **functions):
        return SCRIPTS_POLICY_LOSS(*arguments)


def use(sde) -> None:
    """From here on qam_offline trains with that rollout."""
    qam.policy_loss = SCRIPTS_POLICY_LOSS
    if sde != "euler":
        qam.policy_loss = partial(policy_loss, sde)


def bandit(options) -> None:
    """MMD to the target of closed_form.py at inv_temp 1, of what acts: the noiseless policy."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for flow_steps in options.flow_steps:
        for seed in options.seeds:
            rng = np.random.default_rng(seed)
            target = closed_form.draw_target(rng, closed_form.NUM_SAMPLES)
            for sde in options.sdes:
                started = time.perf_counter()
                use(sde)
                inv_temps = (1.0,)
                setting = (inv_temps, flow_steps, options.steps, seed)
                trained = closed_form.train("qam_offline", *setting)
                distance = closed_form.mmd(trained.samples[0], target)
                rows.append((sde, flow_steps, seed, options.steps, distance))
                seconds = time.perf_counter() - started
                print(*rows[-1], f"({seconds:.0f} s)", flush=True)
                closed_form.write_csv(options.output, "sde flow_steps seed steps mmd", rows)


def train(sde: str, flags: list[str]) -> None:
    """qam_offline.py's own main with that rollout."""
    use(sde)
    sys.argv[1:] = flags
    args = qam.parse_args()
    if args.resume is None:
        args.run_dir = f"{args.run_dir}/{sde}"
    qam.main(args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if options.command == "run":
        train(options.sde, flags)
    elif flags:
        closed_form.fail(f"there is no {' '.join(flags)}")
    else:
        bandit(options)


if __name__ == "__main__":
    main()
