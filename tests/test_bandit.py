"""experiments/bandit.py and docs/bandit.ipynb: what a class runs first."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from dev import make_notebook
from experiments import bandit, closed_form

needs_jupyter = pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None,
    reason="no nbclient and ipykernel: uv pip install nbclient ipykernel ipywidgets",
)


def density(actions, means, std, weights):
    """Of a mixture of Gaussians: actions (n, 2) -> (n,)."""
    squares = ((actions[:, None] - means) ** 2).sum(axis=-1)  # (n, 4)
    return np.exp(-squares / (2 * std**2)) @ weights / (2 * np.pi * std**2)


@pytest.mark.parametrize("inv_temp", [0.0, 0.5, 1.0, 3.0])
def test_optimum_is_behavior_times_exp_q(inv_temp):
    """On a grid that holds all of it, as densities."""
    line = np.linspace(-2, 2, 201)
    actions = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    behavior = density(actions, bandit.MEANS, bandit.STD, np.ones(4) / 4)
    weighted = behavior * np.exp(inv_temp * bandit.value(actions))
    area = (line[1] - line[0]) ** 2
    expected = weighted / (weighted.sum() * area)
    np.testing.assert_allclose(density(actions, *bandit.optimum(inv_temp)), expected, atol=1e-9)


def test_distance_is_that_of_the_results():
    rng = np.random.default_rng(0)
    data = bandit.draw(rng, bandit.MEANS, bandit.STD, np.ones(4) / 4)
    target = bandit.draw(rng, *bandit.optimum(1.0))
    expected = closed_form.mmd(data, target)
    assert float(bandit.distance(data, target)) == pytest.approx(expected, abs=1e-5)


def run_bandit(folder, *flags):
    """Of a copy that has nothing of the project but qam_offline.py."""
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "qam_offline.py", folder)
    shutil.copy(ROOT / "experiments/bandit.py", folder / "experiments")
    line = [sys.executable, "experiments/bandit.py", *flags]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True)


def distances(text):
    return {name: float(x) for name, x in re.findall(r"target, (.*): (\d\.\d+)$", text, re.M)}


@pytest.mark.slow
def test_a_short_run(tmp_path):
    """The policy comes near: at T = 5 and after 300 updates not as near as by default."""
    done = run_bandit(tmp_path, "--flow-steps", "5", "--steps", "300", "--inv-temp", "1.5")
    assert done.returncode == 0, done.stderr
    found = distances(done.stdout)
    assert found["target, drawn again"] < 0.005
    assert found["data"] > 0.3
    assert found["policy, T = 5"] < 0.5 * found["data"]
    assert re.search(r"^T = 5: 300 updates in \d+ s$", done.stdout, re.M)
    assert (tmp_path / "bandit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags", [{"flow_steps": (10, 1)}, {"flow_steps": ()}, {"inv_temp": np.nan}, {"steps": 0}]
)
def test_numbers_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit) as end:
        bandit.run(bandit.Args(**flags))
    assert end.value.code == 2
    assert "error: --inv-temp must be 0 or more, --steps 1 or more" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(tmp_path):
    """Told before the training."""
    done = run_bandit(tmp_path, "--output", "no/bandit.png")
    assert done.returncode == 2
    assert "error: --output no/bandit.png can't be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "updates" not in done.stdout


def test_a_class_can_read_it():
    assert len((ROOT / "experiments/bandit.py").read_text().splitlines()) <= 150


# ------------------------------------------------------------------------------------ the notebook


def test_cells_are_those_of_the_program():
    stored = json.loads(make_notebook.PATH.read_text())
    made = json.loads(make_notebook.make_notebook())
    sources = [[cell["source"] for cell in notebook["cells"]] for notebook in (stored, made)]
    assert sources[0] == sources[1], "python dev/make_notebook.py writes it anew"
    # Nothing of the program is lost.
    kept = "".join("".join(source) + "\n" for source in sources[0])
    lines = (ROOT / "experiments/bandit.py").read_text().partition("\nif __name__")[0].splitlines()
    lost = [line for line in lines if line.replace("# %% ", "## ") not in kept]
    first, *imports = lost
    assert first.startswith('"""QAM') and len(imports) == 3
    assert all(
        word in line for word, line in zip(("tyro", "__file__", "noqa"), imports, strict=True)
    )


def test_an_address_opens_it_in_colab():
    text = make_notebook.make_notebook("someone/qam")
    assert "github/someone/qam/blob/main/docs/bandit.ipynb" in text
    assert "raw.githubusercontent.com/someone/qam/main" in text


def execute(notebook, folder):
    """What the cells print, and how many pictures they show."""
    import nbclient

    resources = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(notebook, timeout=200, resources=resources)
    # What a widget shows is the cell's output then. nbclient's stand-in for it sends on the socket
    # that waits for the kernel's reply, which may be missed for ever (nbclient's issue 312).
    client.widget_registry = {}
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    return printed, sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.fixture
def notebook():
    """As it is, but for shorter runs."""
    import nbformat

    text = make_notebook.PATH.read_text()
    assert "steps=1000" in text and "IntSlider(1000" in text
    text = text.replace("steps=1000", "steps=300").replace("IntSlider(1000", "IntSlider(300")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.slow
@needs_jupyter
def test_sliders(notebook):
    """It trains at once, and again when a slider is moved."""
    import nbformat

    pytest.importorskip("ipywidgets")
    move = "sliders.widget.children[0].value = 2.0"
    notebook.cells.append(nbformat.v4.new_code_cell(move))
    printed, pictures = execute(notebook, ROOT / "docs")
    assert pictures == 2  # of the first value and of the second, which is printed last
    rng = np.random.default_rng(0)
    data = bandit.draw(rng, bandit.MEANS, bandit.STD, np.ones(4) / 4)
    target = bandit.draw(rng, *bandit.optimum(2.0))
    found = distances(printed)
    assert found["data"] == pytest.approx(float(bandit.distance(data, target)), abs=1e-4)
    assert found["policy, T = 10"] < 0.8 * found["data"]


@pytest.mark.slow
@needs_jupyter
def test_without_sliders_and_away_from_the_project(notebook, tmp_path):
    """qam_offline.py comes from the address, and without ipywidgets the call is plain."""
    import nbformat

    notebook.cells.insert(
        0, nbformat.v4.new_code_cell("import sys\nsys.modules['ipywidgets'] = None")
    )
    for cell in notebook.cells:
        cell.source = cell.source.replace('ADDRESS = ""', f'ADDRESS = "{ROOT.as_uri()}"')
    (tmp_path / "docs").mkdir()
    printed, pictures = execute(notebook, tmp_path / "docs")
    assert (tmp_path / "docs/qam_offline.py").exists()
    assert pictures == 1
    found = distances(printed)
    assert found["policy, T = 10"] < 0.8 * found["data"]


@pytest.mark.slow
@needs_jupyter
def test_without_an_address_one_is_told_what_to_do(notebook, tmp_path):
    with pytest.raises(Exception, match="put qam_offline.py beside this notebook"):
        execute(notebook, tmp_path)
