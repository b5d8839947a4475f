"""OFT in few planes against its definition with the whole rotation, in float64."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared
from torch import nn

from visiontune.adapters.plane_oft import Planes
from visiontune.evaluation.metrics import hyperspherical_energy


def _count(layer: nn.Module, options: dict) -> int:
    groups, d = getattr(layer, "groups", 1), layer.weight[0].numel()
    return 2 * groups * d * max(1, min(options["rank"], d // 2))


CONTRACT = {"plane_oft": Declared(_count, {"rank": 2}, variants=({"rank": 5},))}


def planes(layer: nn.Module, rank: int = 3, spread: float = 0.5) -> Planes:
    made = Planes(rank, layer.double())
    nn.init.normal_(made.second, std=spread)
    return made


def rotation(made: Planes, scale: float = 1.0) -> torch.Tensor:
    """R [groups, d, d], by the whole matrix Q."""
    a, b = made.first.detach(), scale * made.second.detach()
    q = a @ b.mT - b @ a.mT
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    return (identity + q) @ torch.linalg.inv(identity - q)


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(4, 6, 3, 2, 1, groups=2)], ids=["linear", "grouped"])
def test_the_weight_is_turned_by_the_cayley_transform_of_the_generator(layer, scale):
    made = planes(layer)
    w = layer.weight.detach()
    rows = w.reshape(made.groups, w.shape[0] // made.groups, -1)
    wanted = (rows @ rotation(made, scale).mT).view(w.shape)
    torch.testing.assert_close(made.weight(w, scale).detach(), wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(wanted, w, atol=1e-2)


def test_rows_keep_their_lengths_and_angles_however_far_they_are_turned():
    layer = nn.Linear(16, 10).double()
    made = planes(layer, 4, spread=3.0)
    turned, w = made.weight(layer.weight, 1.0).detach(), layer.weight.detach()
    torch.testing.assert_close(turned @ turned.mT, w @ w.mT, rtol=1e-9, atol=1e-10)
    assert hyperspherical_energy(turned) == pytest.approx(hyperspherical_energy(w), rel=1e-9)


def test_inputs_at_right_angles_to_all_planes_come_through_as_they_are():
    layer = nn.Linear(16, 10).double()
    made = planes(layer, 2)
    spanned = torch.cat([made.first, made.second], 2)[0].detach()
    outside = torch.linalg.qr(spanned, mode="complete").Q[:, 4:].T
    change = (made.weight(layer.weight, 1.0) - layer.weight).detach()
    assert change.norm() > 0.1 and (change @ outside.T).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(change) == 4


def test_gradients_are_those_of_the_whole_rotation():
    layer = nn.Linear(10, 6).double().requires_grad_(False)
    made, g = planes(layer, 2), torch.randn(6, 10, dtype=torch.float64)
    found = torch.autograd.grad((made.weight(layer.weight, 1.0) * g).sum(), [made.first, made.second])
    a, b = (p.detach().requires_grad_() for p in (made.first, made.second))
    q = a @ b.mT - b @ a.mT
    identity = torch.eye(10, dtype=torch.float64)
    whole = layer.weight @ torch.linalg.solve(identity - q, identity + q)[0].mT
    for one, other in zip(found, torch.autograd.grad((whole * g).sum(), [a, b]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_layer_of_few_inputs_has_fewer_planes():
    assert Planes(8, nn.Linear(6, 4)).rank == 3 and Planes(8, nn.Linear(1, 4)).rank == 1
