"""What runs have shown, in tables and figures, and beside the paper's curves.

    python tools/report.py runs/pointmaze-* -o report
    python tools/report.py sweep -o report --published
    python tools/report.py results/baselines/results.csv -o results/baselines
    python tools/report.py --published-only -o report

Takes run folders, folders of tools/sweep.py, and the results.csv that it writes. Writes into the
folder -o:

results.csv     a row an evaluation of a seed
report.md       what was read, success by task and domain, aggregates, and the figures
success.png     success over steps, a panel a task; below it, what its lines and marks mean. Of
                several domains, a file each. From eight curves on a panel has one, and QAM's
return.png      the same of return, where the environment says nothing of success
aggregate.png   over two or more tasks: interquartile mean over steps, performance profile, and the
                probability that one method is better than another (arXiv 2108.13264); from eight
                methods on, each one's interquartile mean

Of files that tools/evaluate.py -o has written it makes report.md and acting.png: success over the
flags that only act, a panel a task and method, each seed thin.

    python tools/report.py acting.csv -o report

Runs of one task, script and setting are seeds of one curve; the setting lists the arguments, and
the data, that differ among the runs of a task (and are not what each script takes by itself).
Intervals hold 95 % of 2,000 bootstrap samples: seeds are drawn again, within each task. Tables
compare at the last step that all runs of a task have. A run that has ended early is drawn as far as
it went, marked by a cross, and left out of what comes after its end.
"""

import collections
import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import textwrap
import zlib
from operator import itemgetter
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).resolve().parent.parent
# The paper's curves (arXiv 2601.14234, MIT license): TASK|METHOD -> success (30 evaluations at
# 50,000, 100,000, .. 1,500,000 steps, of which a million are offline; 12 seeds).
PUBLISHED = ROOT / "results/published/published_curves.npz"
PUBLISHED_EVERY = 50_000
COLUMNS = {"experiment": str, "script": str, "setting": str, "seed": int, "phase": str}
COLUMNS.update({"step": int, "success": float, "return": float, "length": float})
# What args.json holds beside the settings: where and how a run worked, not what it learned.
# Runs that differ in nothing else are seeds of one curve.
NOT_SETTINGS = (
    "script script_sha256 seed num_seeds run_dir resume dataset_dir offline_checkpoint eval_every "
    "eval_episodes eval_envs log_every checkpoint_every checkpoint_minutes track wandb_project "
    "eval_only capture_video device observation_dim action_dim"
).split()
# The scripts' methods, as the paper names them.
METHODS = {
    "qam_offline": "QAM",
    "qam_edit": "QAM-E",
    "qam_fql": "QAM-F",
    "trqam": "TRQAM",
    "qam_diffusion_variant": "QAM, diffusion",
    "fql": "FQL",
    "dsrl": "DSRL",
    "fbrac": "FBRAC",
    "bam": "BAM",
    "fedit": "FEdit",
    "ifql": "IFQL",
    "fawac": "FAWAC",
    "rebrac": "ReBRAC",
    "rlpd": "RLPD",
    "cgql": "CGQL",
    "qsm": "QSM",
    "dac": "DAC",
    "rql": "RQL",
    "qgf": "QGF",
}
# CGQL's modes are methods of their own there.
MODES = {"mode=mse": "CGQL-M", "mode=linex": "CGQL-L"}
# What the names of OGBench's tasks begin with. Its environments all report success.
OGBENCH = tuple("pointmaze- antmaze- humanoidmaze- antsoccer- cube- scene- puzzle- visual-".split())
# The flags of tools/evaluate.py that only act.
ACTING = ("best_of_n", "flow_steps", "guidance_weight")
# Okabe and Ito's colors, which the color-blind tell apart; then the same again, dashed.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_CURVES = 7  # of a panel; more would hide each other
LONGEST_LABEL = 20  # letters beside a panel; longer ones stand below
NUM_BOOTSTRAP = 2000
# Of success: what an interval that tells agreement from difference must be within.
CLOSE_ENOUGH = 0.1


@dataclasses.dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, sweep folders, results.csv files"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report")
    """the folder to write"""
    experiment: str = ""
    """what results.csv calls the task of run folders (default: their environment)"""
    title: str = ""
    """above the figure of success (default: the task)"""
    published: bool = False
    """draw the paper's curves, and compare with them"""
    published_only: bool = False
    """the paper's own aggregate table; takes no runs"""


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------ reading


class Key(NamedTuple):
    """What a curve is."""

    source: str  # a results.csv, whose settings say what differs within it; "" for run folders
    task: str
    script: str
    setting: str

    def method(self):
        stem = self.script.replace("_offline_to_online", "")
        stem = "qam_offline" if stem == "qam" else stem
        for mode, name in MODES.items():
            if mode in self.setting.split():
                return name
        return METHODS.get(stem, self.script)


def find_runs(path):
    """A run's folder as it is; of a sweep's folder, the newest run of each job, if evaluated."""
    if not (path / "jobs.csv").exists():
        return [path]
    runs = []
    for job in sorted((path / "runs").glob("*")):
        found = sorted(place.parent for place in job.glob("*/args.json"))
        evaluated = [run for run in found if (run / "eval.csv").exists()]
        runs += (evaluated or found)[-1:]
    return runs


def read_record(run):
    try:
        record = json.loads((run / "args.json").read_text(encoding="utf-8"))
        for name in ("script", "env_id", "offline_steps"):
            record[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is no run folder (args.json: {error!r})")
    return record


def settings_of(record):
    """Every argument that changes what is learned, and what the data was."""
    settings = {}
    for name, value in record.items():
        # Versions, the JAX settings and the data are dictionaries; arguments never are.
        if name not in NOT_SETTINGS and not isinstance(value, dict):
            settings[name] = value
    data = record.get("data")
    if isinstance(data, dict):
        settings["data"] = f"{data.get('transitions')}"
        if "crcs" in data:
            settings["data"] += f"-{zlib.crc32(json.dumps(data['crcs']).encode()):08x}"
    return settings


def own_settings(record):
    """The settings that its script takes by itself on its environment; {} if it can't be loaded."""
    path = Path(record["script"])
    places = (path, *ROOT.glob(path.name), *ROOT.glob(f"*/{path.name}"))
    found = [place for place in places if place.exists()]
    if not found:
        return {}
    name = f"reported_{path.stem}"
    try:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, found[0])
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return vars(sys.modules[name].Args(env_id=record["env_id"]))
    except Exception as error:  # whatever a script of one's own raises when it is loaded
        print(f"{found[0]} can't be loaded ({error!r}): its defaults count as settings")
        return {}


def find_differing(records):
    """The settings that have several values, if not only because scripts differ by themselves."""
    all_settings = [settings_of(record) for record in records]
    differing = several_values(all_settings)
    if not differing or len({record["script"] for record in records}) == 1:
        return differing
    own = {record["script"]: own_settings(record) for record in records}
    for record, settings in zip(records, all_settings, strict=True):
        for name, value in own[record["script"]].items():
            if name in settings and json.dumps(settings[name]) == json.dumps(value):
                settings[name] = "the script's own"
    still = several_values(all_settings)
    return [name for name in differing if name in still]


def several_values(all_settings):
    """The names that have several values among the settings that have them."""
    values = collections.defaultdict(set)
    for settings in all_settings:
        for name, value in settings.items():
            values[name].add(json.dumps(value))
    return [name for name, found in values.items() if len(found) > 1]


def describe(settings, names):
    """For example 'inv_temp=0.5 tau=0.02'."""
    parts = []
    for name in names:
        if name in settings:
            value = json.dumps(settings[name], separators=(",", ":"))
            parts.append(f"{name}={value}".replace('"', ""))
    return " ".join(parts)


def read_rows(path, curve):
    """The evaluations of a file. `curve`: what the rows of a run folder don't say themselves."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if curve:
                    line.update(curve, success=line["success_rate"])
                rows.append({name: kind(line[name]) for name, kind in COLUMNS.items()})
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{path} can't be read as evaluations: {error!r}")
    return rows


class Results(NamedTuple):
    curves: dict  # Key -> rows
    names: dict  # Key -> its method, with what tells it from others of the method on the task
    unfinished: dict  # (Key, seed) -> the step that it should come to, and what has become of it
    differing: dict  # task -> names of the settings that differ among its runs
    measures: dict  # task -> "success" or, if its environment says nothing of that, "return"
    left_out: list  # run folders without an evaluation


def read_results(args):
    """All curves of what is given."""
    results = Results(collections.defaultdict(list), {}, {}, {}, {}, [])
    read_runs(args, results)
    for path in args.runs:
        if not path.is_dir():
            read_table(path, results)
    if not results.curves:
        fail(f"nothing has been evaluated yet in {', '.join(map(str, args.runs))}")
    choose_measures(results)
    for key, rows in results.curves.items():
        if not by_seed(key, rows):
            fail(f"{key.script} on {key.task} has a behavior flow and no policy")
        results.names[key] = name_of(key, results.curves)
    return results


def read_runs(args, results):
    """Add the runs of folders; a run without an evaluation is left out."""
    records = {}
    for run in [run for path in args.runs if path.is_dir() for run in find_runs(path)]:
        record = read_record(run)
        path = run / "eval.csv"
        if path.exists() and len(path.read_text().splitlines()) > 1:
            records[run] = record
        else:
            results.left_out.append(run)
    by_env_id = collections.defaultdict(list)
    for record in records.values():
        by_env_id[record["env_id"]].append(record)
    differing = {env_id: find_differing(peers) for env_id, peers in by_env_id.items()}

    runs = {}  # (Key, seed) -> its folder
    for run, record in records.items():
        names = differing[record["env_id"]]
        task = args.experiment or record["env_id"]
        results.differing[task] = names
        script = Path(record["script"]).stem
        key = Key("", task, script, describe(settings_of(record), names))
        curve = {"experiment": task, "script": script, "setting": key.setting}
        rows = read_rows(run / "eval.csv", curve)
        last = record["offline_steps"] + record.get("online_steps", 0)
        for seed in {row["seed"] for row in rows}:
            other = runs.setdefault((key, seed), run)
            if other != run:
                words = "are two runs of seed {seed} with the same settings: leave one of them out"
                fail(f"{other} and {run} {words.format(seed=seed)}")
            if max(row["step"] for row in rows) < last:
                results.unfinished[key, seed] = (last, fate_of(run))
        if (run / "behavior.csv").exists():
            rows += read_rows(run / "behavior.csv", curve)
        if not record["env_id"].startswith(OGBENCH):
            doubt_failures(rows)
        results.curves[key] += rows


def read_table(path, results):
    """Add a results.csv. A seed in it that ends before the others of its curve has ended early."""
    own = collections.defaultdict(list)
    for row in read_rows(path, {}):
        own[Key(str(path), row["experiment"], row["script"], row["setting"])].append(row)
    results.curves.update(own)
    for key, rows in own.items():
        names = [word.partition("=")[0] for word in key.setting.split()]
        known = results.differing.setdefault(key.task, [])
        known += [name for name in names if name not in known]
        ends = {seed: max(values) for seed, values in by_seed(key, rows).items()}
        for seed, end in ends.items():
            if end < max(ends.values()):
                results.unfinished[key, seed] = (max(ends.values()), "unfinished")


def doubt_failures(rows):
    """Success 0, of an environment that may not report any, becomes nan."""
    for row in rows:
        if row["success"] == 0:
            row["success"] = np.nan


def choose_measures(results):
    """A task whose rows all have nan is judged by return; elsewhere nan was a failure, so 0."""
    for task in dict.fromkeys(key.task for key in results.curves):
        rows = [row for key in results.curves if key.task == task for row in results.curves[key]]
        results.measures[task] = "return"
        if not all(np.isnan(row["success"]) for row in rows):
            results.measures[task] = "success"
            for row in rows:
                row["success"] = np.nan_to_num(row["success"])


def fate_of(run):
    """Of a run that has not come to its end; tools/sweep.py keeps the exit status of a job."""
    ended = run.parent / "exit"
    stopped = ("130", "138", "143")  # by a signal: it may go on
    return "failed" if ended.exists() and ended.read_text() not in stopped else "unfinished"


def name_of(key, curves):
    """Its method, and those of its settings that other curves of the method have otherwise."""
    peers = []
    for other in curves:
        same_script = (other.source, other.task, other.script) == (key.source, key.task, key.script)
        if same_script and other.method() == key.method():  # a mode of CGQL is a method
            peers.append(other)
    shared = set.intersection(*(set(peer.setting.split()) for peer in peers))
    words = [word for word in key.setting.split() if word not in shared]
    if key.script.endswith("_online") or any(row["phase"] == "online" for row in curves[key]):
        words.insert(0, "online")
    return " ".join([key.method(), *words])


def by_seed(key, rows, behavior=False):
    """seed -> step -> success (or return: choose_measures), in the order of the steps."""
    seeds = collections.defaultdict(dict)
    for row in sorted(rows, key=itemgetter("step")):
        if (row["phase"] == "behavior") != behavior:
            continue
        values = seeds[row["seed"]]
        if row["step"] in values:
            where = f"{key.source}: {key.script} {key.setting}, seed {row['seed']}"
            fail(f"{where} has two rows of step {row['step']}: leave one of them out")
        values[row["step"]] = row["return" if np.isnan(row["success"]) else "success"]
    return seeds


def points_of(key, rows):
    """step -> success (S,) of the seeds that have come so far, where all of those have the step."""
    seeds = by_seed(key, rows).values()
    points = {}
    for step in sorted({step for values in seeds for step in values}):
        so_far = [values for values in seeds if max(values) >= step]
        if all(step in values for values in so_far):
            points[step] = np.array([values[step] for values in so_far])
    return points


def steps_of(results, key):
    """The steps that all runs of a curve have; but for those that ended early, if not all did."""
    seeds = by_seed(key, results.curves[key])
    ended = [values for seed, values in seeds.items() if (key, seed) not in results.unfinished]
    return set.intersection(set(points_of(key, results.curves[key])), *(ended or seeds.values()))


def last_common_step(results, task):
    """At which the methods of a task are compared; None if they have no step in common."""
    steps = [steps_of(results, key) for key in results.curves if key.task == task]
    return max(set.intersection(*steps), default=None)


# --------------------------------------------------------------------------------------- statistics


def resample(rng, scores):
    """Seeds drawn again with replacement: (.., S) -> (NUM_BOOTSTRAP, .., S)."""
    chosen = rng.integers(scores.shape[-1], size=(NUM_BOOTSTRAP, scores.shape[-1]))
    return np.moveaxis(scores[..., chosen], -2, 0)


def interval(samples):
    """What holds 95 % of bootstrap samples (N, ..): (low, high)."""
    return np.quantile(samples, [0.025, 0.975], axis=0)


def resample_tasks(rng, scores):
    """The same, within each task: scores, a list of (S,) -> (NUM_BOOTSTRAP, all seeds)."""
    return np.concatenate([resample(rng, one) for one in scores], axis=-1)


def interquartile_mean(scores):
    """The mean of the middle half: (.., M) -> (..). As scipy.stats.trim_mean with 0.25."""
    count = scores.shape[-1]
    cut = count // 4
    return np.sort(scores, axis=-1)[..., cut : count - cut].mean(axis=-1)


def probability_of_improvement(scores, others):
    """That a run of the first beats one of the second, mean over tasks; a tie counts half."""
    wins = []
    for one, other in zip(scores, others, strict=True):
        first = one[..., :, None]
        second = other[..., None, :]
        wins.append(((first > second) + 0.5 * (first == second)).mean(axis=(-2, -1)))
    return np.mean(wins, axis=0)


def compare(rng, ours, theirs):
    """(difference of the means, low, high, seeds that tell agreement; None: no number would).

    Of fewer than three seeds nothing can be drawn again: the spread is taken to be the paper's.
    """
    difference = ours.mean() - theirs.mean()
    spread = theirs.std(ddof=1)
    if len(ours) < 3:
        error = 1.96 * spread * np.sqrt(1 / len(ours) + 1 / len(theirs))
        low, high = difference - error, difference + error
    else:
        drawn = resample(rng, ours).mean(axis=-1) - resample(rng, theirs).mean(axis=-1)
        low, high = interval(drawn)
        spread = max(spread, ours.std(ddof=1))
    left = (CLOSE_ENOUGH / 1.96 / max(spread, 1e-9)) ** 2 - 1 / len(theirs)
    needed = int(np.ceil(1 / left)) if left > 0 else None
    return difference, low, high, needed


def verdict(difference, low, high, needed):
    """In words."""
    if high < 0:
        return "below"
    if low > 0:
        return "above"
    if max(high - difference, difference - low) <= CLOSE_ENOUGH:
        return "agrees"
    return f"too few seeds to tell: {needed} would" if needed else "too few seeds to tell"


# ------------------------------------------------------------------------------------------ figures


class Line(NamedTuple):
    color: str
    style: str


def line_styles(names):
    """{name of a method: its color and style}, the same in every panel."""
    styles = {}
    for i, name in enumerate(names):
        style = ("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(COLORS) % 3]
        styles[name] = Line(COLORS[i % len(COLORS)], style)
    return styles


def label_ends(axes, ends):
    """A line's name at its end, moved where two would touch: ends {name: (height, color)}."""
    bottom, top = axes.get_ylim()
    room = 0.055 * (top - bottom)
    ranked = sorted(ends, key=lambda name: ends[name][0])
    heights = {}
    lowest = -np.inf
    for name in ranked:  # from the lowest up, with room between them
        heights[name] = max(ends[name][0], lowest)
        lowest = heights[name] + room
    highest = top
    for name in reversed(ranked):  # and down again, where that has led out of the axes
        heights[name] = min(heights[name], highest)
        highest = heights[name] - room
    for name in ranked:
        style = {"color": ends[name][1], "fontsize": 8, "va": "center"}
        axes.text(1.01, heights[name], name, transform=axes.get_yaxis_transform(), **style)


def stacked_axes(count, title):
    """A figure with `count` panels one above the other: that can be read on a phone, too."""
    figure = Figure(figsize=(5.6, 3.4 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False).ravel()
    if title:
        figure.suptitle(textwrap.fill(title, 70), fontsize=10)
    return figure, axes


def draw_success(results, tasks, styles, published, title):
    """A panel a task."""
    figure, panels = stacked_axes(len(tasks), title)
    keys = [key for key in results.curves if key.task in tasks]
    names = list(dict.fromkeys(results.names[key] for key in keys))
    labels_below = max(map(len, names)) > LONGEST_LABEL
    for axes, task in zip(panels, tasks, strict=True):
        ends = {}
        axes.set(xlabel="gradient (online: environment) steps", ylabel=results.measures[task])
        if results.measures[task] == "success":
            axes.set_ylim(-0.03, 1.03)
        for key in keys:
            if key.task == task:
                name = results.names[key]
                end = draw_curve(axes, results, key, styles[name])
                ends[name] = (end, styles[name].color)
                if published:
                    draw_published(axes, key, styles[name].color)
        axes.grid(alpha=0.25)
        if len(tasks) > 1 or not title:
            axes.set_title(textwrap.fill(task, 70), fontsize=10)
        if not labels_below:
            label_ends(axes, ends)
    below = {name: styles[name] for name in names if labels_below}
    explain_below(figure, meaning_of_marks(results, keys, published), below)
    return figure


def meaning_of_marks(results, keys, published):
    """In words, of those marks that a figure of these curves has."""
    phases = {row["phase"] for key in keys for row in results.curves[key]}
    several = any(len(by_seed(key, results.curves[key])) > 1 for key in keys)
    unfinished = any(key in keys for key, _ in results.unfinished)
    paper = published and any(published_curve(key) is not None for key in keys)
    words = {
        "thick: mean; thin: seeds; band: 95 % interval of the mean": several,
        "level dashed line: the flow that imitates the data": "behavior" in phases,
        "upright dotted line: online from here": "online" in phases,
        "cross: a run that ended early": unfinished,
        "dashes and dots: the paper's mean; palest band: its lowest to highest seed": paper,
    }
    there = [mark.replace(" ", "\N{NO-BREAK SPACE}") for mark in words if words[mark]]
    return textwrap.fill("; ".join(there), 95)


def explain_below(figure, words, styles):
    """Words and, below them, the names of lines below the panels, for which the figure grows."""
    lines = [Line2D([], [], color=line.color, linestyle=line.style) for line in styles.values()]
    names = [textwrap.fill(name, 75) for name in styles]
    num_rows = len(words.splitlines()) + sum(name.count("\n") + 1 for name in names)
    figure.set_figheight(figure.get_figheight() + 0.16 * num_rows)
    place = {"loc": "outside lower left", "alignment": "left", "frameon": False}
    legend = figure.legend(lines, names, title=words, title_fontsize=7.5, fontsize=8, **place)
    legend.get_title().set_color("0.35")


def draw_one_by_one(results, task, published, title):
    """A panel a curve, best first, each with QAM's (its best) in gray."""
    keys = [key for key in results.curves if key.task == task]
    ends = {key: list(points_of(key, results.curves[key]).values())[-1].mean() for key in keys}
    keys.sort(key=lambda key: -ends[key])
    references = [key for key in keys if key.method() == "QAM"][:1]
    num_rows = -(-len(keys) // 3)
    figure = Figure(figsize=(5.6, 0.6 + 1.35 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 3, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, key in zip(panels, keys, strict=False):
        for reference in references:
            points = points_of(reference, results.curves[reference])
            means = [scores.mean() for scores in points.values()]
            axes.plot(list(points), means, color="0.6", linewidth=1.2)
        name = results.names[key]
        draw_curve(axes, results, key, Line(COLORS[0], "-"))
        if published:
            draw_published(axes, key, COLORS[0])
        axes.set_title(textwrap.fill(name, 28), fontsize=8)
        axes.tick_params(labelsize=7, labelbottom=axes in panels[len(keys) - 3 : len(keys)])
        axes.grid(alpha=0.25)
    if results.measures[task] == "success":
        panels[0].set_ylim(-0.03, 1.03)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].locator_params(axis="x", nbins=4)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    figure.suptitle(textwrap.fill(title or task, 70), fontsize=10)
    words = "gradient (online: environment) steps"
    for reference in references:
        words += f"; gray: {results.names[reference]}"
    words += "\n" + meaning_of_marks(results, keys, published)
    figure.supxlabel(words.strip(), fontsize=7.5)
    figure.supylabel(results.measures[task], fontsize=8)
    return figure


def draw_curve(axes, results, key, line):
    """Mean, interval and seeds of one curve; the height of its end."""
    rows = results.curves[key]
    seeds = by_seed(key, rows)
    points = points_of(key, rows)
    steps = list(points)
    means = [scores.mean() for scores in points.values()]
    color = line.color
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, means, color=color, linestyle=line.style, marker=marker, linewidth=1.8)
    if len(seeds) > 1:
        rng = np.random.default_rng(0)
        drawn = [interval(resample(rng, scores).mean(axis=-1)) for scores in points.values()]
        low, high = np.array(drawn).T
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    for seed, values in seeds.items():
        reached = list(values)
        thin = {"color": color, "alpha": 0.35, "linewidth": 0.7}
        axes.plot(reached, list(values.values()), marker="." if marker else "", **thin)
        if (key, seed) in results.unfinished:
            axes.plot(reached[-1], values[reached[-1]], "x", color=color, markersize=7)
    behavior = by_seed(key, rows, behavior=True)
    if behavior:
        mean = np.mean([list(values.values())[-1] for values in behavior.values()])
        axes.axhline(mean, color=color, linestyle="--", linewidth=1)
    offline = [row["step"] for row in rows if row["phase"] == "offline"]
    if any(row["phase"] == "online" for row in rows):
        axes.axvline(max(offline, default=0), color="0.3", linestyle=":", linewidth=1)
    return means[-1]


def draw_published(axes, key, color):
    """The paper's band, from the lowest to the highest of its seeds, and its mean."""
    curve = published_curve(key)
    if curve is not None:
        steps = PUBLISHED_EVERY * np.arange(1, len(curve) + 1)
        axes.plot(steps, curve.mean(axis=1), color=color, linestyle="-.", linewidth=1)
        axes.fill_between(steps, curve.min(axis=1), curve.max(axis=1), color=color, alpha=0.08)


def draw_aggregate(rng, scores, curves, styles):
    """aggregate.png: `scores` {name: [(S,) a task]}, `curves` {name: {step: [(S,) a task]}}."""
    figure, (over_steps, profile, better) = stacked_axes(3, "")
    ends = {}
    for name, points in curves.items():
        line = styles[name]
        means = [interquartile_mean(np.concatenate(by_task)) for by_task in points.values()]
        drawn = [resample_tasks(rng, by_task) for by_task in points.values()]
        low, high = np.array([interval(interquartile_mean(samples)) for samples in drawn]).T
        over_steps.plot(list(points), means, color=line.color, linestyle=line.style)
        over_steps.fill_between(list(points), low, high, color=line.color, alpha=0.18)
        ends[name] = (means[-1], line.color)
    over_steps.set(ylim=(-0.03, 1.03), xlabel="steps", title="interquartile mean over tasks")
    label_ends(over_steps, ends)

    levels = np.linspace(0, 1, 101)
    ends = {}
    for name, by_task in scores.items():
        line = styles[name]
        drawn = resample_tasks(rng, by_task)
        shares = (np.concatenate(by_task)[:, None] > levels).mean(axis=0)
        low, high = interval((drawn[..., None] > levels).mean(axis=1))
        profile.plot(levels, shares, color=line.color, linestyle=line.style)
        profile.fill_between(levels, low, high, color=line.color, alpha=0.18)
        ends[name] = (shares[90], line.color)
    profile.set(xlabel="success s", title="share of the runs above s", ylim=(-0.03, 1.03))
    label_ends(profile, ends)

    pairs = list(itertools.combinations(scores, 2))[:12]
    for i, (name, other) in enumerate(pairs):
        mean = probability_of_improvement(scores[name], scores[other])
        drawn = [resample(rng, one) for one in scores[name]]
        drawn_others = [resample(rng, one) for one in scores[other]]
        low, high = interval(probability_of_improvement(drawn, drawn_others))
        better.plot([low, high], [i, i], color=styles[name].color, linewidth=4, alpha=0.5)
        better.plot(mean, i, "o", color=styles[name].color)
    better.axvline(0.5, color="0.5", linewidth=1)
    better.set(yticks=range(len(pairs)), xlim=(0, 1), title="probability of improvement")
    better.set_yticklabels([f"{name} > {other}" for name, other in pairs], fontsize=8)
    return figure


def draw_dots(rng, scores):
    """aggregate.png of many methods: each a dot, the best on top. `scores` as above."""
    means = {name: interquartile_mean(np.concatenate(scores[name])) for name in scores}
    names = sorted(scores, key=means.get)
    figure = Figure(figsize=(5.6, 0.8 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        low, high = interval(interquartile_mean(resample_tasks(rng, scores[name])))
        axes.plot([low, high], [i, i], color=COLORS[0], linewidth=4, alpha=0.4)
        axes.plot(means[name], i, "o", color=COLORS[0])
    axes.set(xlim=(-0.03, 1.03), xlabel="interquartile mean over tasks", yticks=range(len(names)))
    axes.set_yticklabels([textwrap.fill(name, 40) for name in names], fontsize=8)
    axes.grid(alpha=0.25)
    return figure


# ------------------------------------------------------------------------------------------- tables


def published_curve(key):
    """The paper's success (evaluations, 12 seeds) for a curve, or None."""
    name = f"{key.task.replace('-task', '-singletask-task')}-v0|{key.method()}"
    with np.load(PUBLISHED) as curves:
        return curves[name] if name in curves.files else None


def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def with_interval(mean, low, high, digits=".2f"):
    return f"{mean:{digits}} [{low:{digits}}, {high:{digits}}]"


def scores_to_compare(results):
    """{method: {task: success (S,) at the last step that all runs of the task have}}."""
    scores = collections.defaultdict(dict)
    for key, rows in results.curves.items():
        if results.measures[key.task] == "return":
            continue  # which is of another size on each task
        points = points_of(key, rows)
        step = last_common_step(results, key.task) or max(points)
        scores[results.names[key]][key.task] = points[step]
    return scores


def table_of_tasks(results):
    """Scores at the step of the comparison and, of a curve that goes on, at its own end."""
    rows = []
    for key, evaluations in results.curves.items():
        own_last = max(steps_of(results, key), default=max(points_of(key, evaluations)))
        steps = {last_common_step(results, key.task) or own_last, own_last}
        rows += [row_of_task(results, key, step) for step in sorted(steps)]
    header = ("task", "method", "step", "success", "seeds", "behavior flow", "return", "setting")
    return markdown_table(header, rows)


def row_of_task(results, key, step):
    rng = np.random.default_rng(0)
    evaluations = results.curves[key]
    scores = points_of(key, evaluations)[step]
    measure = results.measures[key.task]
    digits = ".2f" if measure == "success" else ".4g"
    text = f"{scores.mean():{digits}}"
    if len(scores) > 1:
        drawn = resample(rng, scores).mean(axis=-1)
        text = with_interval(scores.mean(), *interval(drawn), digits)
    seeds = ", ".join(f"{score:{digits}}" for score in scores)
    behavior = by_seed(key, evaluations, behavior=True)
    flows = ", ".join(f"{list(values.values())[-1]:{digits}}" for values in behavior.values())
    there = [line for line in evaluations if line["step"] == step and line["phase"] != "behavior"]
    total = f"{np.mean([line['return'] for line in there]):.4g}"
    if measure == "return":
        text, total = "-", text
    return (key.task, results.names[key], f"{step:,}", text, seeds, flows, total, key.setting)


def where_compared(results):
    """The steps of the comparison of success, in words."""
    steps = {}
    for task in results.measures:
        step = last_common_step(results, task)
        if results.measures[task] == "success":
            steps[task] = f"at step {step:,}" if step else "at each method's own last step"
    if len(set(steps.values())) == 1:
        return next(iter(steps.values()))
    return ", ".join(f"{words} ({task})" for task, words in steps.items())


def domain_of(task):
    return task.partition("-task")[0].partition("-singletask")[0]


def table_of_domains(scores):
    """Final success a method and domain: the best in bold, with what its interval overlaps."""
    rng = np.random.default_rng(0)
    tasks = sorted({task for by_task in scores.values() for task in by_task})
    domains = sorted({domain_of(task) for task in tasks})
    columns = {}
    for domain in [*domains, "all tasks"]:
        chosen = [task for task in tasks if domain in (domain_of(task), "all tasks")]
        cells = {}
        for name, by_task in scores.items():
            if not all(task in by_task for task in chosen):
                continue
            kept = [by_task[task] for task in chosen]
            mean = np.mean([one.mean() for one in kept])
            drawn = np.mean([resample(rng, one).mean(axis=-1) for one in kept], axis=0)
            cells[name] = (mean, *interval(drawn))
        best = max(cells.values(), default=(0, 0, 0))
        columns[domain] = {}
        for name, (mean, low, high) in cells.items():
            text = with_interval(mean, low, high)
            columns[domain][name] = f"**{text}**" if high >= best[1] else text
    rows = [[name, *(columns[d].get(name, "-") for d in columns)] for name in scores]
    return markdown_table(["method", *columns], rows)


def shared_tasks(scores):
    """The tasks that all methods have."""
    return sorted(set.intersection(*map(set, scores.values())))


def table_of_aggregates(rng, scores):
    """Interquartile mean and mean over tasks."""
    rows = []
    for name, by_task in scores.items():
        drawn = resample_tasks(rng, by_task)
        values = np.concatenate(by_task)
        row = [name]
        for statistic in (interquartile_mean, lambda x: x.mean(axis=-1)):
            row.append(with_interval(statistic(values), *interval(statistic(drawn)), ".4f"))
        rows.append(row)
    return markdown_table(("method", "interquartile mean", "mean"), rows)


def table_of_published(results):
    """Where a step is one of the paper's: our seeds beside its."""
    rng = np.random.default_rng(0)
    rows = []
    for key, evaluations in results.curves.items():
        curve = published_curve(key)
        if curve is None:
            continue
        for step, ours in points_of(key, evaluations).items():
            place = step // PUBLISHED_EVERY - 1
            if step % PUBLISHED_EVERY or not 0 <= place < len(curve):
                continue
            theirs = curve[place]
            difference, low, high, needed = compare(rng, ours, theirs)
            inside = np.mean((ours >= theirs.min()) & (ours <= theirs.max()))
            words = f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"
            means = (f"{ours.mean():.2f}", f"{theirs.mean():.2f}", f"{inside:.0%}")
            row = (key.task, results.names[key], f"{step:,}", len(ours), *means, words)
            rows.append((*row, verdict(difference, low, high, needed)))
    if not rows:
        return "No evaluation here is at a step, on a task and of a method that the paper has."
    header = ("task", "method", "step", "seeds", "ours", "paper", "inside its band")
    return markdown_table((*header, "difference", ""), rows)


def what_was_read(results):
    """The seeds of each curve; what differs; what is unfinished."""
    parts = []
    for task, names in results.differing.items():
        if names:
            parts.append(f"- {task}: the runs differ in {', '.join(names)}; never averaged over.")
    for (key, seed), (last, fate) in results.unfinished.items():
        reached = max(by_seed(key, results.curves[key])[seed])
        words = f"{fate}, at step {reached:,} of {last:,}; means beyond are without it"
        parts.append(f"- {key.task}, {results.names[key]}, seed {seed}: {words}.")
    for run in results.left_out:
        parts.append(f"- Left out, for it has no evaluation yet: {run}")
    return "\n".join(parts) or "All runs have come to their end."


# --------------------------------------------------------------------------- flags that only act


def is_of_acting(path):
    """Whether a file is one that tools/evaluate.py -o has written."""
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names = csv.DictReader(file).fieldnames
    return set(ACTING) <= set(names or ())


def read_acting(paths):
    """{(task, method): {way: {seed: success}}}; a way: for each of ACTING its value, or None."""
    panels = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in paths:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    way = tuple(float(row[name]) if row[name] else None for name in ACTING)
                    method = METHODS.get(row["script"], row["script"])
                    scores = panels[row["env_id"], method][way]
                    seed = int(row["seed"])
                    if seed in scores:
                        words = f"{path}: {row['env_id']}, {method} has two runs of seed {seed}"
                        fail(f"{words} that act in the same way: leave one of them out")
                    scores[seed] = float(row["success_rate"])
        except (KeyError, TypeError, ValueError) as error:
            fail(f"{path} can't be read as scores: {error!r}")
    if not panels:
        fail(f"nothing has been scored yet in {', '.join(map(str, paths))}")
    return panels


def in_short(value):
    return "" if value is None else f"{value:g}"


def describe_way(way, chosen):
    """For example 'best_of_n 4'; `chosen`: places in ACTING."""
    return " ".join(f"{ACTING[i]} {in_short(way[i])}" for i in chosen)


def in_order(value):
    """To sort by: None, where a script does not act by a flag, comes first."""
    return -1 if value is None else value


def draw_acting(panels, title):
    """A panel a task and method: success over the flag with most values, a curve for the others."""
    figure, all_axes = stacked_axes(len(panels), title)
    for axes, ((task, method), ways) in zip(all_axes, panels.items(), strict=True):
        ways = dict(sorted(ways.items(), key=lambda item: [*map(in_order, item[0])]))
        values = [list(dict.fromkeys(column)) for column in zip(*ways, strict=True)]
        counts = [len(different) for different in values]
        across = counts.index(max(counts))
        others = [i for i, count in enumerate(counts) if count > 1 and i != across]
        places = {value: place for place, value in enumerate(sorted(values[across], key=in_order))}
        curves = collections.defaultdict(dict)  # name -> place on the axis -> {seed: success}
        for way, scores in ways.items():
            curves[describe_way(way, others)][places[way[across]]] = scores
        ends = {}
        axes.set(ylim=(-0.03, 1.03), xlabel=ACTING[across], ylabel="success")
        for color, (name, points) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
            ends[name] = (draw_way(axes, points, color), color)
        axes.set_xticks(list(places.values()), list(map(in_short, places)))
        axes.grid(alpha=0.25)
        axes.set_title(textwrap.fill(f"{method}, {task}", 70), fontsize=10)
        label_ends(axes, ends)
    return figure


def draw_way(axes, points, color):
    """The mean over seeds and, if there are several, each seed; the height of the curve's end."""
    places = sorted(points)
    means = [np.mean(list(points[place].values())) for place in places]
    axes.plot(places, means, color=color, marker="o", linewidth=1.8)
    seeds = {seed for scores in points.values() for seed in scores}
    for seed in seeds if len(seeds) > 1 else ():
        there = [place for place in places if seed in points[place]]
        scores = [points[place][seed] for place in there]
        axes.plot(there, scores, color=color, alpha=0.35, linewidth=0.7, marker=".")
    return means[-1]


def table_of_acting(panels):
    rows = []
    for (task, method), ways in panels.items():
        for way, scores in ways.items():
            values = map(in_short, way)
            seeds = ", ".join(f"{seed}: {success:.2f}" for seed, success in scores.items())
            rows.append((task, method, *values, f"{np.mean(list(scores.values())):.2f}", seeds))
    return markdown_table(("task", "method", *ACTING, "success", "seeds"), rows)


def report_acting(args):
    """report.md and acting.png."""
    for path in args.runs:
        if not is_of_acting(path):
            fail(f"{path} is none of tools/evaluate.py -o, as others given are: report it alone")
    panels = read_acting(args.runs)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        draw_acting(panels, args.title).savefig(args.output / "acting.png", dpi=140)
        title = args.title or "Flags that only act"
        figure = "![success over flags that only act](acting.png)"
        write_report(args, [f"# {title}", table_of_acting(panels), figure], ["acting.png"])
    except OSError as error:
        fail(str(error), status=1)


# --------------------------------------------------------------------------------------------- main


def write_results(path, results):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        for rows in results.curves.values():
            writer.writerows(rows)


def aggregate(args, results, parts):
    """Over the tasks that all methods have, if there are two or more. Returns its figure's name."""
    rng = np.random.default_rng(0)
    scores = scores_to_compare(results)
    tasks = shared_tasks(scores)
    if len(tasks) < 2:
        return []
    by_method = {name: [by_task[task] for task in tasks] for name, by_task in scores.items()}
    points = collections.defaultdict(dict)
    for key, rows in results.curves.items():
        if key.task in tasks:
            points[results.names[key]][key.task] = points_of(key, rows)
    curves = {}
    for name, by_task in points.items():
        steps = sorted(set.intersection(*map(set, by_task.values())))
        if steps:
            curves[name] = {step: [own[step] for own in by_task.values()] for step in steps}
    table = table_of_aggregates(rng, by_method)
    parts.append(f"## Over {len(tasks)} tasks, {where_compared(results)}\n\n{table}")
    parts.append("![aggregates](aggregate.png)")
    figure = draw_dots(rng, by_method)
    if len(by_method) <= MOST_CURVES:
        figure = draw_aggregate(rng, by_method, curves, line_styles(scores))
    figure.savefig(args.output / "aggregate.png", dpi=140)
    return ["aggregate.png"]


def published_scores(place):
    """{method: {task: success (12,)}} of the paper at one evaluation."""
    scores = collections.defaultdict(dict)
    with np.load(PUBLISHED) as curves:
        for name in curves.files:
            task, _, method = name.partition("|")
            curve = curves[name]
            own_place = place - (30 - len(curve))  # RLPD has the online phase alone
            if own_place >= 0:
                scores[method][task] = curve[own_place]
    return scores


def report_published(args):
    """The paper's aggregate table, from its own curves."""
    parts = ["# The published curves", "Of the QAM paper (arXiv 2601.14234); 50 tasks, 12 seeds."]
    for words, step in (("1,000,000 steps offline", 1_000_000), ("500,000 more online", 1_500_000)):
        rng = np.random.default_rng(0)
        scores = published_scores(step // PUBLISHED_EVERY - 1)
        tasks = shared_tasks(scores)
        by_method = {name: [by_task[task] for task in tasks] for name, by_task in scores.items()}
        ranked = sorted(by_method, key=lambda name: -np.concatenate(by_method[name]).mean())
        table = table_of_aggregates(rng, {name: by_method[name] for name in ranked})
        parts.append(f"## After {words}\n\n{table}")
    write_report(args, parts, [])


def write_report(args, parts, names):
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "report.md"
    text = "\n\n".join(parts) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text)
    print("written: " + ", ".join(str(args.output / name) for name in ["report.md", *names]))


def draw_figures(args, results, tasks):
    """success.png, return.png, or several; returns their names."""
    styles = line_styles(dict.fromkeys(results.names.values()))
    figures = {}  # what distinguishes their names: figure
    for domain in dict.fromkeys(map(domain_of, tasks)):
        chosen = [task for task in tasks if domain_of(task) == domain]
        counts = [sum(key.task == task for key in results.curves) for task in chosen]
        if max(counts) <= MOST_CURVES:
            figures[domain] = draw_success(results, chosen, styles, args.published, args.title)
        else:
            for task in chosen:
                figures[task] = draw_one_by_one(results, task, args.published, args.title)
    measures = {domain_of(task): measure for task, measure in results.measures.items()}
    names = []
    for part, figure in figures.items():
        measure = measures[domain_of(part)]
        names.append(f"{measure}_{part}.png" if len(figures) > 1 else f"{measure}.png")
        figure.savefig(args.output / names[-1], dpi=140)
    return names


def main(args):
    # A console may not know every letter, and what it passed on may be bytes that it did not know.
    sys.stdout.reconfigure(errors="backslashreplace")
    args.title = os.fsencode(args.title).decode(errors="replace")
    matplotlib.rcParams["text.parse_math"] = False  # a $ is a dollar
    if args.published_only:
        return report_published(args)
    if not args.runs:
        fail("no run folder, sweep folder or results.csv is given")
    if any(is_of_acting(path) for path in args.runs):
        return report_acting(args)
    results = read_results(args)
    tasks = list(dict.fromkeys(key.task for key in results.curves))
    parts = [f"# {args.title or ', '.join(tasks)}", what_was_read(results)]
    measures = " and ".join(sorted(set(results.measures.values()), reverse=True)).capitalize()
    parts.append(f"## {measures}\n\n{table_of_tasks(results)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        write_results(args.output / "results.csv", results)
        names = draw_figures(args, results, tasks)
        for name in names:
            measure = "return" if name.startswith("return") else "success"
            parts.append(f"![{measure} over steps]({name})")
        if list(results.measures.values()).count("success") > 1:
            table = table_of_domains(scores_to_compare(results))
            parts.append(f"## By domain, {where_compared(results)}\n\n{table}")
            names += aggregate(args, results, parts)
        if args.published:
            parts.append("## Beside the paper\n\n" + table_of_published(results))
        write_report(args, parts, ["results.csv", *names])
    except OSError as error:
        fail(str(error), status=1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
