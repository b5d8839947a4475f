"""Layers that know their adapters.

A layer is adapted by giving the *instance* a subclass of its own class. Names of submodules, state-dict keys,
``isinstance`` checks and ``save_pretrained`` therefore stay those of the base model, and several sets share one layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._quantised import is_quantised, weight_of
from visiontune.ops.shards import whole

if TYPE_CHECKING:
    from visiontune.adapters.base import Adapter, AdapterSet, Method

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass
class Entry:
    """One adapter of one layer, and where it belongs."""

    owner: AdapterSet
    method: Method
    adapter: Adapter


class Beneath:
    """A layer as one of its adapters sees it: the frozen layer with the adapters under that one applied."""

    def __init__(self, layer: Any, entries: Sequence[Entry]) -> None:
        self.layer = layer
        self.entries = entries

    @property
    def frozen(self) -> bool:
        """Whether the weight may be used as it is: nothing beneath is trained, and it is not quantised."""
        if self.entries or is_quantised(self.layer):
            return False
        return not any(p.requires_grad for p in self.layer.parameters(recurse=False))

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for the input ``x``."""
        if not self.entries:
            return self.layer.frozen_forward(x)
        *below, top = self.entries
        return top.adapter.forward(x, Beneath(self.layer, below), top.owner.scale)

    def weight(self) -> Tensor:
        """The layer's weight, in its own dtype; of a quantised layer what it stands for."""
        weight = weight_of(self.layer)
        for entry in self.entries:
            weight = entry.adapter.weight(weight, entry.owner.scale)
        return weight

    def bias(self) -> Tensor | None:
        """The layer's bias, in its own dtype; ``None`` where it has none."""
        bias = getattr(self.layer, "bias", None)
        for entry in self.entries:
            bias = entry.adapter.bias(bias, entry.owner.scale)
        return bias

    def using(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of the layer if ``weight`` were its weight and ``bias`` its bias (``None``: the one it has)."""
        bias = self.bias() if bias is None else bias
        if is_quantised(self.layer):
            dtype = compute_dtype(x)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return run(self.layer, x, weight, bias)


class Adapted(nn.Module):
    """What :func:`adopt` mixes into a layer's class."""

    entries: list[Entry]
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return Beneath(self, [entry for entry in self.entries if entry.owner.active])(x)

    def frozen_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The sets are not submodules, so `model.to(device)` would leave them behind; their dtype stays float32.
        result = super()._apply(fn, recurse)
        follow(self)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle must be told how to make it again.
        return empty, (Adapted, type(self).__mro__[2]), self.__dict__


@functools.cache
def mixed(mixin: type, cls: Any) -> Any:
    """The subclass of ``cls`` that ``mixin`` acts in."""
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def empty(mixin: type, cls: Any) -> Any:
    """An instance of that subclass for pickle to fill."""
    made = mixed(mixin, cls)
    return made.__new__(made)


def follow(layer: Any) -> None:
    """Move the methods with adapters on a layer to where the layer is."""
    if layer.weight.device.type != "meta":
        for entry in entries_of(layer):
            if place_of(entry) != layer.weight.device:
                entry.method.to(layer.weight.device)


def place_of(entry: Entry) -> torch.device:
    """Where the parameters of an adapter's method lie."""
    return next(entry.method.parameters()).device


def brought(weight: Tensor, place: torch.device) -> Tensor:
    """A base's weight where its adapters are: whole where it is sharded, and moved where it rests elsewhere."""
    return whole(weight).to(place)


def adopt(layer: nn.Module, entry: Entry) -> None:
    """Put an adapter on top of those that the layer has."""
    if not isinstance(layer, Adapted):
        cls: Any = type(layer)
        layer.__class__ = mixed(Adapted, cls)
        layer.__dict__["entries"] = []
    layer.__dict__["entries"].append(entry)


def release(layer: nn.Module, owner: AdapterSet) -> None:
    """Take the adapter of the set ``owner`` off the layer; without adapters it has its own class again."""
    entries = layer.__dict__["entries"]
    entries[:] = [entry for entry in entries if entry.owner is not owner]
    if not entries:
        del layer.__dict__["entries"]
        layer.__class__ = type(layer).__mro__[2]


def entries_of(layer: nn.Module) -> list[Entry]:
    """The adapters of a layer, the lowest first."""
    return layer.__dict__.get("entries", []) if isinstance(layer, Adapted) else []


@torch.no_grad()
def change(layer: Any, entries: Sequence[Entry]) -> tuple[Tensor, Tensor | None]:
    """What some adapters of a layer, at least one and each on top of those before it, add to its weight and bias.

    Returns:
        In float32 or wider; ``None`` for a bias that stays as it is. A layer without one gets it whole.
    """
    place, bias = place_of(entries[0]), getattr(layer, "bias", None)
    frozen, bias = brought(weight_of(layer), place), None if bias is None else brought(bias, place)
    base = frozen.to(torch.promote_types(frozen.dtype, torch.float32))
    before = None if bias is None else bias.to(base)
    weight, moved = base, before
    for entry in entries:
        weight = entry.adapter.weight(weight, entry.owner.scale)
        moved = entry.adapter.bias(moved, entry.owner.scale)
    if moved is before or moved is None:
        return weight - base, None
    return weight - base, moved if before is None else moved - before


def run(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a layer with another weight and bias of the same shapes."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, layer.sparse)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    return layer._conv_forward(x, weight, bias)


def pointwise(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The output for what :func:`run` gave of a linear layer, or a 1x1 convolution in the groups of a convolution.

    Args:
        layer: the linear layer or convolution whose first factor ``x`` went through.
        weight: [out, r], with r the channels of each group of ``x``.
    """
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    dims = layer.weight.dim()
    return _CONV[dims](x, weight.view(*weight.shape, *[1] * (dims - 2)), groups=layer.groups)


def fan_in(layer: Any) -> int:
    """Inputs of one output: in features of a linear layer, in / groups x kernel of a convolution."""
    return math.prod(layer.weight.shape[1:])


def masters(layer: Any) -> dict[str, Any]:
    """Device and dtype of trainable parameters for a layer: float32, or float64 where the layer is."""
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return {"device": weight.device, "dtype": dtype}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies ``x``: autocast's, where it is on."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return x.dtype  # autocast leaves it alone
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


Values = tuple[Tensor, Tensor | None]


def swap(layers: Mapping[str, nn.Module], values: Mapping[str, Values]) -> dict[str, Values]:
    """Give layers another weight and bias and return the parameters they had.

    The parameters are replaced rather than written to: one that another module shares stays as it is.
    """
    before: dict[str, Values] = {}
    for name, layer in layers.items():
        bias = getattr(layer, "bias", None)
        assert isinstance(layer.weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        before[name], (weight, other) = (layer.weight, bias), values[name]
        layer.weight = _parameter(weight, layer.weight)
        if other is not bias:
            layer.register_parameter("bias", None if other is None else _parameter(other, layer.weight))
    return before


def _parameter(new: Tensor, old: Tensor) -> nn.Parameter:
    if not isinstance(new, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    if new.device != old.device or new.dtype != old.dtype:
        # The model was moved or cast while its originals were laid aside.
        new.data = new.data.to(old.device, old.dtype)
    return new
