"""Orthogonal Adaptation: slots of one basis, and what is left of a change where another was added."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, turn
from torch import nn

from visiontune.adapters import attach, load, orthogonal
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    return module.weight.shape[0] * min(options.get("rank", 16), module.weight[0].numel() // options["slots"])


CONTRACT = {
    "orthogonal": Declared(
        _count,
        {"rank": 2, "slots": 2},
        variants=({"rank": 1, "slots": 3, "slot": 2}, {"rank": 3, "slots": 1, "seed": 5}),
    )
}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 7), nn.Conv2d(4, 6, 3, groups=2)).double()


def slot(index: int, **options):
    adapters = attach(net(), "orthogonal", targets=["0", "1"], **{"rank": 3, "slots": 3, "slot": index, **options})
    turn(adapters, 1.0, seed=index)
    return adapters


@pytest.mark.parametrize("layer", ["0", "1"])
def test_slots_are_orthonormal_and_changes_orthogonal_whatever_was_learnt(layer):
    changes, rows = [], []
    for index in range(3):
        adapters = slot(index)
        adapter = adapters.adapters()[layer]
        own = adapter.down.unflatten(0, (adapter.groups, -1)).flatten(2)
        for group in own:
            torch.testing.assert_close(group @ group.T, torch.eye(3).double())
        rows.append(own[0])
        changes.append(adapters.change(layer)[0].flatten(1))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        torch.testing.assert_close(rows[i] @ rows[j].T, torch.zeros(3, 3).double(), atol=1e-14, rtol=0)
        # Of every output too, so of the sum of changes an input from one slot sees one alone.
        product = changes[i] @ changes[j].T
        torch.testing.assert_close(product, torch.zeros_like(product), atol=1e-13, rtol=0)


def test_an_input_from_one_slot_sees_no_other_change():
    both, alone = net(), net()
    one = attach(both, "orthogonal", targets=["0"], rank=3, slots=3, slot=1, name="one")
    attached = [one, attach(both, "orthogonal", targets=["0"], rank=3, slots=3, slot=2, name="other")]
    own = attach(alone, "orthogonal", targets=["0"], rank=3, slots=3, slot=1)
    for seed, adapters in enumerate((*attached, own)):
        turn(adapters, 1.0, seed=seed % 2)
    x = torch.randn(4, 3).double() @ one.adapters()["0"].down
    torch.testing.assert_close(both[0](x), alone[0](x))
    assert not torch.allclose(both[0](torch.randn(4, 12).double()), alone[0](torch.randn(4, 12).double()))


def test_the_basis_is_that_of_the_seed_in_every_run():
    config = orthogonal.Config(rank=2, slots=4, slot=1)
    found = orthogonal.basis(config, 10).clone()
    orthogonal.basis.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(orthogonal.basis(config, 10), found)
    assert not torch.allclose(orthogonal.basis(orthogonal.Config(rank=2, slots=4, slot=1, seed=1), 10), found)


def test_the_rows_come_back_from_a_file(tmp_path):
    adapters = slot(2)
    again = load(net(), adapters.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.adapters()["0"].down, adapters.adapters()["0"].down)
    torch.testing.assert_close(again.weight("0"), adapters.weight("0"))


def test_slots_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="slot=3 is none of slots=3"):
        slot(3)
    with pytest.raises(UserError, match="'0' has 12 inputs, which 13 slots cannot share"):
        slot(0, slots=13)
