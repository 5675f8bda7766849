"""docs/own_data.md: its script makes data, and its patch makes qam_offline.py run on them."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, folder_of, read_rows

NAME = "MountainCarContinuous-v0"


def block(language):
    """The page's only code block of a language."""
    page = (ROOT / "docs/own_data.md").read_text()
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return text


def execute(line, folder):
    """Run a command there; it has to succeed."""
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader has after the first two sections: the data, and the script as patched."""
    folder = tmp_path_factory.mktemp("own_data")
    (folder / "data").mkdir()
    (folder / "data/make_data.py").write_text(block("python"))
    execute([sys.executable, "data/make_data.py"], folder)
    shutil.copy(ROOT / "qam_offline.py", folder / "mountain_car.py")
    (folder / "own_data.patch").write_text(block("diff"))
    execute(["git", "apply", "own_data.patch"], folder)
    return folder


def test_data_are_what_the_page_says(folder):
    data = np.load(folder / f"data/{NAME}.npz")
    num_rows = len(data["rewards"])
    for name, size in {"observations": 2, "actions": 1, "next_observations": 2}.items():
        assert data[name].shape == (num_rows, size)
    assert np.abs(data["actions"]).max() <= 1
    assert data["terminals"].sum() == 100
    assert data["terminals"][-1] == 1
    # An episode that ended for good is a terminal; one that was cut short keeps its mask.
    solved = data["masks"] == 0
    assert 0 < solved.sum() < 100
    assert data["terminals"][solved].all()
    inside = data["terminals"][:-1] == 0
    following = data["observations"][1:]
    np.testing.assert_array_equal(data["next_observations"][:-1][inside], following[inside])


def test_patched_script_trains_and_is_scored(folder):
    flags = [
        *TINY,
        "--env-id",
        NAME,
        "--dataset-dir",
        "data",
        "--flow-steps",
        "2",
        "--eval-every",
        "60",
    ]
    execute([sys.executable, "mountain_car.py", *flags], folder)
    rows = read_rows(folder_of(folder / "runs") / "eval.csv")
    assert [row["step"] for row in rows] == ["60"]
    for row in rows:
        assert float(row["length"]) <= 999
        assert row["success_rate"] in ("0.0", "0.5", "1.0")
        # The goal gives 100, and a step costs at most 0.1.
        least = 100 * float(row["success_rate"]) - 0.1 * float(row["length"])
        assert float(row["return"]) >= least - 1e-3


def test_patched_script_names_an_environment_that_is_not_there(folder):
    line = [sys.executable, "mountain_car.py", "--env-id", "MountainCarContinuos-v0"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean" in done.stdout + done.stderr
