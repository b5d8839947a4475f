"""SVFit and LoLDU: what the frozen factors are, and that only the diagonal between them moves."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, full_rank
from torch import nn

from visiontune.adapters import attach
from visiontune.adapters.loldu import Config as LoLDU
from visiontune.adapters.loldu import triangular_factors
from visiontune.adapters.svfit import Config as SVFit
from visiontune.adapters.svfit import energy_rank, singular_factors


def _count(module: nn.Module, options: dict) -> int:
    groups = getattr(module, "groups", 1)
    if "rank" in options:
        return groups * min(options["rank"], full_rank(module))
    share = torch.linalg.svdvals(module.weight.detach().unflatten(0, (groups, -1)).flatten(2)).square()
    ranks = ((share.cumsum(1) / share.sum(1, keepdim=True)) < options["energy"]).sum(1) + 1
    return groups * int(ranks.max())


CONTRACT = {
    "svfit": Declared(_count, {"rank": 3}, variants=({"energy": 0.9},)),
    "loldu": Declared(_count, {"rank": 3, "alpha": 4.5}),
}


def matrix(rows: int = 7, columns: int = 5) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_all_factors_together_are_the_weight(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    for left, right in (singular_factors(w, SVFit(energy=1.0)), triangular_factors(w, LoLDU(rank=5))):
        torch.testing.assert_close(left @ right, w)


def test_svfit_moves_the_largest_singular_values_alone() -> None:
    layer = nn.Linear(5, 7).double()
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    adapters = attach(nn.ModuleDict({"layer": layer}), "svfit", targets="layer", rank=3)
    with torch.no_grad():
        next(adapters.parameters()).copy_(torch.tensor([[0.5, -0.25, 1.0]]))
    expected = s * torch.tensor([1.5, 0.75, 2.0, 1.0, 1.0])
    torch.testing.assert_close(u.mT @ adapters.weight("layer") @ v.mT, torch.diag(expected))


def test_the_energy_rule_takes_the_fewest_singular_values() -> None:
    s = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [energy_rank(s, share) for share in (9 / 14 - 0.01, 9 / 14 + 0.01, 13 / 14 + 0.01, 1.0)] == [1, 2, 3, 3]


def test_svfit_recovers_scaled_singular_values() -> None:
    layer = nn.Linear(6, 6, bias=False)
    u, s, v = torch.linalg.svd(layer.weight.detach())
    goal = u @ torch.diag(s * torch.linspace(0.5, 2, 6)) @ v
    adapters = attach(nn.ModuleDict({"layer": layer}), "svfit", targets="layer", energy=1.0)
    optimizer = torch.optim.Adam(adapters.parameters(), 0.05)
    for _ in range(300):
        loss = (adapters.weight("layer") - goal).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-6


def test_loldu_trains_pivots_relative_to_their_size_even_where_one_vanishes() -> None:
    w = matrix(5, 5)
    w[:, 4] = w[:, 0]  # rank four: the last pivot is zero
    left, right = triangular_factors(w, LoLDU(rank=5, alpha=2.5))
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    p, lower, upper = torch.linalg.lu(w)
    torch.testing.assert_close(left @ torch.diag(torch.arange(5.0).double()) @ right,
                               0.5 * p @ lower @ torch.diag(torch.arange(5.0).double()) @ upper)  # fmt: skip


def test_the_gradient_of_a_diagonal_entry_is_the_inner_product_with_its_outer_product() -> None:
    layer = nn.Linear(5, 7).double()
    x, weight = torch.randn(4, 5, dtype=torch.float64), layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).pow(2).sum().backward()
    left, right = triangular_factors(layer.weight.detach(), LoLDU(rank=3))
    net = nn.ModuleDict({"layer": layer})
    adapters = attach(net, "loldu", targets="layer", rank=3)
    net["layer"](x).pow(2).sum().backward()
    (t,) = adapters.parameters()
    expected = torch.stack([(weight.grad * torch.outer(left[:, i], right[i])).sum() for i in range(3)])
    torch.testing.assert_close(t.grad[0], expected)
