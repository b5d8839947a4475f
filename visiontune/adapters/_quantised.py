"""Linear layers whose weight is stored in few bits: by torchao (a tensor subclass) or bitsandbytes (packed codes).

The frozen product stays the library's kernel. Whatever needs the weight itself gets it dequantised, for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_quantised(layer: Any) -> bool:
    """Whether a layer's weight is codes rather than numbers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and (_is_subclass(weight) or not weight.is_floating_point())


def weight_of(layer: Any) -> Any:
    """The layer's weight, dequantised where it is quantised."""
    return dequantised(layer) if is_quantised(layer) else layer.weight


def lost_of(layer: Any) -> tuple[Tensor, Tensor] | None:
    """``down`` [r, in] and ``up`` [out, r], whose product a quantised layer adds to its codes; none for others."""
    return (layer.lost_down, layer.lost_up) if hasattr(layer, "lost_down") else None


@torch.no_grad()
def dequantised(layer: Any) -> Tensor:
    """The numbers of a quantised layer, [out, in]: what its codes stand for, and what it adds to them.

    They are float32 for bitsandbytes' int8, which has no dtype of its own.

    Raises:
        TypeError: codes of an unknown kind.
    """
    values, lost = _of_codes(layer), lost_of(layer)
    return values if lost is None else values + (lost[1] @ lost[0]).to(values)


def _of_codes(layer: Any) -> Tensor:
    weight = layer.weight
    if _is_subclass(weight):
        return weight.dequantize()
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes import functional

        data, state = weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        return functional.dequantize_4bit(data, state)
    state = getattr(layer, "state", None)
    scales = next((s for s in (getattr(weight, "SCB", None), getattr(state, "SCB", None)) if s is not None), None)
    if scales is None:
        raise TypeError(f"weight of dtype {weight.dtype} in a {type(layer).__name__}: no scales to dequantise it by")
    return weight.data.float() * (scales.float() / 127)[:, None]


def error_of(layer: Any, values: Tensor) -> float:
    """How far the dequantised ``values`` may be from the weight that was quantised; 0 where none was.

    Int8 rounds to 1/127 of a row's largest magnitude, and fp8 keeps three bits behind the first of each number. Four
    bits (nf4) have a gap of 0.3 of a block's largest, whose own
    rounding comes on top. What a layer adds to its codes moves single numbers by as much again.
    """
    if not is_quantised(layer):
        return 0.0
    codes = getattr(layer.weight, "qdata", layer.weight)
    lost = lost_of(layer)
    added = 0.0 if lost is None else float((lost[1] @ lost[0]).abs().max())
    share = {torch.int8: 0.005, torch.float8_e4m3fn: 0.0625}.get(codes.dtype, 0.18)
    return float(values.abs().max()) * share + added


def _is_subclass(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize


class Plain(nn.Linear):
    """A quantised layer as methods see it when they are built: weight and shape of the numbers, parameters none."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.__dict__["layer"] = layer

    weight = property(lambda self: dequantised(self.layer))
    bias = property(lambda self: self.layer.bias)
    lost_down = property(lambda self: self.layer.lost_down)
    lost_up = property(lambda self: self.layer.lost_up)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the layer itself."""
        return self.__dict__["layer"].parameters(recurse)


def plain(layer: nn.Module) -> nn.Module:
    """The layer, or what stands for it where it is quantised."""
    return Plain(layer) if is_quantised(layer) else layer
