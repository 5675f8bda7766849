"""The site builds without a warning, and its pages open from the file system in a browser."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    line = [DOCS_PYTHON, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def check(site):
    line = [DOCS_PYTHON, ROOT / "dev/check_site.py", site]
    return subprocess.run(line, capture_output=True, text=True)


def test_pages_in_a_browser(site):
    done = check(site)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_sees_faults(site, tmp_path):
    """On one page, with one of each."""
    broken = shutil.copytree(site, tmp_path / "site")
    for page in broken.rglob("*.html"):
        if page.name != "choices.html":
            page.unlink()
    page = broken / "choices.html"
    faults = (
        '<img src="https://example.org/picture.png">'
        '<div style="width: 2000px">wide</div>'
        '<a href="nowhere.html">a</a><a href="#nowhere">b</a>'
        "<script>throw Error('a fault')</script></article>"
    )
    page.write_text(page.read_text().replace("</article>", faults))
    done = check(broken)
    assert done.returncode == 1
    for words in (
        "asks for https://example.org/picture.png",
        "choices.html at 390: is 20",
        "nowhere.html is not there",
        "choices.html#nowhere has no such place",
        "a fault",
    ):
        assert words in done.stdout


def test_the_figure_by_keys_and_mouse(site):
    """Each control changes what it should, and the numbers shown are qam_offline.py's."""
    line = [DOCS_PYTHON, ROOT / "dev/drive_figure.py", site]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
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


def text_of(source):
    return html.unescape(re.sub("<[^>]*>", "", source))


def test_pages_of_scripts_hold_the_scripts(site):
    """Every line, numbered, and in the difference every line that its nearest does not have."""
    scripts = sync_shared.find_scripts(ROOT)
    for path, text in scripts.items():
        page = site / "scripts" / path.replace("/", "_").replace(".py", ".html")
        source = page.read_text()
        difference, _, whole = source.partition('id="the-whole-file"')
        lines = re.findall(r'<span id="line-(\d+)">(.*?)\n', whole)
        assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
        code = [re.sub(r"^ *\d+", "", text_of(line)) for _, line in lines]
        assert [line.strip() for line in code] == [line.strip() for line in text.splitlines()]
        if path != sync_shared.FIRST:
            right = re.findall(r'<pre class="after">(.*?)</pre>', difference, re.S)
            shown = text_of("\n".join(right)).splitlines()
            named = re.search(r"^Nearest: (.*)\.$", text, re.M)
            nearest = scripts[named[1] if named else sync_shared.FIRST].splitlines()
            own = [line for line in text.splitlines() if line.strip() and line not in nearest]
            assert set(own) <= set(shown)
