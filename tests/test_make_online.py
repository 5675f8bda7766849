"""tools/make_online.py: the online version of every script, and of one that a user has edited."""

import ast
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, folder_of, read_rows, read_states, resume, run
from refusals import refusal
from stopping import (
    assert_same_rows,
    assert_same_states,
    has_learned,
    has_online_rows,
    start,
    stop,
    wait_for,
)

from dev import sync_shared
from tools import make_online

pytestmark = pytest.mark.usefixtures("fast_compilation")

SCRIPTS = [path for path in sync_shared.find_scripts(ROOT) if path != sync_shared.ONLINE]

# What a user may change: another loss with a flag of its own, a metric, a network and a schedule.
EDITS = {
    "    inv_temp: float | None = None": (
        "    clip_residual: float = 3.0  # limit on a residual of (6)\n"
        "    inv_temp: float | None = None"
    ),
    "    residual = difference / sigma + sigma * adjoints\n": (
        "    residual = difference / sigma + sigma * adjoints\n"
        "    residual = jnp.clip(residual, -100.0, 100.0)\n"
    ),
    '"adjoint_loss": matching_loss}\n': (
        '"adjoint_loss": matching_loss}\n    metrics["adjoint"] = jnp.abs(adjoints).mean()\n'
    ),
    "x = nn.gelu(dense(width)(x), approximate=True)": "x = nn.silu(dense(width)(x))",
    "optax.adam(args.learning_rate)": "optax.adamw(args.learning_rate)",
}


def make(script, *flags):
    line = [sys.executable, ROOT / "tools/make_online.py", script, *flags]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A copy of qam_offline.py under a name of its own, edited."""
    text = (ROOT / "qam_offline.py").read_text()
    for old, new in EDITS.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("mine") / "my_method.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def online_scripts(edited, tmp_path_factory):
    """{script: its online version}"""
    folder = tmp_path_factory.mktemp("made")
    made = {"edited": edited.with_name("my_method_offline_to_online.py")}
    done = make(edited)
    assert done.returncode == 0, done.stderr
    for script in SCRIPTS:
        name = script.replace("/", "_").removesuffix(".py")
        made[script] = folder / f"{name}_offline_to_online.py"
        done = make(ROOT / script, "-o", made[script])
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("script", [*SCRIPTS, "edited"])
def test_made_file_has_the_algorithm_and_the_phase(script, online_scripts, edited):
    """Every definition is the script's or, where the online phase changes it, that of the phase."""
    text = online_scripts[script].read_text()
    compile(text, script, "exec")
    origin = edited if script == "edited" else ROOT / script
    merged = sync_shared.sources(text)
    own = sync_shared.sources(origin.read_text())
    offline = sync_shared.sources((ROOT / sync_shared.FIRST).read_text())
    online = sync_shared.sources((ROOT / sync_shared.ONLINE).read_text())
    names = (own.keys() | online.keys()) - {sync_shared.BLOCK}
    assert {"train_online", "policy_loss"} < names
    for name in names:
        if name not in offline:
            assert merged[name] == own.get(name, online.get(name))
        elif own.get(name) == offline[name]:
            assert merged[name] == online[name]
        elif online[name] == offline[name]:
            assert merged.get(name) == own.get(name)
    # Args is changed by both: it has all flags of both.
    own_flags = flags_of(origin.read_text())
    # Of what qam_offline.py has, the script may lack some.
    lacking = flags_of((ROOT / sync_shared.FIRST).read_text()) - own_flags
    online_flags = flags_of((ROOT / sync_shared.ONLINE).read_text())
    assert flags_of(text) == (own_flags | online_flags) - lacking


def flags_of(text):
    """The names of the fields of Args."""
    (args,) = [node for node in ast.parse(text).body if getattr(node, "name", None) == "Args"]
    return {field.target.id for field in args.body if isinstance(field, ast.AnnAssign)}


def test_made_from_qam_offline_it_is_qam_offline_to_online(online_scripts):
    made = online_scripts["qam_offline.py"].read_text()
    _, _, text = made.partition("\n")
    assert text == (ROOT / "qam_offline_to_online.py").read_text()


@pytest.mark.slow
def test_both_phases_of_an_edited_copy_run(online_scripts, dataset_dir, tmp_path):
    flags = "--online-steps 300 --start-training 40 --eval-every 180 --log-every 60".split()
    done = run(online_scripts["edited"], dataset_dir, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    folder = folder_of(tmp_path)
    evals = [(row["step"], row["phase"]) for row in read_rows(folder / "eval.csv")]
    assert evals == [("60", "offline"), ("180", "online"), ("360", "online")]
    metrics = read_rows(folder / "metrics.csv")
    assert "adjoint" in metrics[-1]  # which the edit adds
    assert np.isfinite([float(value) for row in metrics for value in row.values()]).all()
    states = read_states(folder)
    assert len(states["online"]["rewards"]) == 300
    assert states["step"][0] > 60 + 200


@pytest.mark.slow
def test_rlpd_runs_online_alone(online_scripts, dataset_dir, tmp_path):
    """From its first step, half of each batch from the data; and stopped and gone on with."""
    script = online_scripts["baselines/rlpd.py"]
    flags = "--offline-steps 0 --balanced-sampling --bc-alpha 0.1 --online-steps 300"
    flags += " --start-training 40 --eval-every 150 --log-every 100 --checkpoint-minutes 0.002"
    run_dir = tmp_path / "runs"
    process = start(script, dataset_dir, run_dir, *flags.split())
    wait_for(has_online_rows, run_dir, process)
    stop(process, signal.SIGKILL)
    folder = folder_of(run_dir)
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    evals = [(row["step"], row["phase"]) for row in read_rows(folder / "eval.csv")]
    assert evals == [("150", "online"), ("300", "online")]
    states = read_states(folder)
    assert len(states["online"]["rewards"]) == 300
    assert states["step"][0] > 150
    assert float(read_rows(folder / "metrics.csv")[-1]["bc_loss"]) != 0


@pytest.mark.slow
def test_killed_in_the_offline_phase(online_scripts, dataset_dir, tmp_path):
    """TRQAM's lambda and its average are part of the state; while pretraining, they stand still."""
    script = online_scripts["variants/trqam.py"]
    flags = "--pretrain-steps 400 --offline-steps 1600 --online-steps 100 --start-training 40"
    flags += " --log-every 100 --eval-every 800 --checkpoint-minutes 0.002 --eval-episodes 1"
    flags = [*flags.split(), "--eval-envs", "1", "--kl-budget", "0.1"]
    done = run(script, dataset_dir, tmp_path / "never_killed", *flags)
    assert done.returncode == 0, done.stderr
    never_killed = folder_of(tmp_path / "never_killed")
    rows = read_rows(never_killed / "metrics.csv")
    assert [row["step"] for row in rows][:5] == ["-300", "-200", "-100", "0", "100"]
    assert {row["lambda"] for row in rows[:4]} == {"1.0"}
    assert "1.0" not in {row["lambda"] for row in rows[4:]}

    run_dir = tmp_path / "killed"
    process = start(script, dataset_dir, run_dir, *flags)
    wait_for(partial(has_learned, first_step=-400), run_dir, process)
    stop(process, signal.SIGKILL, longest_wait=0.5)
    killed = folder_of(run_dir)
    assert not has_online_rows(killed)
    done = resume(killed)
    assert done.returncode == 0, done.stderr
    assert_same_states(never_killed, killed)
    assert_same_rows(never_killed, killed, "metrics.csv", "eval.csv")


# -------------------------------------------------------------------------------------- refusals


def test_conflict_is_told_with_both_sides(tmp_path):
    """The user's file changes a line that the online phase changes, too."""
    text = (ROOT / "qam_offline.py").read_text()
    line = "        num_starts = len(dataset.rewards) - args.horizon + 1\n"
    assert line in text
    mine = tmp_path / "mine.py"
    mine.write_text(text.replace(line, "        num_starts = 7\n"))
    done = make(mine)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"error: {mine} and the online phase change the same lines, in 1")
    assert "away from them" in sentence
    sides = re.split("^---- .*\n", done.stdout, flags=re.M)
    assert len(sides) == 4
    before, online, own = sides[1:]
    assert line in before
    assert "sample_starts(args" in online
    assert own.startswith("        num_starts = 7\n")
    assert list(tmp_path.iterdir()) == [mine]


def test_file_that_was_not_made_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "baselines/fql.py").read_text())
    notes = tmp_path / "mine_offline_to_online.py"
    notes.write_text("notes\n")
    assert "not made by this tool" in refusal(capsys, make_online.main, make_online.Args(mine))
    assert notes.read_text() == "notes\n"

    notes.unlink()
    make_online.main(make_online.Args(mine))
    made = notes.read_text()
    mine.write_text(mine.read_text().replace('"""Flow Q-Learning', '"""My Q-Learning'))
    make_online.main(make_online.Args(mine))
    assert notes.read_text() == made.replace('"""Flow Q-Learning', '"""My Q-Learning')
    words = refusal(capsys, make_online.main, make_online.Args(notes))
    assert "is an online version already" in words


def test_edit_of_qam_offline_itself_is_told(tmp_path):
    """It would be on both sides of the merge, and get lost."""
    project = tmp_path / "project"
    for name in ("tools", "dev"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("qam_offline.py", "qam_offline_to_online.py"):
        shutil.copy(ROOT / name, project)
    offline = project / "qam_offline.py"
    offline.write_text(offline.read_text().replace("optax.adam(", "optax.adamw("))
    mine = shutil.copy(offline, tmp_path / "mine.py")
    line = [sys.executable, project / "tools/make_online.py", mine]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "qam_offline.py itself was edited (make_optimizer)" in done.stderr
    assert list(tmp_path.glob("*_online.py")) == []


def test_places_and_files_that_do_not_fit(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    text = (ROOT / "baselines/fql.py").read_text()
    mine.write_bytes(text.replace("\n", "\r\n").encode())
    assert "line ends of Windows" in refusal(capsys, make_online.main, make_online.Args(mine))
    mine.write_text(text)
    for folder in (tmp_path / "nowhere", mine):
        args = make_online.Args(mine, folder / "made.py")
        assert "there is no folder" in refusal(capsys, make_online.main, args)
    args = make_online.Args(ROOT / "tools/evaluate.py")
    assert "did not begin as a copy" in refusal(capsys, make_online.main, args)


@pytest.mark.parametrize("content", [None, "def half(:\n", "\0"])
def test_file_that_is_no_script_is_told(content, tmp_path, capsys):
    script = tmp_path / "script.py"
    if content is not None:
        script.write_text(content)
    words = refusal(capsys, make_online.main, make_online.Args(script))
    assert f"{script} can't be read" in words
