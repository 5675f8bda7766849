"""Keep the scripts' copies the same: python tools/sync_shared.py writes qam_offline.py's text into the other scripts.

Every top-level function, class and constant that stands in two scripts under one name must be the same to the letter,
unless the header of one of them lists it under "Differs from qam_offline.py:". The text that counts is that of
qam_offline.py, or, for a name that it does not have, of the first script (by path) that has it. The PEP 723 block is a
copy too. `--check` only tells, with a diff, and exits with 1 if anything would change. What copying can't repair (a
listed name that does not differ, a script that is too long) is told and left.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "qam_offline.py"
MOST_LINES = {"qam_offline_to_online.py": 750}  # the others: 650
MOST_LINES_OF_ALGORITHM = 250  # sections 4 to 7


def find_scripts(root: Path) -> dict[str, str]:
    """{path below root: text}, qam_offline.py first."""
    paths = [root / FIRST, *sorted({*root.glob("*.py"), *root.glob("baselines/*.py")} - {root / FIRST})]
    return {str(path.relative_to(root)): path.read_text() for path in paths}


def definitions(text: str) -> dict[str, list[tuple[int, int]]]:
    """{name: [(first line, line after the last), ..]} of what the top level defines, decorators included."""
    spans = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names, first = [node.name], min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, first = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)], node.lineno
        else:
            continue
        for name in names:
            spans.setdefault(name, []).append((first - 1, node.end_lineno))
    return spans


def sources(text: str) -> dict[str, str]:
    """{name: its source}, and the PEP 723 block under the name "PEP 723 block"."""
    lines = text.splitlines(keepends=True)
    found = {name: "".join("".join(lines[a:b]) for a, b in spans) for name, spans in definitions(text).items()}
    block = re.match(r"# /// script\n(?:#.*\n)*?# ///\n", text)
    return found | {"PEP 723 block": block[0] if block else ""}


def listed(text: str) -> set[str]:
    """The names after "Differs from qam_offline.py:" in the module docstring, up to the end of their paragraph."""
    match = re.search(rf"Differs from {FIRST}:(.*?)(?:\n\n|$)", ast.get_docstring(ast.parse(text)) or "", re.S)
    return set(re.findall(r"[A-Za-z_]\w*", match[1])) if match else set()


def too_long(path: str, text: str) -> list[str]:
    lines, most = text.splitlines(), MOST_LINES.get(Path(path).name, 650)
    starts = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"# -{20,} (\d)\. ", line))}
    found = [f"{path}: {len(lines)} lines, at most {most}"] if len(lines) > most else []
    if not {"4", "8"} <= starts.keys():
        return [*found, f"{path}: the lines that head sections 4 and 8 are missing"]
    length = starts["8"] - starts["4"]
    if length > MOST_LINES_OF_ALGORITHM:
        found.append(f"{path}: sections 4 to 7 have {length} lines, at most {MOST_LINES_OF_ALGORITHM}")
    return found


def compare(scripts: dict[str, str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Copies that differ, as (path, name, the text it should have), and what copying can't repair, in words."""
    repairs, complaints, origin = [], [], {}
    for path, text in scripts.items():
        own, exempt = sources(text), listed(text)
        for name, source in own.items():
            first = origin.setdefault(name, (path, source)) if name not in exempt else origin.get(name)
            if name not in exempt and source != first[1]:
                repairs.append((path, name, first[1]))
            if name in exempt and first and source == first[1]:
                complaints.append(f"{path}: the header lists {name}, which is the same as in {first[0]}")
        for name in sorted(exempt - own.keys()):
            complaints.append(f"{path}: the header lists {name}, which the script does not define")
        for name in sorted(exempt & own.keys() - sources(scripts[FIRST]).keys()):
            complaints.append(f"{path}: the header lists {name}, which {FIRST} does not define")
        complaints += too_long(path, text)
    return repairs, complaints


def repaired(text: str, name: str, source: str) -> str:
    """`text` with `source` in place of what it has under `name`."""
    if name == "PEP 723 block":
        return text.replace(sources(text)[name], source, 1) if sources(text)[name] else source + text
    lines = text.splitlines(keepends=True)
    spans = definitions(text)[name]
    for a, b in reversed(spans[1:]):
        del lines[a:b]
    lines[slice(*spans[0])] = [source]
    return "".join(lines)


def difference(scripts: dict[str, str], path: str, name: str, source: str) -> str:
    old, new = sources(scripts[path])[name], source
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), path, "as it should be", lineterm="", n=1)
    return f"{path}: {name} is not the same as in the others\n" + "\n".join(lines)


def main(check: bool) -> int:
    scripts = find_scripts(ROOT)
    repairs, complaints = compare(scripts)
    for path, name, source in repairs:
        print(difference(scripts, path, name, source))
    if not check:
        for path, name, source in repairs:
            scripts[path] = repaired(scripts[path], name, source)
            (ROOT / path).write_text(scripts[path])
    print(*complaints, sep="\n", end="\n" if complaints else "")
    done = "differ" if check else "repaired"
    print(f"{len(scripts)} scripts, {len(repairs)} copies {done}, {len(complaints)} complaints")
    return int(bool(complaints or (check and repairs)))


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - {"--check"}:
        print(f"error: {' '.join(unknown)} is no flag; there is --check alone", file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
