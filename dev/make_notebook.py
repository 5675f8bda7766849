"""Write docs/bandit.ipynb from experiments/bandit.py: python dev/make_notebook.py

A cell begins where the program has a line "# %% Title". Left out is what a notebook has no use for:
the line with __file__, and what parses the command line. Added are a first cell, which finds
qam_offline.py or gets it, and a last one, with sliders.
"""

import ast
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/bandit.ipynb"
# OWNER/NAME on GitHub, once the project has a public address: then the notebook has a link that
# opens it in Colab, and its first cell gets qam_offline.py from there.
REPOSITORY = ""

FIRST = """\
# qam_offline.py is one folder up, or beside this notebook; in Colab it has to be got.
import sys
import urllib.request
from pathlib import Path

ADDRESS = "{address}"  # of the folder that has qam_offline.py, once the project is public
if "google.colab" in sys.modules:
    %pip install -q \\
        {packages}
if not Path("../qam_offline.py").exists() and not Path("qam_offline.py").exists():
    if not ADDRESS:
        raise SystemExit("error: put qam_offline.py beside this notebook (in Colab: upload it)")
    urllib.request.urlretrieve(f"{{ADDRESS}}/qam_offline.py", "qam_offline.py")
sys.path[:0] = ["..", "."]\
"""
LAST = """\
def show(inv_temp=1.0, T=10, steps=1000, seed=0):
    run(Args(inv_temp, (T,), steps, seed))


try:
    from ipywidgets import FloatSlider, IntSlider, interact
except ImportError:
    show()  # no sliders here: change the numbers, as in show(inv_temp=3.0, T=30)
else:
    later = {"continuous_update": False}  # a run begins when the slider is let go
    sliders = interact(
        show,
        inv_temp=FloatSlider(1.0, min=0.0, max=3.0, step=0.5, **later),
        T=IntSlider(10, min=2, max=40, **later),
        steps=IntSlider(1000, min=100, max=3000, step=100, **later),
        seed=IntSlider(0, max=9, **later),
    )\
"""


def packages():
    """What qam_offline.py imports, in the words of its header; W&B only if it is asked for."""
    text = (ROOT / "qam_offline.py").read_text()
    header = re.search(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S)[1]
    listed = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.M))["dependencies"]
    quoted = [f'"{package}"' for package in listed if not package.startswith("wandb")]
    half = len(quoted) // 2
    return " ".join(quoted[:half]) + " \\\n        " + " ".join(quoted[half:])


def introduction(docstring, repository):
    """The first cell: the program's docstring, without the command."""
    title, _, rest = docstring.partition("\n\n")
    title, _, _ = title.partition(":")
    parts = [f"# {title}", rest]
    if repository:
        place = f"https://colab.research.google.com/github/{repository}/blob/main/docs/bandit.ipynb"
        parts.append(f"[Open in Colab]({place})")
    return "\n\n".join(parts)


def make_cells(repository):
    """(kind, text) of every cell."""
    source = (ROOT / "experiments/bandit.py").read_text()
    docstring = ast.get_docstring(ast.parse(source))
    _, _, code = source.partition('\n"""\n')  # what follows the docstring
    code, _, _ = code.partition('\nif __name__ == "__main__":')
    unused = ("__file__", "import tyro")
    lines = [line for line in code.splitlines() if not any(word in line for word in unused)]
    code = "\n".join(lines).replace("  # noqa: E402", "")
    imports, *parts = re.split(r"^# %% (.+)\n", code, flags=re.M)

    address = f"https://raw.githubusercontent.com/{repository}/main" if repository else ""
    cells = [
        ("markdown", introduction(docstring, repository)),
        ("code", FIRST.format(address=address, packages=packages())),
        ("code", imports.strip()),
    ]
    for title, part in zip(parts[::2], parts[1::2], strict=True):
        cells.append(("markdown", f"## {title}"))
        cells.append(("code", part.strip()))
    cells.append(("markdown", "## With sliders\n\nEach change trains anew, for a minute or so."))
    cells.append(("code", LAST))
    return cells


def make_notebook(repository=REPOSITORY):
    """The text of the notebook: JSON of Jupyter's format 4.5, without outputs."""
    cells = []
    for i, (kind, text) in enumerate(make_cells(repository)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        if kind == "code":
            cell.update(execution_count=None, outputs=[])
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(make_notebook())
    print(f"wrote {PATH.relative_to(ROOT)}")
