"""Does a KL budget remove the cliff of the inverse temperature, or only move it?

    python experiments/trust_region.py RUN... --output results/trust-region

takes finished runs of qam_offline.py, which differ in inv_temp, and of variants/trqam.py, which
differ in kl_budget, on one environment. It measures how far each run's final policy is from its
behavior flow, by equation (7) of TRQAM in both cases, and writes into the output folder:

runs.csv       a row a run: coefficient, final success, success over the last half, final path KL
curves.csv     a row each log_every of a TRQAM run: path KL, lambda, 1 / Lambda (QAM's inv_temp)
budget.png     success over the path KL at the end; path KL and 1 / Lambda while training
"""

import csv
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts
import qam_offline  # noqa: E402
from variants import trqam  # noqa: E402

SCRIPTS = {"qam_offline": qam_offline, "trqam": trqam}
COEFFICIENTS = {"qam_offline": "inv_temp", "trqam": "kl_budget"}
TITLES = {"qam_offline": "QAM, inv_temp", "trqam": "TRQAM, kl_budget"}
MARKERS = {"qam_offline": "o", "trqam": "^"}


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]  # run folders
    output: Path = Path("results/trust-region")  # the folder to write
    batch_size: int = 4096  # states at which the final path KL is measured


def final_path_kl(script, run, batch_size):
    """Equation (7) at the end of a run, on states of its data and a rollout of its policy."""
    record, args = script.read_run(run)
    env = script.make_env(args)
    networks = script.make_networks(args, env.observation_space.shape[0], env.action_space.shape[0])
    states = script.load_checkpoint(run)["states"]
    params = jax.tree.map(lambda x: x[0], states["params"])
    target_params = jax.tree.map(lambda x: x[0], states["target_params"])
    dataset = script.load_dataset(args, Path(record["data"]["path"][0]), env)

    key_rows, key_x0, key_noise = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.randint(key_rows, (batch_size,), 0, len(dataset.rewards))
    observations = dataset.observations[np.asarray(rows)]
    policy = partial(networks.policy.apply, {"params": params["policy"]}, observations)
    base = partial(networks.behavior.apply, {"params": target_params["behavior"]}, observations)
    shape = (batch_size, args.horizon * env.action_space.shape[0])
    x0 = jax.random.normal(key_x0, shape)
    noise = jax.random.normal(key_noise, (args.flow_steps - 1, *shape))
    xs = trqam.sample_memoryless_sde(policy, base, x0, noise)
    return float(trqam.path_kl(policy, base, xs[:-1], args.horizon))


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def measure(run, batch_size):
    """(the run's row of runs.csv, its rows of curves.csv)"""
    record = json.loads((run / "args.json").read_text())
    name = Path(record["script"]).stem
    script = SCRIPTS[name]
    _, args = script.read_run(run)
    coefficient = getattr(args, COEFFICIENTS[name])
    success = [float(row["success_rate"]) for row in read_rows(run / "eval.csv")]
    last_half = success[len(success) // 2 :]
    row = {
        "script": name,
        "coefficient": coefficient,
        "seed": args.seed,
        "steps": args.offline_steps,
        "final_success": success[-1],
        "success_of_last_half": round(float(np.mean(last_half)), 4),
        "final_path_kl": round(final_path_kl(script, run, batch_size), 5),
    }
    curves = []
    if name == "trqam":
        for metrics in read_rows(run / "metrics.csv"):
            inverse = 1 / (args.lambda_scale * float(metrics["lambda"]))
            curve = {"kl_budget": coefficient, "seed": args.seed, "step": int(metrics["step"])}
            curve["path_kl"] = float(metrics["path_kl"])
            curve["lambda"] = float(metrics["lambda"])
            curves.append({**curve, "inverse_temperature": round(inverse, 5)})
    return row, curves


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_success(axes, rows):
    """A point a run: where its policy ended, and what that was good for."""
    for name, marker in MARKERS.items():
        own = [row for row in rows if row["script"] == name]
        for coefficient in sorted({row["coefficient"] for row in own}):
            points = [row for row in own if row["coefficient"] == coefficient]
            axes.plot(
                [row["final_path_kl"] for row in points],
                [row["success_of_last_half"] for row in points],
                marker,
                alpha=0.8,
                label=f"{TITLES[name]} {coefficient:g}",
            )
    axes.set(xscale="log", xlabel="path KL at the end, nats per action", ylim=(-0.03, 1.03))
    axes.set_ylabel("success, mean over the last half")
    axes.legend(fontsize="x-small")


def draw_curve(axes, rows, name, label):
    """The mean over seeds for each budget."""
    for number, budget in enumerate(sorted({row["kl_budget"] for row in rows})):
        own = [row for row in rows if row["kl_budget"] == budget]
        steps = sorted({row["step"] for row in own})
        means = [np.mean([row[name] for row in own if row["step"] == step]) for step in steps]
        axes.plot(steps, means, color=f"C{number}", label=f"kl_budget {budget:g}")
        if name == "path_kl":
            axes.axhline(budget, color=f"C{number}", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="gradient steps", ylabel=label)
    axes.legend(fontsize="x-small")


def main(args):
    measured = [measure(run, args.batch_size) for run in args.runs]
    rows = [row for row, _ in measured]
    rows.sort(key=lambda row: (row["script"], row["coefficient"], row["seed"]))
    curves = [curve for _, of_run in measured for curve in of_run]
    curves.sort(key=lambda row: (row["kl_budget"], row["seed"], row["step"]))
    args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "runs.csv", rows)
    write_rows(args.output / "curves.csv", curves)

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_success(left, rows)
    draw_curve(middle, curves, "path_kl", "path KL (dotted: budget)")
    draw_curve(right, curves, "inverse_temperature", "inverse temperature, 1 / Lambda")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(args.output / "budget.png", dpi=110)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
