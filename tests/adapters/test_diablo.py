"""DiaBlo: a change inside diagonal blocks, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared
from torch import nn

from visiontune.adapters import attach, load
from visiontune.adapters.diablo import linear_shape
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    n, groups = options["blocks"], getattr(module, "groups", 1)
    if isinstance(module, nn.Linear):
        return module.weight.numel() // n
    common = math.gcd(module.in_channels, module.out_channels)
    n = max(i for i in range(1, n + 1) if common % i == 0 and i % groups == 0)
    return module.weight.numel() * groups // n


CONTRACT = {"diablo": Declared(_count, {"blocks": 4})}


def adapted(layer: nn.Module, blocks: int):
    net = nn.ModuleDict({"layer": layer.double()})
    adapters = attach(net, "diablo", targets="layer", blocks=blocks)
    return net, adapters, next(iter(adapters.parameters()))


@pytest.mark.parametrize(("inputs", "outputs", "n"), [(12, 8, 4), (10, 7, 4), (4, 320, 64), (9, 9, 1)])
def test_blocks_cover_every_input_and_output_and_nothing_else_moves(inputs: int, outputs: int, n: int) -> None:
    net, adapters, change = adapted(nn.Linear(inputs, outputs), n)
    number, p, q = linear_shape(n, inputs, outputs)
    with torch.no_grad():
        change.fill_(1.0)
    moved = adapters.weight("layer") != net["layer"].weight
    for i in range(outputs):
        for j in range(inputs):
            assert bool(moved[i, j]) == (i // q == j // p)
    x = torch.randn(3, inputs, dtype=torch.float64)
    torch.testing.assert_close(net["layer"](x), x @ adapters.weight("layer").mT + net["layer"].bias)
    assert number * p >= inputs and number * q >= outputs


def test_the_gradient_is_the_block_of_the_dense_gradient() -> None:
    layer = nn.Linear(12, 8).double()
    x, weight = torch.randn(5, 12, dtype=torch.float64), layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).pow(2).sum().backward()
    net, _, change = adapted(layer, 4)
    net["layer"](x).pow(2).sum().backward()
    for n in range(4):
        torch.testing.assert_close(change.grad[n], weight.grad[2 * n : 2 * n + 2, 3 * n : 3 * n + 3].mT)


def test_one_block_is_full_fine_tuning() -> None:
    layer = nn.Linear(6, 4).double()
    x, weight = torch.randn(5, 6, dtype=torch.float64), layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).pow(2).sum().backward()
    net, adapters, change = adapted(layer, 1)
    net["layer"](x).pow(2).sum().backward()
    torch.optim.SGD([change], 0.1).step()
    torch.testing.assert_close(adapters.weight("layer"), weight.detach() - 0.1 * weight.grad)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_changes_within_blocks_of_channels(groups: int) -> None:
    net, adapters, change = adapted(nn.Conv2d(8, 12, 3, groups=groups), 4)
    with torch.no_grad():
        change.fill_(1.0)
    moved = (adapters.weight("layer") != net["layer"].weight).flatten(2).all(2)
    for out in range(12):
        for channel in range(8 // groups):
            source = out // (12 // groups) * (8 // groups) + channel
            assert bool(moved[out, channel]) == (out // 3 == source // 2)


def test_another_number_of_blocks_does_not_load(tmp_path) -> None:
    _, adapters, _ = adapted(nn.Linear(12, 8), 4)
    path = adapters.save(tmp_path / "a.safetensors")
    text = path.read_bytes().replace(b'\\"blocks\\": 4', b'\\"blocks\\": 2')
    path.write_bytes(text)
    torch.manual_seed(0)
    with pytest.raises(UserError, match="has shape"):
        load(nn.ModuleDict({"layer": nn.Linear(12, 8).double()}), path, allow_other_base=True)
