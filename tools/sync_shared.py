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
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif (name := assigned(node)) is not None:
            first = node.lineno
        else:
            continue
        spans.setdefault(name, []).append((first - 1, node.end_lineno))
    return spans


def assigned(node: ast.stmt) -> str | None:
    """The name that a plain assignment binds or extends."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    plain = isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and len(targets) == 1
    return targets[0].id if plain and isinstance(targets[0], ast.Name) else None


def out_of_the_ordinary(path: str, text: str) -> list[str]:
    """What the comparison by names would not see: other statements at the top level, names defined in two places."""
    found, body = [], ast.parse(text).body
    for i, node in enumerate(body):
        plain = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)) or assigned(node)
        last = i == len(body) - 1 and ast.unparse(node).startswith("if __name__ == '__main__':\n    main(")
        if not (plain or last or (i == 0 and ast.get_docstring(ast.parse(text)))):
            found.append(f"{path}:{node.lineno}: only imports, functions, classes and plain constants stand at the top")
    for name, spans in definitions(text).items():
        if any(a[1] != b[0] for a, b in zip(spans, spans[1:], strict=False)):
            found.append(f"{path}: {name} is defined in two places")
    return found


def imports(text: str) -> list[str]:
    return [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]


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
        for name in sorted(exempt - own.keys() - {"imports"}):
            complaints.append(f"{path}: the header lists {name}, which the script does not define")
        for name in sorted(exempt & own.keys() - sources(scripts[FIRST]).keys()):
            complaints.append(f"{path}: the header lists {name}, which {FIRST} does not define")
        if imports(text) != imports(scripts[FIRST]) and "imports" not in exempt:
            complaints.append(f"{path}: its imports are not those of {FIRST}")
        complaints += out_of_the_ordinary(path, text) + too_long(path, text)
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
