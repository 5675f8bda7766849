"""The pages of docs/ as GitHub shows them: code of the scripts, equations, numbers of runs."""

import csv
import html
import re

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

from dev import quote_code

PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
CODE = re.compile(r"^```.*?^```|`[^`]+`", re.M | re.S)
DISPLAYED = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.M | re.S)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_quoted_code_is_the_scripts(path):
    text = path.read_text()
    done = quote_code.with_code(text, path.parent)
    assert text == done, "python dev/quote_code.py writes the code anew"


@pytest.mark.parametrize(
    "asked, words",
    [
        ("definition of qam_offline.py: no_such", "defines no no_such"),
        ("line of qam_offline.py: no such line", "has 0 lines with no such line"),
    ],
)
def test_a_quotation_of_what_is_gone(asked, words):
    with pytest.raises(LookupError, match=words):
        quote_code.with_code(f"<!-- {asked} -->\n<!-- end -->", ROOT)


def test_stale_code_is_written_anew():
    stale = "<!-- definition of qam_offline.py: drift -->\n\ndef drift(): 1\n\n<!-- end -->\nMore."
    done = quote_code.with_code(stale, ROOT / "docs/lesson")
    assert "return 2 * velocity(x, t) - x / u\n```" in done
    assert "[qam_offline.py, drift](../../qam_offline.py#drift)" in done
    assert done.endswith("<!-- end -->\nMore.")


def equations(text):
    """The equations of a page, each with its dollars; faults: what is no equation on GitHub."""
    text = CODE.sub("code", text)
    found = [match[0] for match in DISPLAYED.finditer(text)]
    text = DISPLAYED.sub("", text)
    faults = re.findall(r".*\$\$.*", text)  # not on a line of its own
    for match in re.finditer(r"\$([^$\n]*)\$", text):
        found.append(match[0])
        before = text[match.start() - 1]
        after = text[match.end() : match.end() + 1]
        inside = match[1]
        if before.isalnum() or after.isalnum() or inside != inside.strip():
            faults.append(match[0])
    # GitHub refuses that macro.
    faults += [equation for equation in found if "\\operatorname" in equation]
    return found, faults


def words_of(source):
    return " ".join(html.unescape(re.sub("<[^>]*>", "", source)).split())


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_markdown_leaves_equations_alone(path):
    """Even a renderer that knows of no equations shows them whole: no \\_, no pair of asterisks."""
    found, faults = equations(path.read_text())
    assert not faults
    shown = words_of(MarkdownIt().enable("table").render(path.read_text()))
    changed = [equation for equation in found if words_of(html.escape(equation)) not in shown]
    assert not changed


@pytest.mark.parametrize(
    "trap",
    [r"$a\_b$", "$x^*$ and $y^*$", r"$\{a\}$", "$$ a $$", "2$a$", "$a $", r"$\operatorname{a}$"],
)
def test_the_test_sees_traps(trap):
    found, faults = equations(f"See {trap}.")
    shown = words_of(MarkdownIt().render(f"See {trap}."))
    assert faults or any(equation not in shown for equation in found)


def test_numbers_of_the_lesson_are_the_programs():
    """Each number of the table that dev/lesson_figures.py writes stands in its chapter."""
    lesson = ROOT / "docs/lesson"
    text = (lesson / "numbers.md").read_text()
    table = re.search(r"<!-- numbers of .*? -->(.*?)<!-- end -->", text, re.S)[1]
    rows = re.findall(r"^\| ([\d]|figure) \| .+? \| (.+?) \|", table, re.M)
    assert len({chapter for chapter, _ in rows}) == 8
    for chapter, numbers in rows:
        (path,) = lesson.glob(f"{chapter}_*.md" if chapter.isdigit() else f"{chapter}.md")
        stated = re.findall(r"[\d.]*\d", path.read_text())
        for number in re.findall(r"\d+\.\d+", numbers):
            assert number in stated, (path.name, number)


def test_numbers_in_words_are_the_runs():
    """docs/metrics.md on QAM and its variants, and on the others that it names."""
    curves = {}  # {(script, metric): its values}
    with (ROOT / "results/metrics/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["script"], row["metric"]), []).append(float(row["value"]))

    def first(script, metric):
        return curves[script, metric][0]

    def end(script, metric):
        values = curves[script, metric]
        late = values[len(values) * 3 // 4 :]
        return sum(late) / len(late)

    def span(value, metric):
        ours = ("qam_offline", "qam_edit", "qam_fql", "trqam", "qam_diffusion_variant")
        values = [value(f"{script}.py", metric) for script in ours]
        return f"{min(values):.0f} to {max(values):.0f}"

    norms = curves["qam_offline.py", "grad_norm"]
    flow_losses = [value("qam_offline.py", "flow_loss") for value in (first, end)]
    sentences = (
        f"begin at {span(first, 'critic_loss')} and end at {span(end, 'critic_loss')}.",
        f"end at {end('fbrac.py', 'critic_loss'):.1f} and {end('dsrl.py', 'critic_loss'):.1f}, for",
        f"FEdit, which fails, ends at {end('fedit.py', 'critic_loss'):.0f}.",
        f"QAM and its variants end at {span(end, 'q_mean')}.",
        f"(FBRAC {end('fbrac.py', 'q_mean'):.0f}, DSRL {end('dsrl.py', 'q_mean'):.0f})",
        "it is {:.1f} at first, then {:.1f}.".format(*flow_losses),
        f"begin at {span(first, 'adjoint_loss')} and end at {span(end, 'adjoint_loss')}.",
        f"with QAM on the maze {min(norms):.0f} to {max(norms):.0f}",
    )
    text = (ROOT / "docs/metrics.md").read_text()
    assert [sentence for sentence in sentences if sentence not in text] == []
