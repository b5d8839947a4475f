"""BOFT: its factors are the butterfly's, the product is orthogonal and dense, and no large matrix is made."""

from __future__ import annotations

import warnings

import pytest
import torch
from contracts.declared import Declared
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visiontune.adapters import attach
from visiontune.adapters.boft import turn_input, turn_weight
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    d = getattr(module, "groups", 1) * module.weight[0].numel()
    turned = options["factors"] * d * (options["block_size"] - 1) // 2
    return turned + (module.weight.shape[0] if options.get("rescale") else 0)


CONTRACT = {
    "boft": Declared(
        _count, {"block_size": 4, "factors": 1}, variants=({"block_size": 2, "factors": 2, "rescale": True},)
    )
}


def random_factors(m: int, d: int, b: int) -> Tensor:
    q = torch.randn(m, d // b, b, b, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    skew = q - q.mT
    identity = torch.eye(b, dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def permutation(level: int, d: int, b: int) -> list[int]:
    """In every run of b 2^level features: half-block i, then the one 2^level further."""
    run, half, order = b * 2**level, b // 2, []
    for start in range(0, d, run):
        for i in range(2**level):
            for block in (i, i + 2**level):
                order += range(start + block * half, start + (block + 1) * half)
    return order


@pytest.mark.parametrize("m", [1, 2, 3])
def test_transposed_views_equal_the_explicit_product_of_factors(m: int) -> None:
    d, b = 16, 4
    factors, full = random_factors(m, d, b), torch.eye(d, dtype=torch.float64)
    for level in range(m):
        p = torch.eye(d, dtype=torch.float64)[:, permutation(level, d, b)]
        full = p @ torch.block_diag(*factors[level]) @ p.mT @ full
    x, w = torch.randn(3, 5, d, dtype=torch.float64), torch.randn(6, d, dtype=torch.float64)
    torch.testing.assert_close(turn_input(x, factors), x @ full)
    torch.testing.assert_close(turn_weight(w, factors), w @ full.mT)
    torch.testing.assert_close(full @ full.mT, torch.eye(d, dtype=torch.float64))
    assert bool((full.abs() > 1e-9).all()) == (m == 3), "log2(2 d / b) factors connect everything"


def test_one_factor_is_oft() -> None:
    def adapted(method: str, **options) -> Tensor:
        torch.manual_seed(0)
        net = nn.ModuleDict({"layer": nn.Conv2d(8, 6, 3, padding=1, groups=2).double()})
        adapters = attach(net, method, targets="layer", block_size=4, **options)
        with torch.no_grad():
            for p in adapters.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        return adapters.weight("layer")

    assert torch.equal(adapted("boft", factors=1), adapted("oft"))


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("tokens", [4, 64])
def test_no_square_matrix_of_the_inputs_is_made(tokens: int) -> None:
    net = nn.ModuleDict({"layer": nn.Linear(256, 32)})
    attach(net, "boft", targets="layer", block_size=8, factors=4)
    with Largest() as largest:
        net["layer"](torch.randn(tokens, 256)).sum().backward()
    assert largest.size <= max(256 * 64, 32 * 256) < 256**2


def test_more_factors_come_closer_to_any_rotation() -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=rng)
    goal = torch.matrix_exp(0.2 * (a - a.mT))
    errors = []
    for m in (1, 2, 3):
        net = nn.ModuleDict({"layer": nn.Linear(16, 16, bias=False)})
        with torch.no_grad():
            net["layer"].weight.copy_(torch.eye(16))
        adapters = attach(net, "boft", targets="layer", block_size=4, factors=m)
        optimizer = torch.optim.Adam(adapters.parameters(), 0.05)
        for _ in range(150):
            loss = (adapters.weight("layer") - goal).pow(2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_layers_that_fit_fewer_factors_get_them_and_say_so() -> None:
    net = nn.ModuleDict({"a": nn.Linear(24, 8), "b": nn.Linear(32, 8)})
    with pytest.warns(UserWarning, match=r"1 layers have fewer factors than adapter\.factors=4 \('a': 2\)"):
        adapters = attach(net, "boft", targets="Linear", block_size=4, factors=4)
    assert adapters.parameter_count == (2 * 24 + 4 * 32) * 3 // 2
    with pytest.raises(UserError, match="'layer' has 7 inputs"):
        attach(nn.ModuleDict({"layer": nn.Linear(7, 8)}), "boft", targets="layer")


def test_dropout_leaves_out_whole_blocks_in_training_only() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(16, 16, bias=False)})
    with torch.no_grad():
        net["layer"].weight.copy_(torch.eye(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = attach(net, "boft", targets="layer", block_size=4, factors=1, dropout=0.5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.fill_(0.5)
    torch.manual_seed(1)
    turned = net["layer"](torch.eye(16))
    blocks = [turned[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] for i in range(4)]
    untouched = [torch.equal(block, torch.eye(4)) for block in blocks]
    assert any(untouched) and not all(untouched)
    adapters.eval()
    full = net["layer"](torch.eye(16))
    assert not any(torch.equal(full[4 * i : 4 * i + 4, 4 * i : 4 * i + 4], torch.eye(4)) for i in range(4))


@pytest.mark.parametrize("factors", [1, 3, 4])
@pytest.mark.parametrize("tokens", [5, 30, 90])
def test_every_way_to_the_output_has_the_gradients_of_the_adapted_weight(factors: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 40).double()
    adapters = attach(nn.ModuleDict({"layer": layer}), "boft", targets="layer", block_size=4, factors=factors)
    (parameter,) = adapters.parameters()
    with torch.no_grad():
        parameter.normal_(std=0.3)
    x, g = torch.randn(tokens, 32).double().requires_grad_(), torch.randn(tokens, 40).double()
    found = torch.autograd.grad(layer(x), (x, parameter), g)
    dense = nn.functional.linear(x, adapters.weight("layer"), layer.bias)
    expected = torch.autograd.grad(dense, (x, parameter), g)
    torch.testing.assert_close(found, expected)
