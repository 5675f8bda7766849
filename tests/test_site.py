"""The site builds without a warning, and its pages open from the file system in a browser."""

import csv
import html
import json
import os
import re
import shutil
import subprocess

import pytest
import test_figure
from conftest import ROOT

from dev import sync_shared

# An interpreter with what docs/requirements.txt lists, and playwright: .ci/run makes one.
DOCS_PYTHON = os.environ.get("DOCS_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DOCS_PYTHON is None or shutil.which("chromium") is None,
        reason="no DOCS_PYTHON with mkdocs and playwright, or no Chromium",
    ),
]
SCRIPTS = sync_shared.find_scripts(ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    line = [DOCS_PYTHON, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def drive(program, site):
    line = [DOCS_PYTHON, ROOT / "dev" / program, site]
    return subprocess.run(line, capture_output=True, text=True)


def page_of(script, ending=".html"):
    return "scripts/" + script.replace("/", "_").replace(".py", ending)


def text_of(source):
    return html.unescape(re.sub("<[^>]*>", "", source))


def test_pages_in_a_browser(site):
    done = drive("check_site.py", site)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_sees_faults(site, tmp_path):
    """On two pages, with one of each."""
    broken = shutil.copytree(site, tmp_path / "site")
    kept = {"choices.html", "baselines_fql_beside.html"}
    for page in broken.rglob("*.html"):
        if page.name not in kept:
            page.unlink()
    page = broken / "choices.html"
    faults = (
        '<img src="https://example.org/picture.png">'
        '<div style="width: 2000px">wide</div>'
        "<p>P<em>(x) and P</em>(y)</p>"
        rf'<div class="arithmatex">\[{"x + " * 50}x\]</div>'
        r'<p><span class="arithmatex">\(\no\)</span></p>'
        f'<div class="language-bash"><pre><code>{"run " * 50}</code></pre></div></article>'
    )
    page.write_text(page.read_text().replace("</article>", faults))
    css = broken / "assets/site.css"
    narrow = ".beside table { min-width: 0 } .language-bash code { white-space: pre !important }"
    css.write_text(css.read_text() + narrow)
    done = drive("check_site.py", broken)
    assert done.returncode == 1
    for words in (
        "asks for https://example.org/picture.png",
        "choices.html at 400: html is 20",
        "choices.html at 400: div is 1",
        "emphasis within a word: (x) and P",
        "KaTeX parse error",
        "choices.html at 1280: command is cut: run run",
        "baselines_fql_beside.html at 400: a column shows fewer than 80 characters",
    ):
        assert words in done.stdout


@pytest.fixture(scope="module")
def shown(site):
    """What the site shows to one who uses it."""
    done = drive("drive_site.py", site)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_search_and_copy(shown):
    assert any("lesson/5_adjoint.html" in link for link in shown["found"])
    assert "python tools/report.py runs/pointmaze-*" in shown["copied"]


def test_the_figure_by_keys_and_mouse(shown):
    """Each control changes what it should, and the numbers shown are qam_offline.py's."""
    states = shown["figure"]
    controls = {name: (s["invTemp"], s["T"], s["play"]) for name, s in states.items()}
    assert controls["loaded"] == (1.0, 10, "Play")
    assert controls["inv_temp by keys"] == (1.5, 10, "Play")
    assert controls["T by keys"] == (1.5, 6, "Play")
    assert states["time by keys"]["time"] == 0
    assert controls["playing"] == (1.5, 6, "Stop")
    assert 0 < states["playing"]["time"] < 6
    assert controls["played"] == (1.5, 6, "Play")
    assert states["played"]["time"] == 6
    assert states["other noise"]["noise"] != states["played"]["noise"]
    assert "through the plain steps" in states["backpropagation"]["numbers"]
    pictures = [state["picture"] for state in states.values()]
    assert len(set(pictures)) == len(pictures) - 1  # played to the end, it is as it was
    for state in states.values():
        test_figure.check(state, state["invTemp"], state["noise"])
        loss = re.search(r"L_AM .*: ([\d.]+)$", state["numbers"])[1]
        assert float(loss) == pytest.approx(state["loss"], abs=6e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_page_of_a_script_holds_it(site, script):
    """Every line, numbered; above, the docstring without Markdown's escapes."""
    source = (site / page_of(script)).read_text()
    head, _, whole = source.partition('id="the-whole-file"')
    assert not re.search(r"\\[*_<]", text_of(head.partition("<article")[2]))
    lines = re.findall(r'<span id="line-file-(\d+)">(.*?)\n', whole)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert [text_of(line) for _, line in lines] == SCRIPTS[script].splitlines()


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {sync_shared.FIRST}))
def test_difference_holds_what_is_new(site, script):
    """On the right, every line that its nearest does not have."""
    source = (site / page_of(script, "_beside.html")).read_text()
    cells = re.findall(r'id="to\d+_\d+">\d+</td><td>(.*?)</td>', source)
    named = re.search(r"^Nearest: (.*)\.$", SCRIPTS[script], re.M)
    nearest = SCRIPTS[named[1] if named else sync_shared.FIRST].splitlines()
    own = set(SCRIPTS[script].splitlines()) - set(nearest)
    assert own <= {text_of(cell) for cell in cells}


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_of_a_script_are_the_runs(site, script):
    """The steps that the page names are the CSV file's, and so are the numbers of these steps."""
    curves = {}
    with (ROOT / "results/metrics/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if script.split("/")[-1] == row["script"]:
                curves.setdefault(row["metric"], {})[row["step"]] = float(row["value"])
    source = (site / page_of(script)).read_text()
    _, _, section = source.partition('id="what-it-logs"')
    if not curves:
        assert not section
        return
    sentence = re.search(r"Success of its evaluations: (.*)\.</p>", section)[1].replace(",", "")
    successes = dict(re.findall(r"[\d.]+ at (\d+)()", sentence))
    assert successes.keys() == curves["success_rate"].keys()
    for value, step in re.findall(r"([\d.]+) at (\d+)", sentence):
        assert float(value) == pytest.approx(curves["success_rate"][step], abs=0.005)
    table = re.search("<table>.*?</table>", section, re.S)[0]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    (_, first, half, late), *rows = [row for row in rows if row]
    first, half, begin, end = re.findall(r"\d+", f"{first} {half} {late}".replace(",", ""))
    assert first == min(curves["critic_loss"], key=int)
    assert {text_of(row[0]) for row in rows} == curves.keys() - {"success_rate"}
    for name, *values in rows:
        curve = curves[text_of(name)]
        last = [curve[step] for step in curve if int(begin) <= int(step) <= int(end)]
        expected = (curve[first], curve[half], sum(last) / len(last))
        assert [float(value) for value in values] == pytest.approx(expected, rel=0.01)
