"""Draw the success curves of runs, with the behaviour flow of their checkpoints beside them.

    python tools/plot_runs.py runs/pointmaze-* --behaviour --output curve.png

Runs of one script and environment are one line: the mean over seeds, with a band from the lowest to the highest seed;
from three scripts on, a thin line a seed instead. A dotted line marks where a run goes on online.
--behaviour scores the flow that imitates the data ("slow") of each run's checkpoint, on the same episodes and with the
same noise as the policy itself, and keeps the result in the run's folder as behaviour.csv.
"""

import collections
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated

import gymnasium
import jax
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders"""
    output: Path = Path("curve.png")
    """the picture to write"""
    behaviour: bool = False
    """score the behaviour flow of each run's checkpoint (once; then it is read from behaviour.csv)"""
    title: str = ""
    """title of the picture (default: the environment)"""


def read_rows(path: Path) -> list[dict]:
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def score_behaviour(run: Path) -> list[dict]:
    """Rows as in eval.csv for the behaviour flow, one noise a chunk, of the run's checkpoint."""
    script = importlib.import_module(json.loads((run / "args.json").read_text())["script"])
    args, saved = script.resolve_args(script.Args(eval_only=str(run)))
    args = dataclasses.replace(args, best_of_n=1)
    networks = script.make_networks(args, saved["observation_dim"], saved["action_dim"])
    states = script.load_checkpoint(run)["states"]
    if not {"slow", "fast"} <= states["params"].keys():
        print(f"error: --behaviour needs slow and fast; {run} has {', '.join(states['params'])}", file=sys.stderr)
        sys.exit(2)
    params = states["params"] | {"fast": states["params"]["slow"]}
    act = lambda params, s, key, n: script.sample_actions(args, networks, params, s[None], jax.random.fold_in(key, n))[
        0
    ]
    make = lambda: script.ChunkedEpisode(script.split_env_id(args.env_id)[1], args.horizon)
    spawn = dict(context="spawn", autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED)
    envs = gymnasium.vector.AsyncVectorEnv([make] * min(args.eval_envs, args.eval_episodes), **spawn)
    state = script.TrainState(params, None, None, states["step"])
    rows = script.evaluate(args, jax.jit(jax.vmap(act, (None, 0, None, 0))), state, envs, run, [])
    envs.close()
    rows = [row | {"phase": "behaviour"} for row in rows]
    lines = [",".join(map(str, row)) for row in [rows[0], *(row.values() for row in rows)]]
    (run / "behaviour.csv").write_text("\n".join([*lines, ""]))
    return rows


def draw(curves: dict, behaviours: dict, switches: set[int], title: str, output: Path) -> None:
    """curves: label -> {step: [success of each seed]}; behaviours: label -> [success of each seed]; switches: steps."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for i, (label, by_step) in enumerate(curves.items()):
        steps = sorted(by_step)
        values = [by_step[step] for step in steps]
        seeds = max(map(len, values))
        axes.plot(
            steps, [np.mean(v) for v in values], color=f"C{i}", label=f"{label} ({seeds} seed{'s' * (seeds > 1)})"
        )
        if len(curves) > 2:  # more than two bands hide each other: a thin line a seed
            axes.plot(steps, values, color=f"C{i}", alpha=0.35, linewidth=0.8)
        else:
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.2)
        if label in behaviours:
            axes.axhline(np.mean(behaviours[label]), color=f"C{i}", linestyle="--", label="its behaviour flow")
    for step in switches:
        axes.axvline(step, color="black", linestyle=":", linewidth=1)
    steps = "gradient steps, online environment steps" if switches else "gradient steps"
    axes.set(xlabel=steps, ylabel="success rate", ylim=(-0.03, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best") if len(curves) <= 2 else axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(output, dpi=120)


def main(args: Args) -> None:
    curves, behaviours, environments, switches = {}, {}, set(), set()
    for run in args.runs:
        if not (run / "args.json").exists() or not (run / "eval.csv").exists():
            print(f"error: {run} is no run folder with evaluations (args.json, eval.csv)", file=sys.stderr)
            sys.exit(2)
        saved = json.loads((run / "args.json").read_text())
        label = f"{saved['script']}"
        environments.add(saved["env_id"])
        rows = read_rows(run / "eval.csv")
        switches |= {saved["offline_steps"]} if any(row["phase"] == "online" for row in rows) else set()
        for row in rows:
            by_step = curves.setdefault(label, collections.defaultdict(list))
            by_step[int(row["step"])].append(float(row["success_rate"]))
        if args.behaviour:
            done = (run / "behaviour.csv").exists()
            rows = read_rows(run / "behaviour.csv") if done else score_behaviour(run)
            behaviours.setdefault(label, []).extend(float(row["success_rate"]) for row in rows)
    draw(curves, behaviours, switches, args.title or ", ".join(sorted(environments)), args.output)
    for label, by_step in curves.items():
        step = max(by_step)
        beside = f", behaviour flow {np.mean(behaviours[label]):.3f}" if label in behaviours else ""
        print(f"{label}: success {np.mean(by_step[step]):.3f} (seeds {by_step[step]}) at step {step}{beside}")
    print(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
