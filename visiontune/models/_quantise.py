"""Quantisation of a frozen denoiser's linear layers, and what of its error is kept beside the codes.

Guo et al., "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
arXiv 2311.12023, section 3.1: W is split into codes Q and a product of two thin matrices by turns,

    Q = codes of (W - L),    L = best of rank r for |R (W - Q - L) C|,    until the error rises

R and C are diagonal: the identity, or roots of the mean squared gradients of W's rows and columns (section 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.errors import UserError

Kind = Literal["int8", "fp8", "nf4"]
# Later turns gain a hundredth of the error each, or nothing.
TURNS = 5


def quantise(module: nn.Module, kind: Kind, rank: int = 0, squares: Mapping[str, Tensor] | None = None) -> None:
    """See `visiontune.models.quantise`."""
    try:
        layers = {name: layer for name, layer in module.named_modules() if name and type(layer) is nn.Linear}
        squares = _checked(squares or {}, layers, rank)
        lost = {name: split(layer, kind, rank, squares.get(name)) for name, layer in layers.items() if rank}
        _nf4(module) if kind == "nf4" else _torchao(module, kind)
    except ImportError as error:
        raise UserError(
            f"model.quantize={kind} needs {'bitsandbytes' if kind == 'nf4' else 'torchao'} ({error}): "
            "pip install 'visiontune[quant]'"
        ) from error
    for name, factors in lost.items():
        keep(module.get_submodule(name), *factors)


def _checked(squares: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], rank: int) -> Mapping[str, Tensor]:
    if squares and not rank:
        raise UserError("squares weigh the error that a rank is to keep small: give a rank above 0")
    for name, values in squares.items():
        if name not in layers:
            raise UserError(f"squares of '{name}', which is no linear layer of the module: leave them out")
        if values.shape != (shape := layers[name].weight.shape):
            raise UserError(f"squares of '{name}' have shape {tuple(values.shape)}: its weight has {tuple(shape)}")
    return squares


@torch.no_grad()
def split(layer: nn.Linear, kind: Kind, rank: int, squares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Leave in a layer the weight that its codes are to be made of, and give the factors to add to them.

    Returns:
        ``down`` [r, in] and ``up`` [out, r] with r the rank, at most the smaller side of the weight.
    """
    weight = layer.weight
    w = weight.double()
    through = functools.partial(through_codes, kind, weight.dtype)
    coded, down, up, _ = decompose(w, rank, through, *weighing(w, squares))
    layer.weight = nn.Parameter(coded.to(weight), requires_grad=weight.requires_grad)
    return down.to(weight), up.to(weight)


def weighing(w: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor]:
    """R [out] and C [in]: roots of the means of squared gradients over rows and columns, or ones.

    What had no gradient still counts a little: nothing is divided by zero, and in training it may get one.
    """
    if squares is None or not squares.any():
        return w.new_ones(w.shape[0]), w.new_ones(w.shape[1])
    means = (squares.to(w).mean(dim) / squares.to(w).mean() for dim in (1, 0))
    rows, columns = (mean.clamp_min(1e-4).sqrt() for mean in means)
    return rows, columns


def decompose(
    w: Tensor, rank: int, through: Callable[[Tensor], Tensor], rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Codes and two factors for a matrix.

    Args:
        w: W [out, in], float64. through: what the codes of a matrix stand for. rows, columns: the diagonals R and C.

    Returns:
        What Q is made of by ``through``, [out, in]; L as ``down`` [rank, in] and ``up`` [out, rank]; and the weighted
        errors of the codes of W alone and after each turn, falling.
    """
    rank = min(rank, *w.shape)
    coded, down, up = w, w.new_zeros(rank, w.shape[1]), w.new_zeros(w.shape[0], rank)
    errors: list[float] = []
    following = w
    for _ in range(TURNS):
        lost = rows[:, None] * (w - through(following)) * columns
        errors = errors or [float(lost.norm())]
        left, right = thin(lost, rank)
        error = float((lost - left @ right).norm())
        if error >= errors[-1]:
            break
        errors.append(error)
        coded, down, up = following, right / columns, left / rows[:, None]
        following = w - up @ down
    return coded, down, up, errors


def thin(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank, [out, rank] times [rank, in], each with the root of the singular values."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = thin(matrix.mT, rank)
        return left.mT, right.mT
    u = torch.linalg.eigh(matrix @ matrix.mT)[1][:, -rank:].flip(1)
    right = u.mT @ matrix
    root = right.norm(dim=1).sqrt()
    return u * root, right / root.clamp_min(torch.finfo(matrix.dtype).tiny)[:, None]


def through_codes(kind: Kind, dtype: torch.dtype, w: Tensor) -> Tensor:
    """What the codes of a weight of a ``dtype`` stand for, in the dtype of ``w``."""
    if kind == "nf4":
        from bitsandbytes import functional

        # As `Linear4bit` makes them, whose scales are in few bits too.
        codes = functional.quantize_4bit(w.to(dtype), compress_statistics=True, quant_type="nf4")
        return functional.dequantize_4bit(*codes).to(w)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.to(dtype), requires_grad=False)
    _torchao(layer, kind)
    return plain(layer.weight).to(w)


class Kept(nn.Module):
    """What :func:`keep` mixes into the class of a layer of codes: ``lost_up lost_down`` belongs to its weight."""

    lost_down: Tensor
    lost_up: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + F.linear(F.linear(x, self.lost_down.to(x.dtype)), self.lost_up.to(x.dtype)).to(y.dtype)


def keep(layer: Any, down: Tensor, up: Tensor) -> None:
    """Let a layer of codes add what they lost: ``up down`` is part of its weight from here on."""
    layer.register_buffer("lost_down", down)
    layer.register_buffer("lost_up", up)
    cls: Any = type(layer)
    layer.__class__ = _keeping(cls)


@functools.cache
def _keeping(cls: Any) -> Any:
    return type(f"Kept{cls.__name__}", (Kept, cls), {"__module__": cls.__module__})


def _torchao(module: nn.Module, kind: Kind) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def _nf4(module: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            # Subclasses do more than a product.
            if type(layer) is nn.Linear:
                setattr(parent, name, _nf4_layer(Linear4bit, layer))


def _nf4_layer(kind: Any, layer: nn.Linear) -> nn.Module:
    weight, bias = layer.weight, layer.bias
    made = kind(layer.in_features, layer.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta")
    # Repacking in place for one kind of CPU would change the codes.
    made.support_avx512bf16_for_cpu = False
    made.weight = type(made.weight)(weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = bias
    made.train(layer.training)
    return made.to(weight.device)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of numbers: torchao's are dequantised."""
    return tensor if type(tensor).dequantize is torch.Tensor.dequantize else tensor.dequantize()
