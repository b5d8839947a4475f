"""ALLoRA: the rows' own rates, and that they stretch the optimiser's step whichever optimiser it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contracts.declared import Declared, count_lora
from torch import Tensor, nn

from visiontune.adapters import attach
from visiontune.adapters.allora import rates
from visiontune.errors import UserError

CONTRACT = {"allora": Declared(count_lora, {"rank": 2, "eta": 4.0})}

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def adapted(method: str = "allora", layer: nn.Module | None = None, **options):
    torch.manual_seed(0)
    net = nn.ModuleDict({"layer": (layer or nn.Linear(6, 4)).double()})
    adapters = attach(net, method, targets="layer", rank=3, **options)
    factors = adapters.adapters()["layer"]
    with torch.no_grad():
        factors.up[1:].normal_(std=0.5)  # row 0 stays at zero
    return net, adapters, factors


def step(net: nn.ModuleDict, adapters, optimizer, x: Tensor = X) -> None:
    optimizer.zero_grad()
    net["layer"](x).pow(3).sum().backward()
    adapters.before_step()
    optimizer.step()
    adapters.after_step(0.5, optimizer)


def test_the_rate_is_eta_at_zero_and_falls_with_the_row() -> None:
    up = torch.linspace(0, 30, 50, dtype=torch.float64)[:, None] * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    rate = rates(up, 5.0)[:, 0]
    assert torch.isfinite(rate).all()
    assert rate[0].item() == pytest.approx(5.0)
    assert (rate.diff() < 0).all()
    assert rate[-1].item() == pytest.approx(1 / math.sqrt(30 + 1 / 25))


def test_with_sgd_the_step_is_the_gradient_times_rate_and_learning_rate() -> None:
    net, adapters, factors = adapted(eta=5.0)
    down, up = factors.down.detach().clone(), factors.up.detach().clone()
    step(net, adapters, torch.optim.SGD(adapters.parameters(), 0.01))
    factor = 1 / (up.square().sum(1).sqrt() + 0.04).sqrt()
    assert factor[0] == 5.0
    torch.testing.assert_close(factors.up - up, -0.01 * factor[:, None] * factors.up.grad)
    torch.testing.assert_close(factors.down - down, -0.01 * factors.down.grad)


@pytest.mark.parametrize("layer", [None, nn.Conv2d(6, 4, 1, groups=2)], ids=["linear", "grouped"])
def test_adam_does_not_cancel_the_rate(layer: nn.Module | None) -> None:
    x = X if layer is None else X[:, :, None, None]
    net, adapters, factors = adapted(layer=copy.deepcopy(layer), eta=5.0)
    plain_net, plain, lora = adapted("lora", copy.deepcopy(layer))
    optimizers = [torch.optim.AdamW(a.parameters(), 0.01, weight_decay=0.1) for a in (adapters, plain)]
    for _ in range(3):
        # Each step starts where the other's does, and the optimiser sees the same gradients.
        lora.load_state_dict(factors.state_dict())
        before = factors.up.detach().clone()
        step(net, adapters, optimizers[0], x)
        step(plain_net, plain, optimizers[1], x)
        torch.testing.assert_close(factors.up, before + rates(before, 5.0) * (lora.up - before))
        torch.testing.assert_close(factors.down, lora.down)
        assert not torch.equal(factors.up, lora.up)


def test_a_step_that_was_skipped_leaves_nothing_to_stretch() -> None:
    net, adapters, factors = adapted()
    adapters.before_step()  # the optimiser finds an infinite gradient, so that no step follows
    with torch.no_grad():
        factors.up.add_(1.0)
    before = factors.up.detach().clone()
    optimizer = torch.optim.SGD(adapters.parameters(), 0.0)
    step(net, adapters, optimizer)
    assert torch.equal(factors.up, before)
    with torch.no_grad():
        factors.up.add_(1.0)
    adapters.after_step()
    assert torch.equal(factors.up, before + 1.0), "only what happened between both calls is stretched"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must be a number above 0"),
        *(
            ({name: value}, "do not go with rows that set their own rate")
            for name, value in {"dropout": 0.1, "alpha": 3.0, "rslora": True, "dora": True}.items()
        ),
    ],
)
def test_what_the_method_does_without_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**options)
