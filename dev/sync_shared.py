"""Keep the scripts' copies the same: python dev/sync_shared.py [--check]

Every top-level function, class and constant that stands in two scripts under one name must be the
same to the letter, the comment right above it included, unless the header of one of them lists it
under "Differs from qam_offline.py:". The text that counts is that of qam_offline.py, or, for a name
that it does not have, of the first script that has it. The PEP 723 block is a copy, too, and so are
the imports, under the name "imports".

This program writes the text that counts into the other scripts. --check only tells, with a diff,
and exits with 1 if anything would change. What copying can't repair (a listed name that does not
differ) is told and left.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "qam_offline.py"
ONLINE = "qam_offline_to_online.py"
MADE = "# Made by tools/make_online.py"
BLOCK = "PEP 723 block"
IMPORTS = "imports"


# ------------------------------------------------------------------------------ what a script holds


def find_scripts(root: Path) -> dict[str, str]:
    """{path below root: text}, qam_offline.py first."""
    scripts = {FIRST: (root / FIRST).read_text()}
    for pattern in ("*.py", "baselines/*.py", "variants/*.py"):
        for path in sorted(root.glob(pattern)):
            text = path.read_text()
            # What tools/make_online.py has made is copies, but nobody's source.
            if not text.startswith(MADE):
                scripts[str(path.relative_to(root))] = text
    return scripts


def assigned(node: ast.stmt) -> str | None:
    """The name that a plain assignment binds or extends."""
    target = None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        target = node.target
    return target.id if isinstance(target, ast.Name) else None


def defined(node: ast.stmt) -> str | None:
    """The name that a statement of the top level defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    return assigned(node)


def first_line(node: ast.stmt, lines: list[str]) -> int:
    """Index of a statement's first line, with its decorators and the comment right above it."""
    first = node.lineno
    for decorator in getattr(node, "decorator_list", []):
        first = min(first, decorator.lineno)
    while first > 1 and lines[first - 2].startswith("#"):
        first -= 1
    return first - 1


def definitions(text: str) -> dict[str, list[tuple[int, int]]]:
    """{name: [(first line, line after the last), ..]} of what the top level defines."""
    lines = text.splitlines()
    spans = {}
    for node in ast.parse(text).body:
        name = defined(node)
        if name is not None:
            span = (first_line(node, lines), node.end_lineno)
            spans.setdefault(name, []).append(span)
    return spans


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def sources(text: str) -> dict[str, str]:
    """{name: its source} of what the top level defines, the imports and the PEP 723 block."""
    lines = text.splitlines(keepends=True)
    found = {}
    for name, spans in definitions(text).items():
        parts = ["".join(lines[first:end]) for first, end in spans]
        found[name] = "".join(parts)
    block = re.match(r"# /// script\n(?:#.*\n)*?# ///\n", text)
    found[BLOCK] = block[0] if block else ""
    nodes = [node for node in ast.parse(text).body if is_import(node)]
    found[IMPORTS] = "".join(lines[nodes[0].lineno - 1 : nodes[-1].end_lineno])
    return found


def listed(text: str) -> set[str]:
    """The names in the docstring's paragraph that begins "Differs from qam_offline.py:"."""
    docstring = ast.get_docstring(ast.parse(text)) or ""
    for paragraph in docstring.split("\n\n"):
        _, header, names = paragraph.partition(f"Differs from {FIRST}:")
        if header:
            return set(re.findall(r"[A-Za-z_]\w*", names))
    return set()


# ----------------------------------------------------------------------------------- the comparison


def out_of_the_ordinary(path: str, text: str) -> list[str]:
    """What a comparison by names would not see."""
    found = []
    body = ast.parse(text).body
    for node in body:
        is_docstring = node is body[0] and ast.get_docstring(ast.parse(text)) is not None
        start = ast.unparse(node).startswith("if __name__ == '__main__':\n    main(")
        is_start = node is body[-1] and start
        if not (is_import(node) or is_docstring or is_start or defined(node)):
            where = f"{path}:{node.lineno}"
            found.append(
                f"{where}: only imports, functions, classes and constants stand at the top"
            )
    for name, spans in definitions(text).items():
        for i in range(1, len(spans)):
            if spans[i][0] != spans[i - 1][1]:
                found.append(f"{path}: {name} is defined in two places")
    return found


def wrongly_listed(path: str, text: str, first: dict[str, str]) -> list[str]:
    """Names of the header that the script lacks, or that are no difference from qam_offline.py."""
    found = []
    own = sources(text)
    for name in sorted(listed(text)):
        words = f"{path}: the header lists {name}, which"
        if name not in own:
            found.append(f"{words} the script does not define")
        elif name not in first:
            found.append(f"{words} {FIRST} does not define")
        elif own[name] == first[name]:
            found.append(f"{words} is the same as in {FIRST}")
    return found


def compare(scripts: dict[str, str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Copies that differ, and what copying can't repair.

    Returns: [(path, name, the text it should have), ..], and sentences.
    """
    repairs = []
    complaints = []
    first = sources(scripts[FIRST])
    origins = {}  # {name: the text that counts}
    for path, text in scripts.items():
        may_differ = listed(text)
        for name, source in sources(text).items():
            if name in may_differ:
                continue
            origin = origins.setdefault(name, source)
            if source != origin:
                repairs.append((path, name, origin))
        complaints += wrongly_listed(path, text, first)
        complaints += out_of_the_ordinary(path, text)
    return repairs, complaints


def repaired(text: str, name: str, source: str) -> str:
    """`text` with `source` in place of what it has under `name`."""
    if name == BLOCK:
        return source + text.removeprefix(sources(text)[BLOCK])
    if name == IMPORTS:
        return text.replace(sources(text)[IMPORTS], source, 1)
    lines = text.splitlines(keepends=True)
    spans = definitions(text)[name]
    for first, end in reversed(spans[1:]):
        del lines[first:end]
    first, end = spans[0]
    lines[first:end] = [source]
    return "".join(lines)


def difference(scripts: dict[str, str], path: str, name: str, source: str) -> str:
    """A copy that differs, for a reader."""
    old = sources(scripts[path])[name].splitlines()
    new = source.splitlines()
    lines = difflib.unified_diff(old, new, path, "as it should be", lineterm="", n=1)
    return "\n".join([f"{path}: {name} is not the same as in the others", *lines])


def main(check: bool) -> int:
    scripts = find_scripts(ROOT)
    repairs, complaints = compare(scripts)
    for path, name, source in repairs:
        print(difference(scripts, path, name, source))
    if not check:
        for path, name, source in repairs:
            scripts[path] = repaired(scripts[path], name, source)
            (ROOT / path).write_text(scripts[path])
    for complaint in complaints:
        print(complaint)
    done = "differ" if check else "repaired"
    counts = f"{len(repairs)} copies {done}, {len(complaints)} complaints"
    print(f"{len(scripts)} scripts, {counts}")
    unrepaired = len(complaints)
    if check:
        unrepaired += len(repairs)
    return 1 if unrepaired else 0


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - {"--check"}
    if unknown:
        print(f"error: {' '.join(unknown)} is no flag; there is --check alone", file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
