"""Layers that another tool has as one: changes of several of the model's layers as one, and one as those of several.

The outputs of the one are those of the several, one after the other. As factors it has theirs below one another, and in
the second one block for each: with as many rows of the first for every layer, as files of kohya's scripts have them, by
which some readers cut them apart again. Where a layer does not change, its block is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visiontune.adapters._quantised import weight_of
from visiontune.adapters.lora import row_lengths
from visiontune.weights._changes import Dense, Misfit
from visiontune.weights._factors import Factors
from visiontune.weights.keys import Keys, Native


def joined(native: Native, parts: Mapping[str, Factors], keys: Keys) -> Factors | None:
    """The factors of a native layer from those of the layers that change; none where none of them does."""
    found = [parts[layer] for layer in native.layers if layer in parts]
    if not found:
        return None
    if len(native.layers) == 1:
        return _turned(found[0]) if native.swapped else found[0]
    rank, like = max(part.rank for part in found), found[0]
    down, up, lengths = [], [], []
    for layer in native.layers:
        own = parts.get(layer) or _nothing(layer, like, keys)
        down.append(_grown(own.down, rank, 0))
        up.append(_grown(own.up, rank, 1))
        if own.lengths is not None:
            lengths.append(own.lengths)
    made = Factors(torch.cat(down), torch.block_diag(*up), torch.cat(lengths) if lengths else None)
    return _turned(made) if native.swapped else made


def stacked(native: Native, parts: Mapping[str, Dense], keys: Keys) -> Dense:
    """The whole change of a native layer from those of the layers that change."""
    found: list[Tensor | None] = []
    for i in range(2):
        values = {layer: value for layer, part in parts.items() if (value := part[i]) is not None}
        found.append(_stack(native, values, keys) if values else None)
    return Dense(*found)


def split(native: Native, change: Factors | Dense, rows: Sequence[int]) -> dict[str, Factors | Dense]:
    """The change of each layer, of so many rows, from that of the native one; those without any are left out.

    Rows of the first factor that a layer's part of the second does not use are left out too.

    Raises:
        Misfit: a change of the bias has other numbers of rows.
    """
    if len(rows) == 1 and not native.swapped:
        return {native.layers[0]: change}
    if isinstance(change, Dense):
        if change.bias is not None and len(change.bias) != sum(rows):
            raise Misfit("has a change of its bias that the model's layers do not take")
        halves = [[None] * len(rows) if value is None else _cut(value, native, rows) for value in change]
        dense = (Dense(*(None if v is None or not v.any() else v for v in own)) for own in zip(*halves, strict=True))
        return {layer: own for layer, own in zip(native.layers, dense, strict=True) if any(v is not None for v in own)}
    lengths = [None] * len(rows) if change.lengths is None else _cut(change.lengths, native, rows)
    found: dict[str, Factors | Dense] = {}
    for layer, up, own in zip(native.layers, _cut(change.up, native, rows), lengths, strict=True):
        used = up.any(0)
        used[0] |= own is not None  # lengths alone are a change too
        if used.any():
            found[layer] = Factors(change.down[used], up[:, used], own)
    return found


def whole(native: Native, weights: Sequence[Tensor]) -> Tensor:
    """The native layer's weight from those of its layers."""
    made = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return _exchanged(made) if native.swapped else made


def _nothing(layer: str, like: Factors, keys: Keys) -> Factors:
    """Factors of no change, for a layer of the same inputs."""
    base = keys.module(layer)
    lengths = None if like.lengths is None else row_lengths(weight_of(base)).to(like.lengths)
    return Factors(like.down[:0], like.up.new_zeros(base.out_features, 0), lengths)


def _grown(value: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis)


def _stack(native: Native, values: Mapping[str, Tensor], keys: Keys) -> Tensor:
    like = next(iter(values.values()))
    rows = {layer: keys.module(layer).out_features for layer in native.layers if layer not in values}
    parts = [values[n] if n in values else like.new_zeros(rows[n], *like.shape[1:]) for n in native.layers]
    return whole(native, parts)


def _turned(factors: Factors) -> Factors:
    lengths = None if factors.lengths is None else _exchanged(factors.lengths)
    return Factors(factors.down, _exchanged(factors.up), lengths)


def _exchanged(value: Tensor) -> Tensor:
    """The halves of the rows in the other order."""
    return torch.cat(value.chunk(2)[::-1])


def _cut(value: Tensor, native: Native, rows: Sequence[int]) -> tuple[Tensor, ...]:
    return (_exchanged(value) if native.swapped else value).split(list(rows))
