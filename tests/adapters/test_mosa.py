"""MoSA: experts part the second factor, each forward pass moves one of them, and their mean is what remains."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import nn
from torch.utils.checkpoint import checkpoint

from visiontune.adapters import attach, load
from visiontune.errors import UserError

# With more experts, a forward pass is drawn at random, which the tests below take up.
CONTRACT = {"mosa": Declared(count_lora, {"rank": 2, "experts": 1})}


def split(experts: int = 3, std: float = 0.1, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 7))
    adapters = attach({"unet": net}, "mosa", targets=["0"], rank=4, experts=experts, **options)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return net, adapters, adapters.adapters()["unet.0"]


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_masks_part_the_entries_evenly(experts):
    _, _, adapter = split(experts)
    sizes = torch.bincount(adapter.owner.flatten(), minlength=experts)
    assert int(sizes.sum()) == adapter.up.numel()
    assert int(sizes.max() - sizes.min()) <= 1


def test_a_forward_pass_uses_and_moves_one_expert():
    net, _, adapter = split()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        adapter.zero_grad()
        y = net(X)
        y.square().sum().backward()
        owners = adapter.owner[adapter.up.grad != 0].unique()
        assert len(owners) == 1
        chosen = torch.where(adapter.owner == owners, adapter.up, 0.0)
        expected = torch.nn.functional.linear(X, net[0].weight + chosen @ adapter.down, net[0].bias)
        torch.testing.assert_close(y, expected)
        seen.add(int(owners))
    assert seen == {0, 1, 2}


def test_what_remains_is_the_mean_of_the_experts(tmp_path):
    net, adapters, adapter = split()
    base = net[0].weight.detach().clone()
    mean = sum(torch.where(adapter.owner == i, adapter.up, 0.0) for i in range(3)) / 3
    adapters.eval()
    expected = torch.nn.functional.linear(X, base + mean @ adapter.down, net[0].bias)
    torch.testing.assert_close(net(X), expected)
    down, up = adapters.low_rank("unet.0")
    torch.testing.assert_close(base + up @ down, adapters.weight("unet.0"))
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(10, 7))
    load({"unet": other}, adapters.save(tmp_path / "a.safetensors"))
    assert torch.equal(other(X), net(X))


def test_one_expert_is_lora():
    net, _, adapter = split(experts=1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 7))
    lora = attach({"unet": plain}, "lora", targets=["0"], rank=4).adapters()["unet.0"]
    lora.load_state_dict({"down": adapter.down, "up": adapter.up})
    torch.testing.assert_close(net(X), plain(X))


def test_a_checkpoint_draws_the_same_expert_again():
    net, _, adapter = split(experts=7)
    for seed in range(5):
        gradients = []
        for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
            torch.manual_seed(seed)
            adapter.zero_grad()
            run(X.clone().requires_grad_()).square().sum().backward()
            gradients.append(adapter.up.grad.clone())
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be a whole number from 1"),
        ({"experts": 100}, "'0' has 28 entries to split, fewer than adapter.experts=100"),
        ({"dora": True}, "dora does not go with split factors"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        split(**options)
