"""APET: that the choice has its size, is by chance alone, follows the seed, and comes back from a file without it."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.declared import Declared, turn
from torch import nn

from visiontune.adapters import AdapterSet, attach, load
from visiontune.adapters.apet import by_layers, drawn
from visiontune.errors import UserError


def _count(module: nn.Module, options: dict) -> int:
    parts = module.parameters() if options.get("biases", True) else [module.weight]
    return max(1, math.ceil(options["budget"] * sum(p.numel() for p in parts) - 1e-6))


CONTRACT = {
    "apet": Declared(
        _count, {"budget": 0.4}, variants=({"budget": 0.05, "biases": False}, {"budget": 1.0, "unit": "layers"})
    )
}


def net() -> nn.Sequential:
    """1328 entries, 56 of them biases."""
    return nn.Sequential(nn.Linear(24, 32), nn.Conv1d(32, 8, 1), nn.Linear(8, 16), nn.Embedding(8, 15)).double()


def made(seed: int = 0, **options) -> AdapterSet:
    model = net()
    torch.manual_seed(seed)
    return attach(model, "apet", targets=["Linear", "Conv1d", "Embedding"], **options)


def positions(adapters: AdapterSet) -> dict[str, list[int]]:
    return {key: value.tolist() for key, value in adapters.tensors().items() if key.endswith("index")}


@pytest.mark.parametrize("unit", ["entries", "layers"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("budget", [1e-6, 0.013, 0.3, 0.77, 1.0])
def test_a_budget_is_met_exactly_over_all_layers(budget: float, biases: bool, unit: str) -> None:
    every = sum(p.numel() for name, p in net().named_parameters() if biases or name.endswith("weight"))
    adapters = made(budget=budget, biases=biases, unit=unit)
    assert adapters.parameter_count == max(1, math.ceil(budget * every - 1e-6))
    assert all(found == sorted(set(found)) for found in positions(adapters).values())
    assert biases or not any(found for key, found in positions(adapters).items() if key.endswith("bias_index"))


@pytest.mark.parametrize("count", [3, 9])
def test_every_choice_of_one_size_is_as_likely_as_any_other(count: int) -> None:
    """Of single places, and of two together, which a choice in runs or by blocks would favour."""
    torch.manual_seed(0)
    size, tries = 12, 20_000
    masks = torch.stack([drawn(size, count) for _ in range(tries)]).double()
    assert (masks.sum(1) == count).all()
    together = masks.T @ masks / tries
    single, pair = count / size, count * (count - 1) / (size * (size - 1))
    expected = torch.full((size, size), pair, dtype=torch.float64).fill_diagonal_(single)
    assert ((together - expected).abs() < 5 * (expected * (1 - expected) / tries).sqrt()).all()


def test_layers_are_drawn_whole_but_the_last() -> None:
    torch.manual_seed(0)
    sizes = [50, 20, 30, 40]
    first = set()
    for _ in range(100):
        counts = [int(mask.sum()) for mask in by_layers(sizes, 60)]
        assert sum(counts) == 60
        assert sum(0 < count < size for count, size in zip(counts, sizes, strict=True)) <= 1
        first |= {i for i, count in enumerate(counts) if count == sizes[i]}
    assert first == {0, 1, 2, 3}


def test_the_choice_follows_the_seed_and_nothing_of_the_base() -> None:
    one = positions(made(0, budget=0.1))
    assert one == positions(made(0, budget=0.1)), "the weights are others"
    assert one != positions(made(1, budget=0.1))


def test_only_chosen_entries_move_and_get_the_gradient_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6)).double()
    whole = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 6)).double()
    whole.load_state_dict(model.state_dict())
    x = torch.randn(5, 10, dtype=torch.float64)
    whole(x).pow(2).sum().backward()
    adapters = attach(model, "apet", targets="Linear", budget=0.2)
    model(x).pow(2).sum().backward()
    for name, entry in adapters.adapters().items():
        layer = whole.get_submodule(name)
        torch.testing.assert_close(entry.change.grad, layer.weight.grad.take(entry.index))
    turn(adapters)
    moved = sum(int((adapters.weight(name) != model.get_submodule(name).weight).sum()) for name in ("0", "1"))
    moved += sum(int((adapters.bias(name) != model.get_submodule(name).bias).sum()) for name in ("0", "1"))
    assert moved == adapters.parameter_count == 29


@pytest.mark.parametrize("unit", ["entries", "layers"])
def test_a_file_brings_the_choice_under_any_seed(unit: str, tmp_path) -> None:
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    adapters = attach(model, "apet", targets=["Linear", "Conv1d"], budget=0.3, unit=unit)
    turn(adapters)
    path = adapters.save(tmp_path / "a.safetensors")
    torch.manual_seed(123)
    loaded = load(twin, path)
    assert positions(loaded) == positions(adapters)
    assert all(torch.equal(loaded.weight(name), adapters.weight(name)) for name in adapters.layers)


@pytest.mark.parametrize("budget", [0.0, 1.01, -1.0])
def test_impossible_budgets_are_refused(budget: float) -> None:
    with pytest.raises(UserError, match="budget"):
        attach(net(), "apet", targets="Linear", budget=budget)
