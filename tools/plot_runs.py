"""Draw the success curves of runs.

    python tools/plot_runs.py runs/pointmaze-* --output curve.png --csv curve.csv
    python tools/plot_runs.py curve.csv --output curve.png

Takes run folders (args.json, eval.csv, and behavior.csv where tools/evaluate.py wrote one) and the
tidy CSV files that --csv writes, one row an evaluation of a seed. Runs of one environment, script
and setting are one curve; the setting lists the arguments, and the number of transitions in the
data, that differ among the given runs of an environment. Up to two curves are drawn as the mean
over seeds with a band from the lowest to the highest; from three on, as the mean with a thin line
a seed. Dashed: the behavior flow. Dotted: the last evaluation before a run goes online.
"""

import collections
import csv
import dataclasses
import json
import sys
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import tyro
from matplotlib.figure import Figure

COLUMNS = {"experiment": str, "script": str, "setting": str, "seed": int, "phase": str}
COLUMNS.update({"step": int, "success": float, "return": float, "length": float})
# What args.json holds beside the settings: where and how a run worked, not what it learned.
# Runs that differ in nothing else are seeds of one curve.
NOT_SETTINGS = (
    "script seed num_seeds run_dir resume dataset_dir offline_checkpoint eval_every eval_episodes "
    "eval_envs log_every checkpoint_every track wandb_project eval_only capture_video device "
    "observation_dim action_dim"
).split()


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]  # run folders and tidy CSV files
    output: Path = Path("curve.png")  # the figure to write
    csv: Path | None = None  # the tidy CSV file to write
    experiment: str = ""  # what it calls the run folders (default: their environment)
    title: str = ""  # title of the figure (default: the experiments)


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def read_settings(run: Path) -> dict:
    """The script, the environment, and every argument that changes what is learned."""
    try:
        saved = json.loads((run / "args.json").read_text())
        settings = {"script": Path(saved["script"]).stem, "env_id": saved["env_id"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is no run folder (args.json: {error!r})")
    for name, value in saved.items():
        # Versions, the JAX settings and the data are dictionaries; arguments never are.
        if name not in NOT_SETTINGS and not isinstance(value, dict):
            settings[name] = value
    # Paths of data differ from machine to machine; how much it was is part of the setting.
    if isinstance(saved.get("data"), dict):
        settings["transitions"] = saved["data"].get("transitions")
    return settings


def find_differing(all_settings: list[dict]) -> list[str]:
    """The names that have several values among the runs that have them."""
    values = collections.defaultdict(set)
    for settings in all_settings:
        for name, value in settings.items():
            values[name].add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1 and name != "script"]


def describe(settings: dict, names: list[str]) -> str:
    """For example 'inv_temp=0.5 tau=0.02'."""
    parts = []
    for name in names:
        if name in settings:
            value = json.dumps(settings[name], separators=(",", ":"))
            parts.append(f"{name}={value}".replace('"', ""))
    return " ".join(parts)


def read_rows(path: Path, curve: dict) -> list[dict]:
    """The evaluations of a file. `curve`: what the rows of a run folder don't say themselves."""
    rows = []
    try:
        with open(path, newline="") as file:
            for line in csv.DictReader(file):
                if curve:
                    line.update(curve, success=line["success_rate"])
                rows.append({name: kind(line[name]) for name, kind in COLUMNS.items()})
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{path} can't be read as evaluations: {error!r}")
    if not rows:
        fail(f"{path} has no evaluation")
    return rows


def read_curves(args: Args) -> dict[tuple, list[dict]]:
    """(source, experiment, script, setting) -> rows; the source is a CSV file, or "" for runs."""
    sources = {"": []}
    runs = [path for path in args.runs if path.is_dir()]
    all_settings = [read_settings(run) for run in runs]
    for run, settings in zip(runs, all_settings, strict=True):
        peers = [other for other in all_settings if other["env_id"] == settings["env_id"]]
        names = find_differing(peers)
        if args.experiment and len(peers) < len(runs):
            names.insert(0, "env_id")  # else the name of the experiment says it
        curve = {"experiment": args.experiment or settings["env_id"]}
        curve.update(script=settings["script"], setting=describe(settings, names))
        sources[""] += read_rows(run / "eval.csv", curve)
        if (run / "behavior.csv").exists():
            sources[""] += read_rows(run / "behavior.csv", curve)
    for path in args.runs:
        if not path.is_dir():
            sources[str(path)] = read_rows(path, {})
    # A setting says what differs within its own file: the rows of two files are never averaged.
    curves = collections.defaultdict(list)
    for source, rows in sources.items():
        for row in rows:
            curves[source, row["experiment"], row["script"], row["setting"]].append(row)
    return curves


def by_seed(rows: list[dict], name: str) -> dict[int, dict[int, float]]:
    """seed -> step -> success, in the order of the steps."""
    seeds = collections.defaultdict(dict)
    for row in sorted(rows, key=itemgetter("step")):
        values = seeds[row["seed"]]
        if row["step"] in values:
            fail(f"two runs of seed {row['seed']} have the same settings: {name}")
        values[row["step"]] = row["success"]
    return seeds


def draw_curve(axes, color: str, name: str, rows: list[dict], thin: bool) -> None:
    """The policy's success of one curve, its behavior flow, and where it goes online."""
    seeds = by_seed([row for row in rows if row["phase"] != "behavior"], name)
    behavior = by_seed([row for row in rows if row["phase"] == "behavior"], name)
    if not seeds:
        fail(f"{name} has a behavior flow and no policy")
    # Runs of unequal length: the mean goes as far as all of them do, each seed as far as it does.
    steps = sorted(set.intersection(*map(set, seeds.values())))
    table = np.array([[values[step] for step in steps] for values in seeds.values()])
    label = f"{name}, seeds: {len(seeds)}"
    axes.plot(steps, table.mean(axis=0), color=color, marker=".", label=label)
    if steps:
        print(f"{label}, success {table[:, -1].mean():.3f} at step {steps[-1]}")
    if not thin:
        axes.fill_between(steps, table.min(axis=0), table.max(axis=0), color=color, alpha=0.2)
    for values in seeds.values():
        if thin or len(values) > len(steps):
            axes.plot(list(values), list(values.values()), color=color, alpha=0.35, linewidth=0.8)
    if behavior:
        mean = np.mean([list(values.values())[-1] for values in behavior.values()])
        axes.axhline(mean, color=color, linestyle="--", label=f"{name}, behavior flow")
        print(f"{name}, behavior flow, success {mean:.3f}")
    offline = [row["step"] for row in rows if row["phase"] == "offline"]
    if offline and any(row["phase"] == "online" for row in rows):
        axes.axvline(max(offline), color="black", linestyle=":", linewidth=1)


def main(args: Args) -> None:
    if not args.runs:
        fail("no run folder and no tidy CSV file is given")
    curves = read_curves(args)
    # The legend below the axes hides no curve; each of its lines needs room.
    figure = Figure(figsize=(6, 3.6 + 0.22 * len(curves)), layout="constrained")
    axes = figure.subplots()
    experiments = list(dict.fromkeys(key[1] for key in curves))
    for number, (key, rows) in enumerate(curves.items()):
        # One experiment stands in the title, several in the names of their curves.
        parts = key[1:] if len(experiments) > 1 else key[2:]
        draw_curve(axes, f"C{number}", " ".join(parts).strip(), rows, thin=len(curves) > 2)
    axes.set(xlabel="gradient (online: environment) steps", ylabel="success", ylim=(-0.03, 1.03))
    axes.set_title(args.title or ", ".join(experiments), wrap=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    try:
        figure.savefig(args.output, dpi=120)
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
                writer.writeheader()
                for rows in curves.values():
                    writer.writerows(rows)
    except (OSError, ValueError) as error:  # no such folder, a format unknown to matplotlib
        fail(str(error), status=1)
    print(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
