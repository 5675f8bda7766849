"""A hook of mkdocs (see mkdocs.yml): the pages that are made from the project's own files.

The README and the results become pages, every script gets one: its docstring, what differs from the
file that it is read against, its metrics and its code. In the lesson a line {{ code NAME }} becomes
that definition of qam_offline.py, {{ line SCRIPT TEXT }} the line of a script that holds a text,
and $ .. $ or $$ .. $$ an equation. Nothing is copied by hand, so nothing can drift. Links between
the project's files become links between pages.
"""

import ast
import csv
import difflib
import html
import os
import re
from pathlib import Path, PurePosixPath

import pygments
from latex2mathml import converter
from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
FIRST = "qam_offline.py"
SCRIPTS = (
    "qam_offline.py",
    "qam_offline_to_online.py",
    "qam_diffusion_variant.py",
    "variants/qam_edit.py",
    "variants/qam_fql.py",
    "variants/trqam.py",
    "baselines/fql.py",
    "baselines/dsrl.py",
    "baselines/fbrac.py",
    "baselines/bam.py",
    "baselines/fedit.py",
    "baselines/ifql.py",
    "baselines/fawac.py",
    "baselines/rebrac.py",
    "baselines/rlpd.py",
    "baselines/cgql.py",
    "baselines/qsm.py",
    "baselines/dac.py",
    "baselines/rql.py",
    "baselines/qgf.py",
)
# The page of a file: {path in the project: path in the site's sources}.
PAGES = {"README.md": "index.md", "results/README.md": "results/index.md"}
PAGES.update({path: f"scripts/{path.replace('/', '_')[:-3]}.md" for path in SCRIPTS})
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


# ------------------------------------------------------------------------------------------- links


def project_path(page_path, link):
    """The file of the project that a link on the page of another file means."""
    folder = PurePosixPath(page_path).parent
    return os.path.normpath(folder / link)


def site_path(path):
    """Where the site has a file of the project."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}"


def markdown_files():
    """Every page that is written by hand, by its path in the project."""
    docs = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
    return ["README.md", "results/README.md", *docs]


def linked_files():
    """Files of the project that no page shows and some page links to: pictures, tables, tools."""
    found = set()
    for page_path in markdown_files():
        for link, _ in LINK.findall((ROOT / page_path).read_text()):
            path = project_path(page_path, link)
            if path not in PAGES and not path.startswith("docs/"):
                found.add(path)
    return sorted(found)


def with_site_links(markdown, page_path):
    """The text with its links as the site needs them."""
    here = PurePosixPath(site_path(page_path)).parent

    def replace(match):
        target = site_path(project_path(page_path, match[1]))
        return f"]({os.path.relpath(target, here)}{match[2] or ''})"

    return LINK.sub(replace, markdown)


# ----------------------------------------------------------------------------------------- metrics


def mean_of(rows):
    """Of numbers, to three digits."""
    return f"{sum(rows) / len(rows):.3g}"


def metrics_table(path):
    """The metrics of a script in one run on the maze, in Markdown."""
    with (ROOT / "results/metrics/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == Path(path).name]
    curves = {}  # {metric: {step: value}}
    for row in rows:
        curves.setdefault(row["metric"], {})[int(row["step"])] = float(row["value"])
    last = max(curves["critic_loss"])
    meanings = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/metrics.md").read_text(), re.M)
    header = ("metric", "what it is", "first row", "half time", "last quarter")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, words in meanings:
        if name not in curves:
            continue
        curve = curves[name]
        half = max(step for step in curve if step <= max(last / 2, min(curve)))
        values = (
            mean_of([curve[min(curve)]]),
            mean_of([curve[half]]),
            mean_of([curve[step] for step in curve if step > 0.75 * last]),
        )
        lines.append(f"| `{name}` | {words} | {' | '.join(values)} |")
    unknown = curves.keys() - dict(meanings).keys()
    if unknown:
        raise LookupError(f"{path} logs {unknown}, and docs/metrics.md does not say what that is")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- scripts


def describe(docstring):
    """A docstring as Markdown: prose as it is, equations as a block of code."""
    parts = []
    for paragraph in docstring.split("\n\n"):
        if re.match(r"\(\d+\) ", paragraph):
            parts.append(f"```text\n{paragraph}\n```")
        else:
            parts.append(re.sub(r"([*_<])", r"\\\1", paragraph))
    return "\n\n".join(parts)


def highlight(lines, first_number=1, anchors=""):
    """Lines of Python as HTML, numbered where they can be linked to."""
    formatter = HtmlFormatter(
        nowrap=not anchors,
        cssclass="highlight script",
        linenos="inline" if anchors else False,
        linenostart=first_number,
        linespans=anchors,
    )
    return pygments.highlight("\n".join(lines) + "\n", PythonLexer(stripnl=False), formatter)


def side_by_side(before, after):
    """The difference of two files, in HTML: changes beside each other, what is equal folded."""
    parts = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, b0, b1, a0, a1 in matcher.get_opcodes():
        if kind == "equal":
            words = f"{a1 - a0} equal lines" if a1 - a0 > 1 else "one equal line"
            code = f"<pre>{highlight(after[a0:a1])}</pre>"
            summary = f"<summary>{words}, from {a0 + 1} on</summary>"
            parts.append(f'<details class="equal">{summary}{code}</details>')
        else:
            left = f'<pre class="before">{highlight(before[b0:b1])}</pre>'
            right = f'<pre class="after">{highlight(after[a0:a1])}</pre>'
            parts.append(f'<div class="pair highlight">{left}{right}</div>')
    return f"<div>{''.join(parts)}</div>"


def script_page(path):
    """The page of a script, in Markdown."""
    text = (ROOT / path).read_text()
    title, _, rest = ast.get_docstring(ast.parse(text)).partition("\n\n")
    parts = [f"# {html.escape(title.rstrip('.'))}", f"`{path}`", describe(rest)]
    if path != FIRST:
        named = re.search(r"^Nearest: (\S+)\.$", rest, re.M)
        nearest = named[1] if named else FIRST
        before = (ROOT / nearest).read_text().splitlines()
        parts.append(f"## What differs from {nearest}")
        parts.append(f"Left `{nearest}`, right `{path}`.")
        parts.append(side_by_side(before, text.splitlines()))
    parts.append("## What it logs")
    parts.append(
        "From one run on the quick start's maze ([which](../metrics.md)): the first row, at 500"
        " updates, the row at half time, and the mean over the last quarter."
    )
    parts.append(metrics_table(path))
    parts.append("## The whole file")
    parts.append(highlight(text.splitlines(), anchors="line"))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------- the lesson


def definition(name):
    """(number of the first line, lines) of a definition of qam_offline.py."""
    text = (ROOT / FIRST).read_text()
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return node.lineno, text.splitlines()[node.lineno - 1 : node.end_lineno]
    raise LookupError(f"{FIRST} defines no {name}")


def quote_code(match):
    """A definition in HTML. Its line numbers lead to the whole file."""
    first, lines = definition(match[1])
    page = "../scripts/qam_offline.html#line-"
    parts = []
    for i, line in enumerate(highlight(lines).splitlines()):
        number = first + i
        parts.append(f'<a class="linenos" href="{page}{number}">{number:5d}</a>{line}')
    code = "\n".join(parts)
    return f'<div class="highlight script"><pre>{code}</pre></div>'


def quote_line(match):
    """The line of a script that holds a text, with its number as a link."""
    path, text = match[1], match[2]
    lines = (ROOT / path).read_text().splitlines()
    numbers = [i for i, line in enumerate(lines) if text in line]
    if len(numbers) != 1:
        raise LookupError(f"{path} has {len(numbers)} lines with {text}")
    (i,) = numbers
    page = PurePosixPath(PAGES[path]).with_suffix(".html")
    link = f'<a class="linenos" href="../{page}#line-{i + 1}">{path}, {i + 1}</a>'
    return f'<div class="highlight script"><pre>{link}{highlight([lines[i].strip()])}</pre></div>'


def equation(match):
    """LaTeX as MathML, which browsers draw without a program."""
    if match[0].startswith("$$"):
        math = converter.convert(match[1].strip(), display="block")
        return f'<div class="equation">{math}</div>'
    return f'<span class="equation">{converter.convert(match[1].strip())}</span>'


def with_code_and_equations(markdown):
    """A page of the lesson; what stands in its own blocks of code is left alone."""
    parts = re.split(r"(```[\s\S]*?```|`[^`\n]*`)", markdown)
    for i in range(0, len(parts), 2):
        part = re.sub(r"^\{\{ code (\w+) \}\}$", quote_code, parts[i], flags=re.M)
        part = re.sub(r"^\{\{ line (\S+) (.+) \}\}$", quote_line, part, flags=re.M)
        part = re.sub(r"\$\$([^$]+)\$\$", equation, part)
        parts[i] = re.sub(r"\$([^$\n]+)\$", equation, part)
    return "".join(parts)


# ------------------------------------------------------------------------------------------ mkdocs


def on_files(files, config):
    """Add the pages that do not lie in docs/, and what they link to."""
    for path in ("README.md", "results/README.md"):
        files.append(File.generated(config, site_path(path), content=(ROOT / path).read_text()))
    for path in SCRIPTS:
        files.append(File.generated(config, site_path(path), content=script_page(path)))
    for path in linked_files():
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the pages that are written by hand."""
    paths = {site_path(path): path for path in markdown_files()}
    if page.file.src_uri in paths:
        markdown = with_site_links(markdown, paths[page.file.src_uri])
    if page.file.src_uri.startswith("lesson/"):
        markdown = with_code_and_equations(markdown)
    return markdown


def on_post_build(config):
    """The page for a server's missing files has a server's paths."""
    Path(config.site_dir, "404.html").unlink()
