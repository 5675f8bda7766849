"""Copies don't drift: what stands in two scripts under one name is the same text. Nothing is imported from them."""

import ast
import re
import tomllib

import pytest
from conftest import ROOT

from tools import sync_shared

SCRIPTS = sync_shared.find_scripts(ROOT)


def test_copies_are_the_same():
    repairs, complaints = sync_shared.compare(SCRIPTS)
    told = [sync_shared.difference(SCRIPTS, *repair) for repair in repairs] + complaints
    assert not told, "\n".join([*told, "python tools/sync_shared.py copies qam_offline.py's text"])


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_runs_alone_on_what_requirements_list(path):
    """Its PEP 723 block names only lines of requirements.txt, and it imports no other file of the project."""
    block = "\n".join(line[2:] for line in sync_shared.sources(SCRIPTS[path])["PEP 723 block"].splitlines()[1:-1])
    assert set(tomllib.loads(block)["dependencies"]) <= set((ROOT / "requirements.txt").read_text().splitlines())
    local = "|".join([*(p.stem for p in ROOT.glob("*.py")), "baselines", "tools", "tests"])
    assert not re.search(rf"^\s*(?:import|from) (?:{local})\b", SCRIPTS[path], re.M)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.startswith("baselines/")])
def test_few_lines_of_qam_offline_are_touched(path):
    """Lines of qam_offline.py that a diff removes or changes, module docstring included."""
    ours, theirs = (SCRIPTS[p].splitlines() for p in (sync_shared.FIRST, path))
    matching = sync_shared.difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    touched = len(ours) - sum(block.size for block in matching)
    assert touched <= 110, f"{path}: {touched} lines"


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.startswith("baselines/")])
def test_arguments_and_settings_differ_in_the_algorithms_own_alone(path):
    """Args and PAPER_SETTINGS may differ, but not in what is no coefficient (and, in Args, the gradient's limit)."""
    fields, rows, own = [], [], {"max_grad_norm"}
    for text in (SCRIPTS[sync_shared.FIRST], SCRIPTS[path]):
        lines, found = text.splitlines(), {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                fields.append({f.target.id: lines[f.lineno - 1] for f in node.body if isinstance(f, ast.AnnAssign)})
            elif sync_shared.assigned(node) == "PAPER_SETTINGS":
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    found[key.value] = {word.arg: word.value.value for word in value.keywords}
            elif sync_shared.assigned(node) == "COEFFICIENTS":
                own |= set(ast.literal_eval(node.value))
        rows.append({domain: {k: v for k, v in row.items() if k not in own} for domain, row in found.items()})
    fields = [{name: line for name, line in of_one.items() if name not in own} for of_one in fields]
    assert fields[0] == fields[1] and len(fields[0]) > 20
    shared = [{domain: {k: v for k, v in row.items() if k not in own} for domain, row in part.items()} for part in rows]
    assert shared[0] == shared[1] and len(shared[0]) == 10


def test_the_guard_sees_each_kind_of_drift():
    """Broken copies of the real scripts: each is told by file and name, and what can be repaired is."""
    path = "baselines/fql.py"
    drifts = {
        "critic_loss": ("    loss = jnp.mean(batch.valid", "    loss = jnp.sum(batch.valid"),
        "Batch": ("# (B, H*A)", "# (B, D)"),
        "MAY_CHANGE": ('MAY_CHANGE |= {"run_dir"', 'MAY_CHANGE |= {"seed", "run_dir"'),
        "PEP 723 block": ('"jax>=0.6"', '"jax>=0.4"'),
    }
    for name, (old, new) in drifts.items():
        assert old in SCRIPTS[path]
        drifted = SCRIPTS | {path: SCRIPTS[path].replace(old, new, 1)}
        ((where, what, source),), complaints = sync_shared.compare(drifted)
        assert (where, what, complaints) == (path, name, [])
        assert new in sync_shared.difference(drifted, where, what, source)
        assert sync_shared.repaired(drifted[path], what, source) == SCRIPTS[path]
    for old, new, words in (
        (
            "Differs from qam_offline.py: ",
            "Differs from qam_offline.py: evaluate, ",
            "lists evaluate, which is the same",
        ),
        ("Differs from qam_offline.py: ", "Differs from qam_offline.py: nothing_such, ", "does not define"),
        ("import dataclasses\n", "import dataclasses\n" * 100, "lines, at most 650"),
        ("# ---", "\n" * 100 + "# ---", "at most 250"),
        ("def td_target(", "if True:\n    td_target = max\n\n\ndef td_target(", "stand at the top"),
        ("def td_target(", "MAY_CHANGE.add(0)\n\n\ndef td_target(", "stand at the top"),
        ("def td_target(", "a, td_target = 1, 2\n\n\ndef td_target(", "stand at the top"),
        ("def fail(", "MAY_CHANGE |= {0}\n\n\ndef fail(", "in two places"),
        ("import optax\n", "import optax as td_target\n", "its imports"),
    ):
        _, complaints = sync_shared.compare(SCRIPTS | {path: SCRIPTS[path].replace(old, new)})
        assert any(words in complaint for complaint in complaints), words
