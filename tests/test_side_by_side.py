"""The scripts beside each other: copies don't drift, differences merge, and the code stays plain.

Nothing is imported from the scripts: this is about their text.
"""

import ast
import io
import re
import subprocess
import tokenize
import tomllib

import pytest
from conftest import ROOT

from dev import sync_shared

SCRIPTS = sync_shared.find_scripts(ROOT)
ONE_CHANGE = [path for path in SCRIPTS if path.startswith(("baselines/", "variants/"))]

# Lines of `diff qam_offline.py SCRIPT` that begin with < or >, outside the module docstrings.
MOST_DIFFERENT_LINES = {
    "baselines/fql.py": 135,
    "baselines/fbrac.py": 121,
    "baselines/bam.py": 77,
    "baselines/dsrl.py": 171,
    "qam_diffusion_variant.py": 222,
    "variants/qam_fql.py": 58,
    "variants/qam_edit.py": 105,
    "variants/trqam.py": 101,
    "baselines/fedit.py": 181,
    "baselines/ifql.py": 156,
    "baselines/fawac.py": 141,
    "baselines/rebrac.py": 175,
    "baselines/rlpd.py": 178,
    "baselines/cgql.py": 205,
    "baselines/qsm.py": 240,
    "baselines/dac.py": 236,
    "baselines/rql.py": 177,
    "baselines/qgf.py": 167,
}

MOST_CODE_LINES = {"qam_offline.py": 600, "qam_offline_to_online.py": 760}
MOST_TOKENS = {"qam_offline.py": 6600}
MOST_TOKENS_A_LINE = {"qam_offline.py": 11.0}
MOST_TOKENS_A_LINE_ELSEWHERE = 11.2  # what the methods add is mostly equations
MOST_LINES_OF_A_FUNCTION = 50
LAST_LINE_OF_THE_ALGORITHM = 470
MOST_CLEVER_FORMS = {
    "walrus": 2,
    "tuple assignment": 6,
    "lambda": 8,
    "merge of dictionaries": 12,
    "expression as a statement": 0,
    "assert": 0,
}


# ---------------------------------------------------------------------------------------- copies


def test_copies_are_the_same():
    repairs, complaints = sync_shared.compare(SCRIPTS)
    told = [sync_shared.difference(SCRIPTS, *repair) for repair in repairs] + complaints
    assert not told, "\n".join([*told, "python dev/sync_shared.py copies qam_offline.py's text"])


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_runs_alone_on_what_requirements_list(path):
    """Its PEP 723 block names lines of requirements.txt, and no file of the project is imported."""
    block = sync_shared.sources(SCRIPTS[path])[sync_shared.BLOCK]
    toml = "\n".join(line.removeprefix("#").strip() for line in block.splitlines()[1:-1])
    needed = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(tomllib.loads(toml)["dependencies"]) <= set(needed)
    scripts = [script.stem for script in ROOT.glob("*.py")]
    local = "|".join([*scripts, "baselines", "variants", "tools", "experiments", "dev", "tests"])
    assert not re.search(rf"^\s*(?:import|from) (?:{local})\b", SCRIPTS[path], re.M)


def args_fields(text):
    """{name: its line} of Args, without the method's own."""
    lines = text.splitlines()
    fields = {}
    own = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    fields[field.target.id] = lines[field.lineno - 1]
        if sync_shared.assigned(node) == "OWN":
            own = {key.value for key in node.value.keys}
    return {name: line for name, line in fields.items() if name not in own}


@pytest.mark.parametrize("path", ONE_CHANGE)
def test_common_arguments_are_the_same(path):
    """Args may differ, but not in what it has in common: qam_offline.py's defaults and words."""
    ours = args_fields(SCRIPTS[sync_shared.FIRST])
    theirs = args_fields(SCRIPTS[path])
    common = ours.keys() & theirs.keys() - {"max_grad_norm", "best_of_n"}
    assert len(common) > 20
    assert {name: theirs[name] for name in common} == {name: ours[name] for name in common}


TOY = """# /// script
# dependencies = ["jax>=0.6"]
# ///
\'\'\'A script.

Differs from qam_offline.py: nothing.
\'\'\'

import sys

# What a resumed run may change.
MAY_CHANGE = ("resume",)
MAY_CHANGE += ("track",)


def loss(q, y):
    # The mean, not the sum.
    return ((q - y) ** 2).mean()


@property
def nothing(self):
    pass


if __name__ == "__main__":
    main(sys.argv)
"""


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("loss", ".mean()", ".sum()"),
        ("loss", "# The mean, not the sum.", "# The mean."),
        ("MAY_CHANGE", '("track",)', '("track", "seed")'),
        ("MAY_CHANGE", 'MAY_CHANGE += ("track",)\n', ""),
        ("MAY_CHANGE", "# What a resumed run may change.", "# What may change."),
        ("nothing", "@property", "@staticmethod"),
        (sync_shared.BLOCK, '"jax>=0.6"', '"jax>=0.4"'),
        (sync_shared.IMPORTS, "import sys\n", "import os\nimport sys\n"),
    ],
)
def test_the_guard_sees_drift(name, old, new):
    """A copy that drifted is told by file and name, and repaired."""
    first = TOY.replace(": nothing.", ": ")
    drifted = first.replace(old, new, 1)
    assert drifted != first
    scripts = {sync_shared.FIRST: first, "copy.py": drifted}
    ((where, what, source),), complaints = sync_shared.compare(scripts)
    assert (where, what, complaints) == ("copy.py", name, [])
    assert source in first
    assert f"copy.py: {name} is not the same" in sync_shared.difference(
        scripts, where, what, source
    )
    assert sync_shared.repaired(drifted, what, source) == first


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("", "", "lists nothing, which is the same as in"),
        (": nothing.", ": no_such.", "lists no_such, which the script does not define"),
        ("def loss(", "if True:\n    loss = max\n\n\ndef loss(", "stand at the top"),
        ("def loss(", "MAY_CHANGE.clear()\n\n\ndef loss(", "stand at the top"),
        ("def loss(", "a, loss = 1, 2\n\n\ndef loss(", "stand at the top"),
        ("@property", 'MAY_CHANGE += ("seed",)\n\n\n@property', "in two places"),
    ],
)
def test_the_guard_sees_what_it_can_not_repair(old, new, words):
    first = TOY.replace(": nothing.", ": ")
    scripts = {sync_shared.FIRST: first, "copy.py": TOY.replace(old, new, 1)}
    _, complaints = sync_shared.compare(scripts)
    assert any(words in complaint for complaint in complaints)


def test_a_listed_name_may_differ():
    copy = TOY.replace("pass", "return 1").replace("import sys", "import sys, os")
    copy = copy.replace(": nothing.", ": nothing, imports.")
    scripts = {sync_shared.FIRST: TOY.replace(": nothing.", ": "), "copy.py": copy}
    assert sync_shared.compare(scripts) == ([], [])


def test_other_online_scripts_are_nobodys_source(tmp_path):
    """They are made by tools/make_online.py."""
    for name in (sync_shared.FIRST, sync_shared.ONLINE, "baselines/fql.py", "variants/trqam.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    made = f"{sync_shared.MADE} from fql.py: edit that file, not this.\n"
    (tmp_path / "baselines/fql_offline_to_online.py").write_text(made)
    (tmp_path / "variants/of_another_name.py").write_text(made)
    names = [sync_shared.FIRST, sync_shared.ONLINE, "baselines/fql.py", "variants/trqam.py"]
    assert sync_shared.find_scripts(tmp_path) == {name: name for name in names}


# ----------------------------------------------------------------------------------- differences


def without_docstring(text):
    docstring = ast.parse(text).body[0]
    lines = text.splitlines(keepends=True)
    return "".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])


@pytest.mark.parametrize("path", MOST_DIFFERENT_LINES)
def test_the_difference_is_the_algorithm(path, tmp_path):
    for name in (sync_shared.FIRST, path):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(without_docstring(SCRIPTS[name]))
    line = ["diff", tmp_path / sync_shared.FIRST, tmp_path / path]
    difference = subprocess.run(line, capture_output=True, text=True).stdout
    count = len(re.findall("^[<>]", difference, re.M))
    assert count <= MOST_DIFFERENT_LINES[path], f"{path}: {count} lines"


@pytest.mark.parametrize("path", MOST_DIFFERENT_LINES)
def test_the_online_phase_merges(path):
    """The online phase and another algorithm touch different lines of qam_offline.py."""
    line = ["git", "merge-file", "-p", sync_shared.ONLINE, sync_shared.FIRST, path]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    conflicts = re.findall("^<<<<<<<.*?^>>>>>>>", done.stdout, re.M | re.S)
    assert not conflicts, "\n\n".join(conflicts)
    assert done.returncode == 0, done.stderr
    compile(done.stdout, path, "exec")


# ------------------------------------------------------------------------------------- plainness


def docstring_lines(tree):
    """Numbers of the lines that docstrings take."""
    numbers = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                numbers |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def code_tokens(text):
    """The tokens of the code, without comments and docstrings; a formatted string is one."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    layout |= {tokenize.ENDMARKER}
    docstrings = docstring_lines(ast.parse(text))
    tokens = []
    depth = 0  # of formatted strings, which Python takes apart from 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            depth -= 1
            continue
        is_code = token.type not in layout and token.start[0] not in docstrings
        if depth == 0 and is_code:
            tokens.append(token)
        if name == "FSTRING_START":
            depth += 1
    return tokens


def annotations(tree):
    """The nodes of all annotations, where | is no merge."""
    found = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                found |= set(ast.walk(annotation))
    return found


def clever_form(node):
    """The name of a form that readers trip over, or None."""
    if isinstance(node, ast.NamedExpr):
        return "walrus"
    if isinstance(node, ast.Lambda):
        return "lambda"
    if isinstance(node, ast.Assert):
        return "assert"
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.BitOr):
        return "merge of dictionaries"
    if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.Tuple, ast.IfExp)):
        return "expression as a statement"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        if isinstance(node.value, ast.Tuple):
            return "tuple assignment"
    return None


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_is_plain(path):
    tree = ast.parse(SCRIPTS[path])
    faults = []
    tokens = code_tokens(SCRIPTS[path])
    code_lines = {token.start[0] for token in tokens}
    if len(code_lines) > MOST_CODE_LINES.get(path, float("inf")):
        faults.append(f"{len(code_lines)} lines of code")
    if len(tokens) > MOST_TOKENS.get(path, float("inf")):
        faults.append(f"{len(tokens)} tokens")
    # As it is said to readers: to one decimal.
    tokens_a_line = round(len(tokens) / len(code_lines), 1)
    if tokens_a_line > MOST_TOKENS_A_LINE.get(path, MOST_TOKENS_A_LINE_ELSEWHERE):
        faults.append(f"{tokens_a_line} tokens a code line")

    forms = [clever_form(node) for node in set(ast.walk(tree)) - annotations(tree)]
    for form, most in MOST_CLEVER_FORMS.items():
        if forms.count(form) > most:
            faults.append(f"{form}: {forms.count(form)} times")

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                faults.append(f"{node.name}: {length} lines")
    assert not faults, f"{path}: {', '.join(faults)}"


def test_the_algorithm_comes_first():
    lines = SCRIPTS["qam_offline.py"].splitlines()
    (number,) = [i for i, line in enumerate(lines, start=1) if line.startswith("# =====")]
    assert number < LAST_LINE_OF_THE_ALGORITHM


def test_the_measurement_of_plainness():
    """On a text whose tokens can be counted by hand: 3 lines of 3, 5 and 2."""
    text = (
        '"""A docstring."""\n# A comment.\nx = 1  # another\n\nf"{x + 1} and {x}".split()\npass;\n'
    )
    tokens = code_tokens(text)
    assert [token.start[0] for token in tokens] == [3, 3, 3, 5, 5, 5, 5, 5, 6, 6]
    clever = (
        "a, b = 1, 2\n(c := 3)\nd = lambda: {} | {}\na or b\nassert a\ndef f(x: int | None): pass\n"
    )
    tree = ast.parse(clever)
    forms = {clever_form(node) for node in set(ast.walk(tree)) - annotations(tree)} - {None}
    assert forms == MOST_CLEVER_FORMS.keys()
