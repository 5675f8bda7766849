"""tools/report.py: on a real run, and on the paper's own curves."""

import csv
import json
import os
import shutil
import subprocess
import sys

import gymnasium
import numpy as np
import ogbench  # noqa: F401 (registers its environments)
import pytest
from conftest import ROOT, read_rows
from refusals import refusal

from tools import report

TASK = "scene-play-task{}"


def make_report(output, *runs, **options):
    """The text of report.md."""
    report.main(report.Args(runs=list(runs), output=output, **options))
    return (output / "report.md").read_text()


def write_run(folder, like, last=100, success=0.5, **changes):
    """A run's folder, evaluated at 20, 40, .. `last` of 100 steps: 0.1, then `success`."""
    record = json.loads((like / "args.json").read_text())
    record.update({"seed": 1, "offline_steps": 100, **changes})
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(record))
    lines = ["step,seed,phase,success_rate,return,length"]
    for step in range(20, last + 1, 20):
        lines.append(f"{step},{record['seed']},offline,{success if step > 20 else 0.1},-1,1")
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")
    return folder


def cells(text, *first):
    """The cells of the row of a table that begins with these."""
    for line in text.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if tuple(words[: len(first)]) == first:
            return words
    raise AssertionError(text)


def write_published(path, seeds, shift=0.0, methods=("QAM", "FQL"), tasks=(1, 2)):
    """A results.csv with some of the paper's seeds, as if they were runs of ours."""
    scripts = {method: script for script, method in report.METHODS.items()}
    rows = []
    with np.load(report.PUBLISHED) as curves:
        for task in tasks:
            for method in methods:
                name = f"scene-play-singletask-task{task}-v0|{method}"
                for place, scores in enumerate(curves[name][:20]):
                    for seed in seeds:
                        step = (place + 1) * report.PUBLISHED_EVERY
                        row = (TASK.format(task), scripts[method], "", seed, "offline", step)
                        rows.append((*row, scores[seed] + shift, 0, 0))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(report.COLUMNS)
        writer.writerows(rows)
    return path


def verdicts(text, method):
    """What is said of a method at each step."""
    rows = text.partition("## Beside the paper")[2].splitlines()
    return [row.split("|")[-2].strip() for row in rows if f"| {method} |" in row]


def test_a_run_is_read_as_it_is(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copy(run / "eval.csv", run / "behavior.csv")
    behavior = (run / "behavior.csv").read_text().replace("offline", "behavior").splitlines()
    (run / "behavior.csv").write_text("\n".join([behavior[0], behavior[-1]]) + "\n")
    text = make_report(tmp_path / "report", run)
    assert "All runs have come to their end." in text
    rows = read_rows(tmp_path / "report/results.csv")
    expected = read_rows(run / "eval.csv") + read_rows(run / "behavior.csv")
    for row, score in zip(rows, expected, strict=True):
        assert row["success"] == score["success_rate"]
        assert [row[name] for name in ("seed", "phase", "step")] == [
            score[name] for name in ("seed", "phase", "step")
        ]
    assert (tmp_path / "report/success.png").stat().st_size > 5000
    # What it has written, it reads: the same numbers.
    again = make_report(tmp_path / "again", tmp_path / "report/results.csv")
    assert again.partition("## ")[2] == text.partition("## ")[2]


def test_an_unfinished_run_is_marked(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    record = json.loads((run / "args.json").read_text())
    record["offline_steps"] = 90
    (run / "args.json").write_text(json.dumps(record))
    assert "seed 1: unfinished, at step 60 of 90;" in make_report(tmp_path / "report", run)
    (tmp_path / "exit").write_text("1")
    assert "seed 1: failed, at step 60 of 90;" in make_report(tmp_path / "report", run)


def test_methods_are_compared_at_one_step(finished_run, tmp_path, capsys):
    """Without the runs that ended before, and without those that have no evaluation."""
    runs = []
    for task in (1, 2):
        for script, success in (("qam_offline", 0.5), ("fql", 0.6)):
            for seed in (1, 2, 3):
                changes = {"env_id": f"cube-single-play-task{task}", "script": f"/x/{script}.py"}
                last = 20 if (task, script, seed) == (1, "fql", 2) else 100
                folder = tmp_path / f"{task}-{script}-{seed}"
                changes["seed"] = seed
                runs.append(write_run(folder, finished_run, last, success, **changes))
    runs.append(write_run(tmp_path / "new", finished_run, last=0, seed=4))
    text = make_report(tmp_path / "report", *runs)
    assert f"Left out, for it has no evaluation yet: {runs[-1]}" in text
    assert "FQL, seed 2: unfinished, at step 20 of 100; means beyond are without it." in text
    assert cells(text, "cube-single-play-task1", "FQL")[2:5] == [
        "100",
        "0.60 [0.60, 0.60]",
        "0.60, 0.60",
    ]
    assert "## By domain, at step 100" in text
    assert "## Over 2 tasks, at step 100" in text
    assert cells(text, "FQL")[1] == "**0.60 [0.60, 0.60]**"
    # A results.csv knows no last step; its seeds tell.
    again = make_report(tmp_path / "again", tmp_path / "report/results.csv")
    assert again.partition("## ")[2] == text.partition("## ")[2]
    assert "written: " in capsys.readouterr().out

    # All that is left of task 1 has been evaluated until step 20: so methods are compared there.
    shorter = write_run(tmp_path / "shorter", finished_run, 20, seed=1, offline_steps=20)
    longer = write_run(tmp_path / "longer", finished_run, tau=0.5)
    text = make_report(tmp_path / "two", shorter, longer)
    assert [row.split("|")[3].strip() for row in text.splitlines() if "| QAM " in row] == [
        "20",
        "20",
        "100",
    ]


def test_nothing_evaluated_is_said(finished_run, tmp_path, capsys):
    run = write_run(tmp_path / "run", finished_run, last=0)
    args = report.Args(runs=[run], output=tmp_path)
    assert "nothing has been evaluated yet" in refusal(capsys, report.main, args)


def test_what_differs(finished_run, tmp_path):
    """Other data does; what each script takes by itself does not; what was chosen does."""
    data = json.loads((finished_run / "args.json").read_text())["data"]
    other = {**data, "crcs": [[1, 2, 3]]}
    qam = write_run(tmp_path / "qam", finished_run, max_grad_norm=1.0)
    fql = {"script": str(ROOT / "baselines/fql.py"), "max_grad_norm": 1e12}
    fql = write_run(tmp_path / "fql", finished_run, **fql)
    assert "the runs differ" not in make_report(tmp_path / "report", qam, fql)
    chosen = write_run(tmp_path / "chosen", finished_run, max_grad_norm=5.0, tau=0.5, data=other)
    text = make_report(tmp_path / "report", qam, fql, chosen)
    assert "the runs differ in tau, max_grad_norm, data;" in text
    assert len({row["setting"] for row in read_rows(tmp_path / "report/results.csv")}) == 3


def test_online_runs_are_called_so(finished_run, tmp_path):
    runs = []
    for name in ("qam_offline_to_online", "fql_offline_to_online"):
        runs.append(write_run(tmp_path / name, finished_run, script=f"/x/{name}.py"))
    text = make_report(tmp_path / "report", *runs)
    assert "| QAM online |" in text
    assert "| FQL online |" in text


def read_fake(tmp_path, like, changes):
    runs = []
    for i, change in enumerate(changes):
        runs.append(write_run(tmp_path / f"run{i}", like, **change))
    return report.read_results(report.Args(runs=runs, output=tmp_path))


def test_long_labels_leave_room_for_the_plot(finished_run, tmp_path):
    changes = [{"tau": 0.1}, {"learning_rate": 0.1}, {"batch_size": 7}, {"hidden_dims": [9] * 9}]
    results = read_fake(tmp_path, finished_run, changes)
    styles = report.line_styles(results.names.values())
    task = next(iter(results.curves)).task
    figure = report.draw_success(results, [task], styles, False, "a long title " * 9)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_position().width > 0.7
    assert axes.get_position().height > 0.4
    for text in [figure._suptitle, *figure.legends[0].get_texts()]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_one_point_can_be_seen(finished_run, tmp_path):
    results = read_fake(tmp_path, finished_run, [{"last": 20}])
    styles = report.line_styles(results.names.values())
    task = next(iter(results.curves)).task
    figure = report.draw_success(results, [task], styles, False, "")
    assert "o" in [line.get_marker() for line in figure.axes[0].get_lines()]


def write_failures(folder, like, env_id, success=0.0):
    """A run's folder with returns of -900 and -321.12, and a behavior flow's of -1147.52."""
    run = write_run(folder, like, env_id=env_id)
    header = "step,seed,phase,success_rate,return,length\n"
    rows = f"50,1,offline,{success},-900,1\n100,1,offline,0.0,-321.12,1\n"
    (run / "eval.csv").write_text(header + rows)
    (run / "behavior.csv").write_text(header + "100,1,behavior,0.0,-1147.52,1\n")
    return run


def test_return_counts_where_nothing_is_said_of_success(finished_run, tmp_path):
    run = write_failures(tmp_path / "own", finished_run, "Pendulum-v1")
    text = make_report(tmp_path / "report", run)
    assert cells(text, "Pendulum-v1", "QAM")[3:7] == ["-", "-321.1", "-1148", "-321.1"]
    assert "![return over steps](return.png)" in text
    # What it has written, it reads, under whatever name.
    table = tmp_path / "report/results.csv"
    table.write_text(table.read_text().replace("Pendulum-v1", "mine"))
    again = make_report(tmp_path / "again", table)
    assert again == text.replace("Pendulum-v1", "mine")
    results = report.read_results(report.Args(runs=[run], output=tmp_path))
    styles = report.line_styles(results.names.values())
    (axes,) = report.draw_success(results, ["Pendulum-v1"], styles, False, "").axes
    assert axes.get_ylabel() == "return"
    assert axes.get_ylim()[0] < -1147.52 and axes.get_ylim()[1] < 0


def test_a_failure_is_a_failure_where_success_is_reported(finished_run, tmp_path):
    """On OGBench's tasks always, also if every run failed; on others if one run ever succeeded."""
    failed = write_failures(tmp_path / "failed", finished_run, "scene-play-task1")
    text = make_report(tmp_path / "a", failed)
    assert cells(text, "scene-play-task1")[3:7] == ["0.00", "0.00", "0.00", "-321.1"]
    assert "success.png" in text
    known = write_failures(tmp_path / "known", finished_run, "Mine-v0", success=0.5)
    text = make_report(tmp_path / "b", known)
    assert cells(text, "Mine-v0")[3:7] == ["0.00", "0.00", "0.00", "-321.1"]
    names = [name for name in gymnasium.registry if "-singletask-task1-" in name]
    assert names and all(name.startswith(report.OGBENCH) for name in names)


def test_marks_are_explained_if_they_are_there(finished_run, tmp_path):
    """And no words lie on others or are cut off."""
    changes = [{"seed": 1}, {"seed": 2, "last": 40}, {"seed": 1, "hidden_dims": [9] * 9}]
    results = read_fake(tmp_path, finished_run, changes)
    styles = report.line_styles(results.names.values())
    task = next(iter(results.curves)).task
    figure = report.draw_success(results, [task], styles, False, "")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    words = legend.get_title().get_text().replace("\N{NO-BREAK SPACE}", " ")
    assert [part.partition(":")[0].strip() for part in words.split(";")] == [
        "thick",
        "thin",
        "band",
        "cross",
    ]
    boxes = [legend.get_title().get_window_extent(), legend.get_texts()[0].get_window_extent()]
    boxes.insert(0, figure.axes[0].xaxis.label.get_window_extent())
    heights = [edge for box in boxes for edge in (box.y1, box.y0)]
    assert heights == sorted(heights, reverse=True) and heights[-1] > 0
    assert boxes[1].x0 > 0 and boxes[1].x1 < figure.bbox.width

    alone = read_fake(tmp_path / "alone", finished_run, [{}])
    assert report.meaning_of_marks(alone, list(alone.curves), False) == ""


def test_many_methods_have_a_panel_each(finished_run, tmp_path):
    changes = [{"tau": i / 10} for i in range(1, 9)]
    results = read_fake(tmp_path, finished_run, changes)
    args = report.Args(runs=[], output=tmp_path)
    task = next(iter(results.curves)).task
    assert report.draw_figures(args, results, [task]) == ["success.png"]
    figure = report.draw_one_by_one(results, task, False, "")
    titles = {axes.get_title() for axes in figure.axes}
    assert titles >= set(results.names.values())
    assert all(len(axes.get_lines()) >= 2 for axes in figure.axes[:8])  # QAM's, and its own


def test_any_title_in_any_locale(finished_run, tmp_path):
    run = write_run(tmp_path / "run", finished_run)
    line = [
        sys.executable,
        ROOT / "tools/report.py",
        run,
        "-o",
        tmp_path,
        "--title",
        r"$\foo$ größer",
    ]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(line, env={**os.environ, **plain}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert r"# $\foo$ größer" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_runs_that_differ_are_not_averaged(finished_run, tmp_path, capsys):
    other = shutil.copytree(finished_run, tmp_path / "other")
    args = report.Args(runs=[finished_run, other], output=tmp_path)
    words = refusal(capsys, report.main, args)
    assert f"{finished_run} and {other} are two runs of seed 1 with the same settings" in words
    record = json.loads((other / "args.json").read_text())
    record["tau"] = 0.5
    (other / "args.json").write_text(json.dumps(record))
    text = make_report(tmp_path, finished_run, other)
    assert "the runs differ in tau" in text
    assert "| QAM tau=0.5 | 60 |" in text
    assert "| QAM tau=0.005 | 60 |" in text


def test_what_can_not_be_read_is_said(tmp_path, capsys):
    args = report.Args(runs=[tmp_path], output=tmp_path)
    assert "is no run folder" in refusal(capsys, report.main, args)
    args.runs = []
    assert "no run folder" in refusal(capsys, report.main, args)
    args.runs = [tmp_path / "results.csv"]
    assert "can't be read" in refusal(capsys, report.main, args)


def test_the_papers_table(tmp_path):
    """QAM after a million steps: the figures that rliable 1.2.0 gives."""
    report.main(report.Args(runs=[], output=tmp_path, published_only=True))
    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| QAM |"))
    numbers = [float(word.strip("[],")) for word in row.split("|")[2].split()]
    assert numbers[0] == pytest.approx(0.3927, abs=1e-4)
    assert numbers[1:] == pytest.approx([0.3785, 0.4063], abs=0.002)


def test_the_papers_seeds_agree_with_the_paper(tmp_path):
    ours = write_published(tmp_path / "ours.csv", seeds=range(12))
    words = verdicts(make_report(tmp_path / "a", ours, published=True), "QAM")
    assert len(words) == 40
    assert not {"above", "below"} & set(words)
    assert words.count("agrees") > 30
    lower = write_published(tmp_path / "lower.csv", seeds=range(12), shift=-0.5)
    words = verdicts(make_report(tmp_path / "b", lower, published=True), "QAM")
    assert words.count("below") > 30
    text = make_report(tmp_path / "c", ours, published=True)
    assert "## By domain" in text
    assert "| QAM | **" in text
    assert (tmp_path / "c/aggregate.png").stat().st_size > 20_000


def test_few_seeds_tell_little():
    rng = np.random.default_rng(0)
    theirs = np.tile([0.0, 1.0], 6)
    assert report.verdict(*report.compare(rng, np.array([0.5]), theirs)).startswith("too few")
    tight = 0.9 + 0.01 * np.tile([-1.0, 1.0], 6)
    assert report.verdict(*report.compare(rng, np.array([0.9]), tight)) == "agrees"
    assert report.verdict(*report.compare(rng, np.array([0.5]), tight)) == "below"
    spread = 0.5 + 0.1 * np.tile([-1.0, 1.0], 6)
    _, low, high, needed = report.compare(rng, np.array([0.5, 0.5]), spread)
    assert high - low > 2 * report.CLOSE_ENOUGH
    error = 1.96 * spread.std(ddof=1) * np.sqrt(1 / needed + 1 / 12)
    assert error <= report.CLOSE_ENOUGH


def test_bootstrap_intervals_hold_the_mean():
    """Of 200 samples of a known mean, 5 % are missed; with 20 seeds, a few more."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        low, high = report.interval(report.resample(rng, rng.normal(size=20)).mean(axis=-1))
        missed += not low < 0 < high
    assert 5 <= missed <= 24


def test_aggregates_in_closed_form():
    assert report.interquartile_mean(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == 3.5
    first = [np.array([1.0, 0.5]), np.array([0.0])]
    second = [np.array([0.5, 0.0]), np.array([0.0])]
    assert report.probability_of_improvement(first, second) == (3.5 / 4 + 0.5) / 2
