"""LoRA-SB: orthonormal frames of the first step, its best approximation, r^2 trained values."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, full_rank, same_count
from torch import nn

from visiontune.adapters import attach, load
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    return getattr(module, "groups", 1) * min(options["rank"], full_rank(module)) ** 2


CONTRACT = {
    "lora_sb": Declared(
        _count,
        {"rank": 3},
        plan_options={"rank": 2},
        plan_variants=({"rank": 3, "first_step": 0.01},),
        budget=same_count,
        start_moves=("first_step",),
    )
}

X = [torch.randn(6, 10, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]


def prepared(layer=None, xs=X, **options):
    torch.manual_seed(0)
    net = nn.Sequential(layer or nn.Linear(10, 7)).double()
    adapters = attach({"unet": net}, "lora_sb", targets=["0"], **{"rank": 3, **options})
    adapters.prepare([lambda x=x: net(x).square().mean() for x in xs])
    return net, adapters, adapters.adapters()["unet.0"]


def signs(net, xs=X):
    weight = net[0].weight.detach().clone().requires_grad_()
    for x in xs:
        torch.func.functional_call(net, {"0.weight": weight}, x).square().mean().backward()
    return weight.grad.sign()


@pytest.mark.parametrize("planned", [True, False])
def test_the_frames_are_orthonormal(planned):
    adapter = prepared()[2]
    if not planned:
        adapter = attach(nn.Sequential(nn.Linear(10, 7)).double(), "lora_sb", targets=["0"], rank=3).adapters()["0"]
    torch.testing.assert_close(adapter.left.T @ adapter.left, torch.eye(3).double())
    torch.testing.assert_close(adapter.right @ adapter.right.T, torch.eye(3).double())


def test_it_starts_at_the_base_by_default():
    net, adapters, adapter = prepared()
    assert torch.equal(net(X[0]), nn.functional.linear(X[0], net[0].weight, net[0].bias))
    assert torch.equal(adapters.weight("unet.0"), net[0].weight)
    assert adapters.parameter_count == 9 and not adapter.core.any()


def test_a_first_step_is_the_best_approximation_of_adams():
    net, adapters, _ = prepared(first_step=0.01)
    change = adapters.change("unet.0")[0]
    adapters.detach()
    step = -0.01 * signs(net)
    torch.testing.assert_close((step - change).norm(), torch.linalg.svdvals(step)[3:].norm())
    assert float((change * step).sum()) > 0


def test_at_full_rank_the_start_is_adams_first_step():
    net, adapters, _ = prepared(rank=99, first_step=0.01)
    change, weight = adapters.change("unet.0")[0], net[0].weight
    adapters.detach()
    before = weight.detach().clone()
    optimizer = torch.optim.Adam([weight.requires_grad_()], 0.01, eps=1e-12)
    torch.stack([net(x).square().mean() for x in X]).mean().backward()
    optimizer.step()
    torch.testing.assert_close(change, weight.detach() - before, rtol=1e-5, atol=1e-9)


def test_without_evidence_the_frames_are_those_of_the_weight():
    net = nn.Sequential(nn.Linear(10, 7)).double()
    adapter = attach(net, "lora_sb", targets=["0"], rank=3, first_step=0.1).adapters()["0"]
    u, _, v = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)
    torch.testing.assert_close(adapter.left @ adapter.left.T, u[:, :3] @ u[:, :3].T)
    torch.testing.assert_close(adapter.right.T @ adapter.right, v[:3].T @ v[:3])
    assert not adapter.core.any()


def test_the_gradient_of_the_core_is_that_of_the_weight_in_the_frames():
    net, _, adapter = prepared()
    weight = net[0].weight.detach().clone().requires_grad_()
    nn.functional.linear(X[0], weight, net[0].bias).square().mean().backward()
    net(X[0]).square().mean().backward()
    torch.testing.assert_close(adapter.core.grad[0], adapter.left.T @ weight.grad @ adapter.right.T)


def test_each_group_has_its_own_frames():
    xs = [torch.randn(2, 4, 5, 5).double() for _ in range(2)]
    net, adapters, adapter = prepared(nn.Conv2d(4, 6, 3, groups=2), xs, rank=2, first_step=0.01)
    assert adapter.core.shape == (2, 2, 2)
    change = adapters.change("unet.0")[0]
    adapters.detach()
    step = -0.01 * signs(net, xs)
    for part in (slice(0, 3), slice(3, 6)):
        expected = torch.linalg.svdvals(step[part].flatten(1))
        torch.testing.assert_close((step - change)[part].norm(), expected[2:].norm())


def test_the_frames_come_back_from_a_file(tmp_path):
    net, adapters, adapter = prepared(first_step=0.01)
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(10, 7)).double()
    again = load({"unet": fresh}, adapters.save(tmp_path / "a.safetensors")).adapters()["unet.0"]
    assert torch.equal(again.left, adapter.left) and torch.equal(again.right, adapter.right)
    assert torch.equal(fresh(X[0]), net(X[0]))
    down, up = adapters.low_rank("unet.0")
    torch.testing.assert_close(net[0].weight + up @ down, adapters.weight("unet.0"))


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("first_step", -1.0), ("batches", 0)])
def test_impossible_options_are_refused(option, value):
    with pytest.raises(UserError, match=option):
        attach(nn.Sequential(nn.Linear(4, 4)), "lora_sb", targets=["0"], **{option: value})
