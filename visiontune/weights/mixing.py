"""Adapters of one base mixed by their changes: what a mean of two weights is, whatever the methods.

    W' = W + sum_k s_k D_k

with D_k what each makes of the base by itself. Shares 1 - l and l of two are the interpolation of weights by which
Cideron et al., 2024, arXiv 2410.06084, choose between the quality of one and the diversity of the other. Means of the
factors of two LoRAs are something else: their product has terms that belong to neither. ``merged`` is the same of whole
models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from visiontune.adapters import AdapterSet
from visiontune.errors import UserError
from visiontune.weights._changes import Dense
from visiontune.weights._factors import Factors
from visiontune.weights.lora_files import attach_changes


@torch.no_grad()
def mixed(
    networks: Mapping[str, nn.Module], sets: Sequence[AdapterSet], shares: Sequence[float], name: str = "mixed"
) -> AdapterSet:
    """Attach the mixture, in evaluation mode.

    Args:
        networks: all of the model's, by name.
        sets: attached to them, not merged, each at its present strength. They go on acting: disable or detach them.
        shares: of each.
        name: see :func:`visiontune.adapters.attach`.
    """
    parts: dict[str, list[tuple[AdapterSet, float]]] = {}
    for one, share in zip(sets, shares, strict=True):
        for layer in one.base_layers():
            parts.setdefault(layer, []).append((one, share))
    return attach_changes({layer: _sum(layer, given) for layer, given in parts.items()}, networks, name)


def _sum(layer: str, parts: Sequence[tuple[AdapterSet, float]]) -> Factors | Dense:
    """What sets with their shares change in a layer: their factors side by side where all have some."""
    factors = [(one.low_rank(layer), share) for one, share in parts]
    if all(pair is not None for pair, _ in factors):
        known = [(*pair, share) for pair, share in factors if pair is not None]
        down = torch.cat([down.float() for down, _, _ in known])
        return Factors(down, torch.cat([share * up.float() for _, up, share in known], 1))
    total = Dense(None)
    for one, share in parts:
        weight, bias = one.change(layer)
        total = Dense(_added(total.weight, share, weight), _added(total.bias, share, bias))
    return total


def _added(total: torch.Tensor | None, share: float, more: torch.Tensor | None) -> torch.Tensor | None:
    if more is None:
        return total
    return share * more if total is None else total + share * more


@torch.no_grad()
def merged(
    base: Mapping[str, torch.Tensor], others: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Weights of models that were trained from one base, mixed, in the base's types.

    Whole numbers (positions, counters) are the base's, and so is, bit for bit, what nobody changed.

    Args:
        base: name -> value. others: of each model, by the same names. shares: of each.

    Raises:
        UserError: a model has another value's name or shape.
    """
    for number, other in enumerate(others, start=1):
        strange = [name for name, value in base.items() if getattr(other.get(name), "shape", None) != value.shape]
        if strange or len(other) != len(base):
            raise UserError(
                f"model {number} is not one of the base: {min(strange or other.keys() - base.keys())} has no "
                "counterpart of its shape: give runs of one base"
            )
    return {name: _merged(value, [other[name] for other in others], shares) for name, value in base.items()}


def _merged(value: torch.Tensor, others: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    high = value.double()
    for other, share in zip(others, shares, strict=True):
        high = high + share * (other.double() - value.double())
    return high.to(value.dtype)
