"""An adapter, an objective and a family, from the recipe to pictures: each of their names in at least one cell.

`benchmarks/matrix.py` runs many more.
"""

from __future__ import annotations

import pytest
from cells import ACTIONS, FAMILIES, YES, Cell, covering, refusal, run
from contracts.declared import declared
from workshop import Workshop

from visiontune import plugin

ADAPTERS, OBJECTIVES = plugin.names("adapters"), plugin.names("objectives")


# Whose loss falls in the few steps for which an adapter looks at it.
PLAIN = ("denoising", "contrastive")


def selected(adapter: str) -> Cell:
    """About a diagonal of the table of adapters and families; those that look at data need an objective with some."""
    at = ADAPTERS.index(adapter)
    looks = declared()[adapter].looks
    cells = {c.family: c for c in covering() if c.adapter == adapter and not (looks and c.objective not in PLAIN)}
    turned = [FAMILIES[(at + step) % len(FAMILIES)] for step in range(len(FAMILIES))]
    return next(cells[family] for family in turned if family in cells)


SELECTION = [selected(adapter) for adapter in ADAPTERS]
SELECTION += [
    next(cell for cell in covering() if (cell.adapter, cell.objective) == ("lora", objective))
    for objective in OBJECTIVES
    if objective not in {cell.objective for cell in SELECTION}
]


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    made = {}

    def shop(family: str) -> Workshop:
        if family not in made:
            made[family] = Workshop(family, tmp_path_factory.mktemp(family))
        return made[family]

    return shop


@pytest.mark.parametrize("cell", SELECTION, ids=str)
def test_a_cell_is_trained_resumed_exported_and_sampled(cell, shops):
    found = run(cell, shops(cell.family))
    exported = found.pop("export")
    assert found == {action: YES for action in ACTIONS if action != "export"}
    # Biases for layers without one, and pairs that are mixed for each sample, fit into no file of another tool.
    assert exported.startswith(YES) or "only visiontune can use it" in exported


def test_every_name_is_in_a_cell():
    assert {c.adapter for c in SELECTION} == {*ADAPTERS}
    assert {c.objective for c in SELECTION} == {*OBJECTIVES}
    assert {c.family for c in SELECTION} == {*FAMILIES}


def test_the_covering_has_every_two_that_go_together():
    cells = list(covering())
    pairs = {(c.adapter, c.family) for c in cells} | {(c.objective, c.family) for c in cells}
    pairs |= {(c.adapter, c.objective) for c in cells}
    assert pairs >= {(a, f) for a in ADAPTERS for f in FAMILIES}
    assert pairs >= {(o, f) for o in OBJECTIVES for f in FAMILIES if refusal(o, f) is None}
    assert pairs >= {(a, o) for a in ADAPTERS for o in OBJECTIVES}


def test_an_objective_that_a_family_does_not_take_is_refused_in_every_action(shops):
    found = run(Cell("lora", "ddpo", "amused"), shops("amused"))
    assert len({*found.values()}) == 1 and "amused" in found["train"]
