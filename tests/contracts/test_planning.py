"""What every method that looks at the task before training has to satisfy.

A new one is picked up by its ``plans``; its test file declares it (`contracts.declared`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from contracts.declared import declared, turn
from torch import Tensor, nn

from visiontune import plugin
from visiontune.adapters import AdapterSet, attach, attached, load
from visiontune.adapters._layers import run

LINEAR, CONVOLUTIONS = ["to_q", "to_k", "to_out"], ["conv", "grouped"]


class Net(nn.Module):
    """Attention-like linear layers and convolutions, [b, 4, 6, 6] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 12, 3, stride=2, padding=1)
        self.to_q, self.to_k, self.to_out = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 8)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = h.flatten(2).mT
        y = self.to_out(torch.tanh(self.to_q(y)) * self.to_k(y)).mT.unflatten(2, h.shape[2:])
        return F.interpolate(self.grouped(y), x.shape[2:]) + x


def rows(seed: int) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


@functools.cache
def layers_of(method: str) -> tuple[str, ...]:
    """Those of the net's layers that the method adapts."""
    kinds, net = plugin.load("adapters", method).LAYERS, Net()
    return tuple(name for name in (*LINEAR, *CONVOLUTIONS) if isinstance(net.get_submodule(name), kinds))


def made(method: str, options: dict, targets: tuple[str, ...] = ()) -> tuple[Net, AdapterSet]:
    net = Net()
    return net, attach(net, method, targets=list(targets or layers_of(method)), **options)


def planned(method: str, options: dict, seed: int = 0) -> tuple[Net, AdapterSet]:
    net, adapters = made(method, options)
    torch.manual_seed(seed)
    adapters.prepare([_loss(net, i) for i in range(3)])
    return net, adapters


def _loss(net: Net, index: int) -> Callable[[], Tensor]:
    return lambda: (net(rows(index)) - rows(100 + index)).square().mean()


def options_of(method: str) -> dict:
    contract = declared()[method]
    return contract.options if contract.plan_options is None else contract.plan_options


METHODS = [name for name in declared() if layers_of(name) and made(name, options_of(name))[1].plans]
CASES = [
    pytest.param(method, options, id="-".join([method, *map(str, options.values())]))
    for method in METHODS
    for options in (options_of(method), *declared()[method].plan_variants)
]


def test_methods_that_plan_are_found() -> None:
    say_so = {m for m, c in declared().items() if c.looks}
    assert say_so and say_so <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_batches_is_an_option(method: str) -> None:
    assert plugin.configure("adapters", {"name": method, **options_of(method)}, "adapter")[1].batches > 0


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_start_is_the_base_bit_for_bit(method: str, options: dict) -> None:
    plain, (net, adapters) = Net(), planned(method, options)
    same = torch.equal(net(rows(7)), plain(rows(7)))
    assert same is not any(option in options for option in declared()[method].start_moves)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    with adapters.disable():
        assert torch.equal(net(rows(7)), plain(rows(7)))


@pytest.mark.parametrize(("method", "options"), CASES)
def test_planning_decides_something_within_the_budget(method: str, options: dict) -> None:
    adapters, unprepared = planned(method, options)[1], made(method, options)[1]
    one, other = adapters.tensors(), unprepared.tensors()
    assert one.keys() != other.keys() or any(not torch.equal(one[key], other[key]) for key in one)
    if budget := declared()[method].budget:
        budget(adapters, unprepared)
    assert all(p.requires_grad and p.numel() and p.dtype == torch.float32 for p in adapters.parameters())


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_fast_path_is_the_weight_path(method: str, options: dict) -> None:
    net, adapters = planned(method, options)
    turn(adapters)
    net.double(), adapters.double()
    adapters.refresh()
    for name in adapters.layers:
        layer = net.get_submodule(name)
        x = torch.randn(2, *((5, 12) if isinstance(layer, nn.Linear) else (layer.in_channels, 5, 5))).double()
        expected = run(layer, x, adapters.weight(name), adapters.bias(name))
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_every_parameter_gets_a_gradient(method: str, options: dict) -> None:
    """Otherwise training on several devices would wait for it."""
    net, adapters = planned(method, options)
    _loss(net, 5)().backward()
    assert all(p.grad is not None for p in adapters.parameters())


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_same_seed_plans_the_same(method: str, options: dict) -> None:
    one, other = (planned(method, options)[1].tensors() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("method", "options"), CASES)
def test_a_file_brings_everything_back(method: str, options: dict, tmp_path) -> None:
    net, adapters = planned(method, options)
    turn(adapters)
    path = adapters.save(tmp_path / "adapter.safetensors")
    adapters.eval()
    fresh = Net()
    loaded = load(fresh, path)
    assert torch.equal(fresh(rows(7)), net(rows(7)))
    assert not torch.equal(fresh(rows(7)), Net()(rows(7)))
    assert loaded.parameter_count == adapters.parameter_count

    other, again = made(method, options)
    again.restore(path)
    again.eval()
    assert torch.equal(other(rows(7)), net(rows(7)))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in adapters.named_parameters()]
    for a, b in zip(again.parameters(), adapters.parameters(), strict=True):
        assert a.requires_grad and torch.equal(a, b)
    # As a training run does with a checkpoint.
    state = dict(adapters.named_buffers())
    assert all(torch.equal(state[name], value) for name, value in again.named_buffers())


@pytest.mark.parametrize("component", ["unet", "model"])
@pytest.mark.parametrize("method", METHODS)
def test_a_component_of_any_name_is_planned_and_loaded(method: str, component: str, tmp_path) -> None:
    """A single module goes by the name ``model`` among the parameters, which a component may have too."""
    net, alone = Net(), planned(method, options_of(method))[1]
    adapters = attach({component: net}, method, targets=list(layers_of(method)), **options_of(method))
    torch.manual_seed(0)
    adapters.prepare([_loss(net, i) for i in range(3)])
    assert {key.removeprefix(f"{component}.") for key in adapters.tensors()} == set(alone.tensors())
    turn(adapters)
    fresh = Net()
    load({component: fresh}, adapters.save(tmp_path / "adapter.safetensors"))
    adapters.eval()
    assert torch.equal(fresh(rows(7)), net(rows(7)))


@pytest.mark.parametrize(("method", "options"), CASES)
def test_loading_decomposes_nothing(method: str, options: dict, tmp_path, monkeypatch) -> None:
    """A large model would wait minutes for a start that the file brings."""
    path = planned(method, options)[1].save(tmp_path / "adapter.safetensors")
    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("decomposed"))
    load(Net(), path)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_merging_a_plan_is_the_same_function(method: str, options: dict) -> None:
    net, adapters = planned(method, options)
    turn(adapters)
    adapters.eval()
    expected, weights = net(rows(7)), [p.detach().clone() for p in net.parameters()]
    adapters.merge()
    torch.testing.assert_close(net(rows(7)), expected, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
    adapters.detach()
    assert not attached(net)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_a_bf16_base_is_planned_in_float32(method: str, options: dict) -> None:
    net = Net().bfloat16()
    adapters = attach(net, method, targets=list(layers_of(method)), **options)
    torch.manual_seed(0)
    adapters.prepare([lambda i=i: net(rows(i).bfloat16()).float().square().mean() for i in range(3)])
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    assert all(torch.isfinite(t).all() for t in adapters.tensors().values() if t.is_floating_point())


@pytest.mark.parametrize(("method", "options"), CASES)
def test_a_plan_trains(method: str, options: dict) -> None:
    net, adapters = planned(method, options)
    optimizer, losses = torch.optim.AdamW(adapters.parameters(), 0.01, weight_decay=0.0), []
    for step in range(20):
        loss = torch.stack([_loss(net, i)() for i in range(3)]).mean()
        optimizer.zero_grad()
        loss.backward()
        adapters.before_step(step)
        optimizer.step()
        adapters.after_step((step + 1) / 20, optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.99 * losses[0]
