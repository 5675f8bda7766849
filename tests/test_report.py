"""tools/report.py: on a real run, and on the paper's own curves."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import read_rows
from refusals import refusal

from tools import report

TASK = "scene-play-task{}"


def make_report(output, *runs, **options):
    """The text of report.md."""
    report.main(report.Args(runs=list(runs), output=output, **options))
    return (output / "report.md").read_text()


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
    assert "seed 1: unfinished, at step 60 of 90." in make_report(tmp_path / "report", run)
    (tmp_path / "exit").write_text("1")
    assert "seed 1: failed, at step 60 of 90." in make_report(tmp_path / "report", run)


def test_runs_that_differ_are_not_averaged(finished_run, tmp_path, capsys):
    other = shutil.copytree(finished_run, tmp_path / "other")
    args = report.Args(runs=[finished_run, other], output=tmp_path)
    assert "two runs of seed 1 have the same settings" in refusal(capsys, report.main, args)
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
