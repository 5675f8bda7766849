"""A hook of mkdocs (see mkdocs.yml): the pages that are made from the project's own files.

The README and the results become pages. So does every script that the navigation names: its
docstring, its metrics and its code, and on a page of its own what differs from the file that it is
read against. Links between the project's files become links between pages.
"""

import ast
import csv
import difflib
import html
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
FIRST = "qam_offline.py"
# Pages that are written by hand and do not lie in docs/.
WRITTEN = ["README.md", "CONTRIBUTING.md", "tests/data/README.md", "results/README.md"]
WRITTEN += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("results/*/README.md"))
# The page of a file: {path in the project: path in the site's sources}. on_config adds the scripts.
PAGES = {path: path.replace("README.md", "index.md") for path in WRITTEN}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(?:#([^)\s]*))?\)")
# Material's front matter: the difference has the whole width, and search leaves it out.
WIDE = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---"


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
    return [*WRITTEN, *docs]


def linked_files():
    """Files of the project that no page shows and some page links to: pictures, tables, tools."""
    found = set()
    for page_path in markdown_files():
        for link, _ in LINK.findall((ROOT / page_path).read_text()):
            path = project_path(page_path, link)
            elsewhere = path not in PAGES and not path.startswith("docs/")
            if elsewhere and (ROOT / path).is_file():  # mkdocs tells of a link to what is not there
                found.add(path)
    return sorted(found)


def line_of(path, name):
    """The anchor of a script's definition: that of its first line on the script's page."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if getattr(node, "name", None) == name:
            return f"line-file-{node.lineno}"
    raise LookupError(f"{path} defines no {name}")


def with_site_links(markdown, page_path):
    """The text with its links as the site needs them."""
    here = PurePosixPath(site_path(page_path)).parent

    def replace(match):
        path = project_path(page_path, match[1])
        target = os.path.relpath(site_path(path), here)
        anchor = match[2]
        if anchor and path.endswith(".py"):
            anchor = line_of(path, anchor)
        return f"]({target}#{anchor})" if anchor else f"]({target})"

    return LINK.sub(replace, markdown)


# ----------------------------------------------------------------------------------------- metrics


def metrics_of(path):
    """{metric: {step: value}} of a script's run on the maze."""
    curves = {}
    with (ROOT / "results/metrics/metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["script"] == Path(path).name:
                curves.setdefault(row["metric"], {})[int(row["step"])] = float(row["value"])
    return curves


def metrics_section(path, curves):
    """What a script logs: the numbers of its run, and what each metric is."""
    successes = [f"{x:.2f} at {step:,}" for step, x in curves.pop("success_rate").items()]
    steps = sorted(curves["critic_loss"])
    first = steps[0]
    half = max(step for step in steps if step <= steps[-1] / 2)
    late = [step for step in steps if step > 0.75 * steps[-1]]
    header = ("metric", f"{first:,}", f"{half:,}", f"mean, {late[0]:,} to {late[-1]:,}")
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    text = (ROOT / "docs/metrics.md").read_text()
    meanings = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.M))
    unknown = curves.keys() - meanings.keys()
    if unknown:
        raise LookupError(f"{path} logs {unknown}, and docs/metrics.md does not say what that is")
    words = []
    for name in sorted(curves, key=[*meanings].index):
        curve = curves[name]
        late_mean = sum(curve[step] for step in late) / len(late)
        values = [f"{x:.3g}" for x in (curve[first], curve[half], late_mean)]
        table.append(f"| `{name}` | {' | '.join(values)} |")
        words.append(f"`{name}`\n:   {meanings[name]}")
    return "\n\n".join(
        [
            "## What it logs",
            "From one run on the quick start's maze ([which](../metrics.md)), by the step of the"
            f" row. Success of its evaluations: {', '.join(successes)}.",
            "\n".join(table),
            *words,
        ]
    )


# ----------------------------------------------------------------------------------------- scripts


def described(path):
    """A script: (its text, its title, the rest of its docstring)."""
    text = (ROOT / path).read_text()
    title, _, rest = ast.get_docstring(ast.parse(text)).partition("\n\n")
    return text, html.escape(title.rstrip(".")), rest


def nearest(path):
    """The file that a script is read against."""
    named = re.search(r"^Nearest: (\S+)\.$", described(path)[2], re.M)
    return named[1] if named else FIRST


def beside(page):
    """The path of the page that has a script's difference, from that of the script's page."""
    return page.replace(".md", "_beside.md")


def script_page(path):
    """The page of a script, in Markdown."""
    text, title, rest = described(path)
    parts = [f"# {title}", f"`{path}`"]
    if path != FIRST:
        page = PurePosixPath(beside(PAGES[path])).name
        parts.append(f"[Side by side with {nearest(path)}]({page})")
    for paragraph in rest.split("\n\n"):
        if re.match(r"\(\d+\) ", paragraph):
            parts.append(f"```text\n{paragraph}\n```")
        elif paragraph.startswith("    "):  # commands, code by Markdown's own rule
            parts.append(paragraph)
        else:
            parts.append(re.sub(r"([*_<])", r"\\\1", paragraph))
    curves = metrics_of(path)
    if curves:  # a new script may have no run yet
        parts.append(metrics_section(path, curves))
    # Search finds the first file's code. The others' is mostly the same.
    excluded = "" if path == FIRST else " {data-search-exclude}"
    parts.append(f"## The whole file{excluded}")
    parts.append(f'```{{.python #file linenums="1"}}\n{text}```')
    return "\n\n".join(parts)


def beside_page(path):
    """The difference of a script from its nearest, in Markdown."""
    before = nearest(path)
    lines = [(ROOT / file).read_text().splitlines() for file in (before, path)]
    page = PurePosixPath(PAGES[path]).name
    table = difflib.HtmlDiff().make_table(*lines, before, path, context=True)
    # As they are, its cells could not be wrapped, nor code be copied from them.
    table = table.replace("&nbsp;", " ").replace(' nowrap="nowrap"', "")
    head = f"# {path} beside {before}\n\n[The whole of {path}, and what it says of itself]({page})"
    return f'{WIDE}\n\n{head}\n\n<div class="beside">{table}</div>'


# ------------------------------------------------------------------------------------------ mkdocs


def on_config(config):
    """The scripts that have pages are those of the navigation."""
    for section in config.nav:
        for script in section.get("The scripts", ()):
            PAGES.update(script)


def on_files(files, config):
    """Add the pages that do not lie in docs/, and what they link to."""

    def add(path, content):
        files.append(File.generated(config, path, content=content))

    for path, page in PAGES.items():
        if path.endswith(".md"):
            add(page, (ROOT / path).read_text())
            continue
        add(page, script_page(path))
        if path != FIRST:
            add(beside(page), beside_page(path))
    for path in linked_files():
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the pages that are written by hand."""
    paths = {site_path(path): path for path in markdown_files()}
    if page.file.src_uri in paths:
        markdown = with_site_links(markdown, paths[page.file.src_uri])
    return markdown


def on_page_content(content, page, config, files):
    """mkdocs, which checks links, knows the anchors of headings alone: tell it those of lines."""
    page.present_anchor_ids.update(re.findall(r'id="(line-file-\d+)"', content))


def on_post_build(config):
    """The page for a server's missing files has a server's paths."""
    Path(config.site_dir, "404.html").unlink()
