"""Inherit: most of a UNet is computed at some steps alone, and what it gave then is taken at those between.

Zhu et al., 2024, arXiv 2406.00210, the half of A-SDM that trains nothing: neighbouring steps compute nearly the same
features, so of `period` steps one computes all modules and the others take over what the chosen ones gave. Which step
it is tells the level of noise, and each of a step's calls inherits from its own kind alone.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from visiontune.errors import UserError
from visiontune.guidance._network import Layers, Network
from visiontune.guidance._taps import Forward, replaced
from visiontune.guidance.base import Point, Shaping, place
from visiontune.schema import option

_FEW = 8
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Kept:
    """What modules gave, by their names, at the step at which they were last computed; none are known at -1."""

    step: int = -1
    outputs: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.outputs[name] = forward(*args, **kwargs)
            return self.outputs[name]

        return noted

    def give(self, name: str, forward: Forward) -> Forward:
        return functools.wraps(forward)(lambda *args, **kwargs: self.outputs[name])


@dataclass(frozen=True, kw_only=True)
class Config(Shaping):
    """How often everything is computed, and what is not at the other steps."""

    NEUTRAL = 1.0

    scale: float = option(2.0, least=1, greatest=1000, help="period: of so many steps, one is computed in full")
    first: float = option(0.1, least=0, greatest=1, help="share of the steps, the first ones, all computed in full")
    layers: str | list[int | str] = option(
        "inner",
        help="what is inherited: inner (all but the first layer down and the last one up), deep (all but the outermost "
        "stages), mid, or patterns of the names of modules (up_blocks.1, *.attn2)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != int(self.scale):
            raise UserError(f"scale of inherit is a number of steps, and {self.scale:g} is no whole number")
        if self.schedule != "constant":
            raise UserError(f"inherit has no strength that could be {self.schedule}: leave out schedule, or set window")

    @property
    def remembers(self) -> bool:
        return True

    @contextmanager
    def shaping(self, network: Network, arguments: Mapping[str, Any], point: Point, side: str) -> Iterator[None]:
        if side == "at":  # calls for latents or conditions of a term's own, which no earlier step need have made
            yield
            return
        step, (keys, chosen) = self._step(point), self._settled(network, point)
        kept = point.memory.setdefault(side, Kept())
        latest = max((key for key in keys if key <= step), default=step)
        if latest < step and latest <= kept.step <= step:
            with replaced(chosen, kept.give):
                yield
            return
        kept.step = -1
        with replaced(chosen, kept.note):
            yield
        kept.step = step

    def keys(self, levels: Sequence[float]) -> list[int]:
        """The steps, of all that stand at these levels, at which it computes everything."""
        acting = [i for i, level in enumerate(levels) if self.acts([level])]
        lead = max(1, sum(i < math.ceil(self.first * len(levels)) for i in acting))
        return [i for n, i in enumerate(acting) if n < lead or (n - lead + 1) % self.scale == 0]

    def check(self, network: Network) -> None:
        self._modules(network)

    def note(self, network: Network, levels: Sequence[float]) -> str:
        inheriting = sum(self.acts([level]) for level in levels) - len(self.keys(levels))
        if not inheriting:
            raise UserError(
                f"inherit computes everything at each of the {len(levels)} steps: lower its first, which is "
                f"{self.first:g}, widen its window or take more steps"
            )
        layers, inherited = _layers(network.denoiser), sum(map(_layers, self._modules(network).values()))
        return (
            f"inherit: {inheriting} of {len(levels)} steps compute {layers - inherited} of the network's {layers} "
            "layers, and inherit what the others give"
        )

    def _settled(self, network: Network, point: Point) -> tuple[list[int], dict[str, nn.Module]]:
        """The steps that compute everything, and what the others inherit: found once a run, since names are many."""
        if "of the run" not in point.memory:
            levels = _steps(point)
            if len(levels) <= _FEW:
                _log.warning("inherit: %d steps differ much from one another, and have little to inherit", len(levels))
            point.memory["of the run"] = self.keys(levels), self._modules(network)
        found: tuple[list[int], dict[str, nn.Module]] = point.memory["of the run"]
        return found

    def _step(self, point: Point) -> int:
        if torch.is_grad_enabled():
            raise UserError("inherit is for drawing pictures: what steps inherit has no gradient, so take it out here")
        found = place(_steps(point), point.levels[0]) if len({*point.levels}) == 1 else None
        if found is None:
            raise UserError(
                "inherit takes over what earlier steps of a run gave, and this is a step of none that it knows"
            )
        return found

    def _modules(self, network: Network) -> dict[str, nn.Module]:
        return network.inside(self._names(network), "inherit")

    def _names(self, network: Network) -> Layers:
        if self.layers not in ("inner", "deep"):
            return self.layers
        down, middle, up = network.stages("inherit")
        (outermost, *below), (*above, last) = down, up
        names = [*below, *middle, *above]
        if self.layers == "inner":
            names += _all_but(0, outermost, down[outermost]) + _all_but(-1, last, up[last])
        return names


def _all_but(live: int, name: str, stage: nn.Module) -> list[str]:
    """The names of the parts of a stage, of whose layers one is left out: its ResNet, and the attention behind it."""
    found = []
    for kind, parts in stage.named_children():
        names = [f"{name}.{kind}.{i}" for i, _ in enumerate(parts.children())]
        if kind in ("resnets", "attentions"):
            del names[live]
        found += names
    return found


def _layers(module: nn.Module) -> int:
    """How many layers with weights are in a module."""
    return sum(any(True for _ in layer.parameters(recurse=False)) for layer in module.modules())


def _steps(point: Point) -> list[float]:
    """The levels of a run's steps, once each: some samplers call the network twice at one."""
    return [*dict.fromkeys(point.run.levels)]


def build(config: Config) -> Config:
    """The term."""
    return config
