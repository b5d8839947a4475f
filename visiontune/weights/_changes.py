"""From the tensors that a file has of one layer to the change of that layer, by the formula of their format.

    LoRA          s up down                              with a core:  s up core down (Tucker)
    LoHa          s (w1_a w1_b) * (w2_a w2_b)            each product with a core, if there is one
    LoKr          s w1 (x) w2                            each may be a product w_a w_b, w2 with a core
    OFT           (R^T - 1) W,  R = (1 + Q)(1 - Q)^-1    blocks of W's outputs; Q is no longer than alpha out
    differences   as they stand
    DoRA          m V / |V| - W,  V = W + one of the first three; lengths of rows or of columns

s is alpha / rank, times ``scalar`` where there is one; LoKr of two whole factors has s = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from visiontune.weights._factors import Factors

Parts = Mapping[str, Tensor]
# Rank of the layer -> s.
Strength = Callable[[int], float]


class Dense(NamedTuple):
    """The change of a layer as a whole: of its weight and of its bias, in their shapes; none is no change."""

    weight: Tensor | None
    bias: Tensor | None = None


class Misfit(Exception):
    """What is wrong with the tensors of a layer, in words."""


def change_of(parts: Parts, weight: Tensor, strength: Strength, kohyas_oft: bool = False) -> Factors | Dense:
    """The change of a layer.

    Args:
        parts: by their names in :mod:`visiontune.weights._parts`; finite.
        weight: the base's.
        strength: see the module.
        kohyas_oft: OFT of kohya's scripts, in which alpha = 0 lets nothing turn; in LyCORIS it bounds nothing.

    Raises:
        Misfit: a part is missing or superfluous, or the parts do not fit each other or the layer.
    """
    left = dict(parts)
    bias = left.pop("diff_b", None)
    try:
        found = _of_weight(left, weight, strength, kohyas_oft)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in parts.items())
        raise Misfit(f"has tensors that do not fit each other ({shapes}): copy the file again") from error
    if left:
        raise Misfit(f"has '{next(iter(left))}', but not what belongs to it: copy the file again")
    if isinstance(found, Factors) and bias is None:
        return found
    whole = None if found is None else dense(found, weight).weight
    return Dense(None if whole is None else whole.float(), bias)


def dense(change: Factors | Dense, weight: Tensor) -> Dense:
    """The same change as a whole."""
    if isinstance(change, Dense):
        return change
    delta = _delta(change, weight)
    return Dense(delta if change.lengths is None else _decompose(delta, change.lengths, weight))


def _delta(factors: Factors, weight: Tensor) -> Tensor:
    return (factors.up.double() @ factors.down.flatten(1).double()).view(weight.shape)


def _of_weight(left: dict[str, Tensor], weight: Tensor, strength: Strength, kohyas: bool) -> Factors | Dense | None:
    """Takes the parts that it uses out of ``left``."""
    for mark, make in (("down", _lora), ("up", _lora), ("hada", _loha), ("lokr", _lokr)):
        if any(part.startswith(mark) for part in left):
            return make(left, weight, strength)
    if "oft_blocks" in left:
        return Dense(_oft(left, weight, kohyas))
    return Dense(_shaped(left.pop("diff"), weight)) if "diff" in left else None


def _lora(left: dict[str, Tensor], weight: Tensor, strength: Strength) -> Factors | Dense:
    down, up = (_take(left, part, f"{part} factor") for part in ("down", "up"))
    rank = up.shape[1]
    if "mid" in left:
        down = torch.einsum("ij...,jr->ir...", left.pop("mid"), down.view(down.shape[:2]))
    if len(down) != rank or up[0, 0].numel() != 1:
        raise RuntimeError
    if len(up) != len(weight):
        raise _other_model(up, weight)
    down = _shaped(down, weight, rows=rank)
    factors = Factors(down, _scale(left, rank, strength) * up.flatten(1))
    lengths, scales = left.pop("lengths", None), left.pop("dora_scale", None)
    if scales is not None and not _of_rows(scales, weight):
        return Dense(_decompose(_delta(factors, weight), scales, weight))
    lengths = scales if lengths is None else lengths
    if lengths is not None and lengths.numel() != len(weight):
        raise RuntimeError
    return factors._replace(lengths=None if lengths is None else lengths.double().flatten())


def _loha(left: dict[str, Tensor], weight: Tensor, strength: Strength) -> Dense:
    halves = [_product(left, f"hada_w{i}", f"hada_t{i}", weight) for i in (1, 2)]
    (first, rank), (second, _) = halves
    return _whole(left, first * second * _scale(left, rank, strength), weight)


def _lokr(left: dict[str, Tensor], weight: Tensor, strength: Strength) -> Dense:
    factors = [
        (left.pop(f"lokr_w{i}"), 0) if f"lokr_w{i}" in left else _product(left, f"lokr_w{i}", f"lokr_t{i}", weight)
        for i in (1, 2)
    ]
    (first, one), (second, two) = factors
    if first.dim() != 2 or second.dim() < 2 or first.numel() * second.numel() != weight.numel():
        raise _other_model(second, weight)
    if not (one or two):
        left.pop("alpha", None)  # says nothing where both are whole
        strength = _one
    scale = _scale(left, two or one or 1, strength)
    kron = torch.kron(first.view(*first.shape, *[1] * (second.dim() - 2)), second)
    return _whole(left, kron * scale, weight)


def _one(rank: int) -> float:
    return 1.0


def _product(left: dict[str, Tensor], stem: str, core: str, weight: Tensor) -> tuple[Tensor, int]:
    """``a b``, or with a core [r, r, kernel ...] what it makes of a [r, out] and b [r, in]; and r."""
    a, b = (_take(left, f"{stem}_{half}", f"{stem}_{half}") for half in "ab")
    middle = left.pop(core, None)
    rows, kernel = (len(a), 1) if middle is None else (a.shape[1], middle[0, 0].numel())
    # A small file can ask for a product that fills the memory.
    if rows * b.shape[1] * kernel > weight.numel():
        raise _other_model(b, weight)
    return a @ b if middle is None else torch.einsum("ij...,ip,jr->pr...", middle, a, b), len(b)


def _oft(left: dict[str, Tensor], weight: Tensor, kohyas: bool) -> Tensor:
    blocks, alpha, rescale = left.pop("oft_blocks"), left.pop("alpha", None), left.pop("rescale", None)
    if blocks.dim() == 4:
        raise Misfit("is BOFT of LyCORIS, a format that is not read here: merge it with the tool that wrote it")
    if len(blocks) * blocks.shape[1] != len(weight):
        raise _other_model(blocks, weight)
    w, q = weight.double(), blocks.double() - blocks.double().mT
    bound = 0.0 if alpha is None else _number("alpha", alpha) * len(weight)
    if kohyas or bound > 0:
        q = q * (min(float(q.norm()), bound) / q.norm().clamp_min(torch.finfo(q.dtype).tiny))
    one = torch.eye(q.shape[-1], dtype=q.dtype)
    turned = (torch.linalg.solve(one - q, one + q).mT @ w.reshape(*blocks.shape[:2], -1)).view(w.shape)
    return (turned if rescale is None else turned * rescale.double().view(-1, *[1] * (w.dim() - 1))) - w


def _whole(left: dict[str, Tensor], delta: Tensor, weight: Tensor) -> Dense:
    scales = left.pop("dora_scale", None)
    delta = _shaped(delta, weight)
    return Dense(delta if scales is None else _decompose(delta, scales, weight))


def _decompose(delta: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    """``lengths V / |V| - W`` over rows or columns, as the lengths lie."""
    w = weight.double()
    v, kept = w + delta.double(), 0 if _of_rows(lengths, weight) else 1
    shape = [-1 if d == kept else 1 for d in range(w.dim())]
    if lengths.numel() != w.shape[kept]:
        raise RuntimeError
    norm = torch.linalg.vector_norm(v, dim=[d for d in range(w.dim()) if d != kept], keepdim=True)
    return lengths.double().view(shape) / norm.clamp_min(torch.finfo(w.dtype).tiny) * v - w


def _of_rows(lengths: Tensor, weight: Tensor) -> bool:
    return lengths.dim() > 0 and len(lengths) == lengths.numel() == len(weight)


def _scale(left: dict[str, Tensor], rank: int, strength: Strength) -> float:
    if not rank:
        raise RuntimeError
    alpha, scalar = left.pop("alpha", None), left.pop("scalar", None)
    scale = strength(rank) if alpha is None else _number("alpha", alpha) / rank
    return scale if scalar is None else scale * _number("scalar", scalar)


def _number(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise Misfit(f"has {value.numel()} values of {name}, not one: copy the file again")
    return float(value)


def _take(left: dict[str, Tensor], part: str, what: str) -> Tensor:
    if part not in left:
        raise Misfit(f"has no {what}: copy the file again")
    return left.pop(part)


def _shaped(value: Tensor, weight: Tensor, rows: int | None = None) -> Tensor:
    """``value`` in the shape of ``weight``, or with so many rows; its kernel may be flat, or left out if 1x1."""
    shape = weight.shape if rows is None else torch.Size((rows, *weight.shape[1:]))
    flat = value.dim() == 2 or len(shape) == 2
    if value.shape == shape or (flat and len(value) == shape[0] and value[0].numel() == shape[1:].numel()):
        return value.reshape(shape)
    raise _other_model(value, weight)


def _other_model(value: Tensor, weight: Tensor) -> Misfit:
    found = f"a tensor of shape {tuple(value.shape)}, the model's weight {tuple(weight.shape)}"
    return Misfit(f"has {found}: give the model that it was trained on")
