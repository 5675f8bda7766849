"""Write the scripts' code anew into the pages that quote it: python dev/quote_code.py

A page has a quotation between two comments, and this program writes what stands between them, the
code and a link to where it is from:

    <!-- definition of qam_offline.py: lean_adjoint -->
    <!-- line of qam_offline.py: return jnp.sqrt -->
    <!-- end -->

The first asks for a function or class, the second for the line that has this text.
"""

import ast
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUOTATION = re.compile(r"<!-- (definition|line) of (\S+): (.+) -->\n(?:.*\n)*?<!-- end -->")


def definition(path, name):
    """(name, code) of a function or class of a script."""
    text = (ROOT / path).read_text()
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return name, ast.get_source_segment(text, node)
    raise LookupError(f"{path} defines no {name}")


def line(path, part):
    """(name of the definition that it is in, code) of the line of a script that has `part`."""
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    numbers = [i for i, code in enumerate(lines, start=1) if part in code]
    if len(numbers) != 1:
        raise LookupError(f"{path} has {len(numbers)} lines with {part}, not one")
    (number,) = numbers
    for node in ast.parse(text).body:
        if node.lineno <= number <= node.end_lineno:
            return node.name, lines[number - 1].strip()
    raise LookupError(f"{path} has {part} outside of all definitions")


def with_code(markdown, folder):
    """The text of a page in `folder`, with its quotations as the scripts have them now."""

    def quote(match):
        kind, path, asked = match.groups()
        name, code = definition(path, asked) if kind == "definition" else line(path, asked)
        link = os.path.relpath(ROOT / path, folder)
        parts = (
            f"<!-- {kind} of {path}: {asked} -->",
            f"```python\n{code}\n```",
            f"[{path}, {name}]({link}#{name})",
            "<!-- end -->",
        )
        return "\n\n".join(parts)

    return QUOTATION.sub(quote, markdown)


def main():
    for path in sorted((ROOT / "docs").rglob("*.md")):
        before = path.read_text()
        try:
            after = with_code(before, path.parent)
        except LookupError as error:
            print(f"error: {path}: {error}: change the comment of that quotation", file=sys.stderr)
            sys.exit(2)
        if after != before:
            path.write_text(after)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
