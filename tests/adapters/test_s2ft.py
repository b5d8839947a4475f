"""S2FT: whole channels, their gradient, and what is kept for it."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from visiontune.adapters import attach


def _count(module: nn.Module, options: dict) -> int:
    channels = module.weight.shape[0 if options.get("side") == "outputs" else 1]
    return math.ceil(options["share"] * channels - 1e-9) * module.weight.numel() // channels


CONTRACT = {
    "s2ft": Declared(_count, {"share": 0.3}, variants=({"share": 0.2, "side": "outputs", "choice": "largest"},))
}


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("choice", ["random", "largest", "smallest"])
def test_only_the_chosen_channels_move_and_get_the_dense_gradient(side: str, choice: str) -> None:
    layer = nn.Linear(12, 8).double()
    x, weight = torch.randn(5, 12, dtype=torch.float64), layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, weight, layer.bias).pow(2).sum().backward()
    net = nn.ModuleDict({"layer": layer})
    adapters = attach(net, "s2ft", targets="layer", share=0.25, side=side, choice=choice)
    net["layer"](x).pow(2).sum().backward()
    dim = 1 if side == "inputs" else 0
    adapter = adapters.methods()[0].adapters["layer"]
    torch.testing.assert_close(adapter.change.grad, weight.grad.index_select(dim, adapter.index))
    with torch.no_grad():
        adapter.change.fill_(1.0)
    moved = (adapters.weight("layer") != weight).transpose(0, dim)
    assert moved.all(1).nonzero().flatten().tolist() == adapter.index.tolist() == sorted(set(adapter.index.tolist()))
    assert int(moved.any(1).sum()) == (3 if side == "inputs" else 2)
    if choice != "random":
        norms = weight.detach().transpose(0, dim).norm(dim=1)
        inside, outside = norms[moved.all(1)], norms[~moved.all(1)]
        assert inside.min() > outside.max() if choice == "largest" else inside.max() < outside.min()


def test_the_choice_differs_between_layers_and_seeds_and_is_repeated() -> None:
    def chosen(seed: int) -> list[list[int]]:
        net = nn.ModuleDict({name: nn.Linear(64, 8) for name in ("a", "b")})
        adapters = attach(net, "s2ft", targets="Linear", share=0.25, seed=seed)
        return [adapter.index.tolist() for adapter in adapters.methods()[0].adapters.values()]

    assert chosen(0) == chosen(0)
    assert chosen(0)[0] != chosen(0)[1]
    assert chosen(0) != chosen(1)


def test_for_columns_only_the_chosen_inputs_are_kept() -> None:
    layer = nn.Linear(100, 8)
    attach(nn.ModuleDict({"layer": layer}), "s2ft", targets="layer", share=0.05)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // 4)
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(30, 100)).sum()
    assert max(sizes) == 30 * 5


def test_two_tasks_on_different_channels_add_up() -> None:
    layer = nn.Linear(40, 8)
    net, base = nn.ModuleDict({"layer": layer}), layer.weight.detach().clone()
    sets = [attach(net, "s2ft", targets="layer", name=f"task{seed}", share=0.05, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for i, adapters in enumerate(sets):
            next(adapters.parameters()).fill_(i + 1.0)
    change = sets[1].weight("layer") - base
    expected = torch.zeros(8, 40)
    for i, adapters in enumerate(sets):
        expected[:, adapters.methods()[0].adapters["layer"].index] += i + 1.0
    torch.testing.assert_close(change, expected)
