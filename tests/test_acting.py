"""Flags that only act: which script acts by which, what is refused, and the figure of them.

tests/test_own_data.py scores a run in many ways.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import DOMAIN
from refusals import refusal

import qam_offline as qam
from tools import evaluate, report

# One of each way of acting. Compiling is four seconds a script: these with the README's test
# command, the others with -m slow.
FAST = ["qam_offline.py", "baselines/qgf.py"]
SLOW = ["baselines/fql.py", "baselines/ifql.py", "baselines/rebrac.py", "baselines/dsrl.py"]
SLOW.append("qam_diffusion_variant.py")
MARKED = [*FAST, *(pytest.param(script, marks=pytest.mark.slow) for script in SLOW)]
WITHOUT_FLOW = ("qam_diffusion_variant", "fql", "rebrac")


@pytest.fixture(scope="module")
def env():
    return qam.ChunkedEpisode(qam.make_env(qam.Args(env_id=DOMAIN)))


def fresh_run(script, env, **changes):
    """A run of a script that has learned nothing: its parameters are 0."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    sizes = {"hidden_dims": (8,), "num_critics": 2, "horizon": 2}
    for name in ("flow_steps", "diffusion_steps"):
        if hasattr(module.Args, name):
            sizes[name] = 2
    args = module.Args(env_id=DOMAIN, **sizes, **changes)
    dims = env.observation_space.shape + env.env.action_space.shape
    networks = module.make_networks(args, *dims)
    init = partial(module.init_state, args, networks, *dims)
    shapes = jax.eval_shape(init, jax.random.key(0))
    states = {"params": shapes.params, "target_params": shapes.target_params}
    states = jax.tree.map(lambda x: np.zeros((1, *x.shape)), states)
    return evaluate.Run(Path(script), {}, module, args, states, env, networks)


@pytest.mark.parametrize("script", MARKED)
def test_flags_that_a_script_acts_by(script, env):
    """best_of_n counts where something is drawn: ReBRAC has no noise on the maze."""
    name = Path(script).stem
    expected = {"best_of_n", "flow_steps"}
    if name in WITHOUT_FLOW:
        expected.remove("flow_steps")
    if name == "rebrac":
        expected.remove("best_of_n")
    if name == "qgf":
        expected.add("guidance_weight")
    run = fresh_run(script, env)
    assert {flag for flag in evaluate.ACTING if evaluate.acts_by(run, flag)} == expected


@pytest.mark.slow
def test_it_depends_on_the_run(env):
    run = fresh_run("baselines/rebrac.py", env, actor_noise=0.2)
    assert evaluate.acts_by(run, "best_of_n")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"guidance_weight": (0.0, 0.1)}, "qam_offline.py does not act by --guidance-weight"),
        ({"best_of_n": (1, 0)}, "--best-of-n must be positive, not 0"),
        ({"flow_steps": ()}, "--flow-steps needs one value or more"),
    ],
)
def test_ways_that_are_refused(flags, words, finished_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = evaluate.Args(runs=[finished_run], **flags)
    assert words in refusal(capsys, evaluate.ways_of_acting, args, finished_run)


@pytest.mark.parametrize("flags", [{"best_of_n": (2,)}, {"output": Path("scores.csv")}])
def test_the_behavior_flow_is_scored_as_it_is(flags, capsys):
    args = evaluate.Args(runs=[Path("run")], behavior=True, **flags)
    name = next(iter(flags)).replace("_", "-")
    assert f"leave out --{name}\n" in refusal(capsys, evaluate.check_flags, args)


@pytest.mark.parametrize("words", [["--tau", "0.1", "0.2"], ["--tau=0.1"]])
def test_flags_of_training_are_refused_by_name(words, finished_run, capsys, monkeypatch):
    """Before or after the run; what no script has is for tyro to tell."""
    for line in ([finished_run, *words], [*words, finished_run]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, line)])
        sentence = refusal(capsys, evaluate.parse_args)
        assert sentence.startswith("error: --tau does more than act")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(finished_run), "--episods", "1"])
    assert "--episodes" in refusal(capsys, evaluate.parse_args)


def write_scores(path, seed, script="qam_offline", weights=("",)):
    """A file as of evaluate.py -o: success is 0.1 best_of_n + 0.01 flow_steps + 0.02 seed."""
    rows = []
    for best_of_n in (1, 4):
        for flow_steps in (20, 5, 10):
            for weight in weights:
                way = {"best_of_n": best_of_n, "flow_steps": flow_steps, "guidance_weight": weight}
                success = 0.1 * best_of_n + 0.01 * flow_steps + 0.02 * seed
                row = dict.fromkeys(evaluate.COLUMNS, 0)
                row.update(way, env_id="maze", script=script, seed=seed, success_rate=success)
                rows.append(row)
    evaluate.write_rows(path, rows, evaluate.COLUMNS)
    return path


def test_success_over_the_flags(tmp_path):
    """The flag with most values is the axis, in order; curves are means over seeds."""
    files = [write_scores(tmp_path / f"{seed}.csv", seed) for seed in (1, 3)]
    files.append(write_scores(tmp_path / "qgf.csv", 1, "qgf", (0, 0.02, 0.1, 1)))
    report.main(report.Args(runs=files, output=tmp_path / "report"))
    assert (tmp_path / "report/acting.png").stat().st_size > 10_000
    text = (tmp_path / "report/report.md").read_text()
    assert "| maze | QAM | 4 | 20 |  | 0.64 | 1: 0.62, 3: 0.66 |" in text

    qam_axes, qgf_axes = report.draw_acting(report.read_acting(files), "").axes
    assert qam_axes.get_xlabel() == "flow_steps"
    assert [label.get_text() for label in qam_axes.get_xticklabels()] == ["5", "10", "20"]
    means = [line.get_ydata() for line in qam_axes.get_lines() if line.get_alpha() is None]
    assert means == [pytest.approx([0.19, 0.24, 0.34]), pytest.approx([0.49, 0.54, 0.64])]
    assert qgf_axes.get_xlabel() == "guidance_weight"
    names = [text.get_text() for text in qgf_axes.texts]
    assert sorted(names)[-1] == "best_of_n 4 flow_steps 5"
    assert len(names) == 6


def test_scores_that_can_not_be_drawn(tmp_path, finished_run, capsys):
    one = write_scores(tmp_path / "one.csv", 1)
    other = write_scores(tmp_path / "other.csv", 1)
    args = report.Args(runs=[one, other], output=tmp_path / "report")
    assert "QAM has two runs of seed 1" in refusal(capsys, report.main, args)
    args.runs = [one, finished_run]
    assert "report it alone" in refusal(capsys, report.main, args)
    evaluate.write_rows(one, [], evaluate.COLUMNS)
    args.runs = [one]
    assert "nothing has been scored yet" in refusal(capsys, report.main, args)
