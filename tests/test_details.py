"""The implementation details: each change of experiments/details.py still fits its script."""

import csv

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from experiments import details

PAGE = (ROOT / "docs/lesson/details.md").read_text()


@pytest.mark.parametrize("name", details.CHANGES)
def test_a_change_makes_another_script(name):
    change = details.CHANGES[name]
    text = details.changed_text(name)
    compile(text, name, "exec")
    assert (text == (ROOT / change.script).read_text()) == (not change.replace)
    assert f"`{name}`" in PAGE  # where it stands what came of it


def test_a_change_that_does_not_fit_is_refused(monkeypatch):
    stale = details.Change(details.QAM, {"a line that is gone": ""}, True)
    monkeypatch.setitem(details.CHANGES, "stale", stale)
    with pytest.raises(ValueError, match="0 times"):
        details.changed_text("stale")


def test_a_changed_module_computes_with_its_change():
    t = jnp.array([0.5])
    assert float(details.changed_module("shift_below_only").memoryless_sigma(t, 0.1)[0]) == (
        pytest.approx((1 / 0.6) ** 0.5)
    )
    changed = details.changed_module("policy_starts_as_behavior")
    args = changed.Args(hidden_dims=(8,), num_critics=2, horizon=1)
    networks = changed.make_networks(args, 3, 2)
    params = changed.init_state(args, networks, 3, 2, jax.random.key(0)).params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params["policy"], params["behavior"]))


def test_the_bandit_table_has_every_change():
    with (ROOT / "results/details/bandit.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, change in details.CHANGES.items():
        count = sum(row["change"] == name for row in rows)
        assert count == change.on_bandit * len(details.FLOW_STEPS) * len(details.SEEDS)
