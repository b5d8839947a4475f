"""What the contract suites have to know of each adapter method, collected from the test files of the methods."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visiontune.adapters import AdapterSet


@dataclass(frozen=True)
class Declared:
    """One method, in the ``CONTRACT`` of its test file.

    count: the number of parameters that a layer gets under given options
    options: what fits layers of a dozen inputs, where the defaults do not
    variants: other options under which every check holds too
    straight_through: the output is piecewise constant in what is trained, and its gradient another function's by
        intention; the method's own tests hold it against the closed form
    export_options: further ones under which its change fits the files of other tools

    Of a method that looks at the task before training:

    plan_options: instead of ``options``
    plan_variants: as ``variants``
    budget: compares the planned set with one that is not, where the method promises how much it trains
    start_moves: the options that start it elsewhere than at the base, as its documentation says
    """

    count: Callable[[nn.Module, dict], int]
    options: dict = field(default_factory=dict)
    variants: tuple[dict, ...] = ()
    straight_through: bool = False
    export_options: dict = field(default_factory=dict)
    plan_options: dict | None = None
    plan_variants: tuple[dict, ...] = ()
    budget: Callable[[AdapterSet, AdapterSet], None] | None = None
    start_moves: tuple[str, ...] = ()

    @property
    def looks(self) -> bool:
        """Whether it looks at the task before training."""
        return self.plan_options is not None or bool(self.plan_variants) or self.budget is not None


@functools.cache
def _contracts() -> dict[str, dict[str, Declared]]:
    files = sorted((Path(__file__).parents[1] / "adapters").glob("test_*.py"))
    return {f.name: getattr(importlib.import_module(f"adapters.{f.stem}"), "CONTRACT", {}) for f in files}


def declared() -> dict[str, Declared]:
    """Every declared method, by name."""
    found = {method: entry for contract in _contracts().values() for method, entry in contract.items()}
    return dict(sorted(found.items()))


def declaring(method: str) -> list[str]:
    """The test files that declare the method."""
    return [file for file, contract in _contracts().items() if method in contract]


def turn(module: nn.Module, std: float = 0.1, seed: int = 2) -> None:
    """Give what is trained values as after some training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn(p.shape, generator=rng).to(p))


def turned(module: Any, std: float = 0.2) -> Any:
    """The module, turned and in evaluation mode."""
    turn(module, std)
    return module.eval()


def full_rank(module: nn.Module) -> int:
    """The largest rank that the matrix of one of the layer's groups can have."""
    return min(module.weight.shape[0] // getattr(module, "groups", 1), module.weight[0].numel())


def count_lora(module: nn.Module, options: dict) -> int:
    if isinstance(module, nn.Embedding):
        return options["rank"] * sum(module.weight.shape)
    groups, out = getattr(module, "groups", 1), module.weight.shape[0]
    return options["rank"] * (groups * module.weight[0].numel() + out) + (out if options.get("dora") else 0)


def same_count(adapters: AdapterSet, unprepared: AdapterSet) -> None:
    """A budget of parameters."""
    assert adapters.parameter_count == unprepared.parameter_count
