"""Products with block-diagonal rotations that never form the full matrix, nor a gradient of a weight's shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def blocks_of(x: Tensor, r: int) -> Tensor:
    """View of [n, r b] as [r, n, b]."""
    return x.view(x.shape[0], r, x.shape[1] // r).transpose(0, 1)


def multiply(x: Tensor, rotation: Tensor) -> Tensor:
    """[n, r b] times blockdiag(rotation [r, b, b]), written in place of a permuted copy."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.bmm(blocks_of(x, len(rotation)), rotation, out=blocks_of(y, len(rotation)))
    return y


class _RotateInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(x, rotation)
        return multiply(x, rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, rotation = ctx.saved_tensors
        g = g.contiguous()
        grad_x = multiply(g, rotation.mT) if ctx.needs_input_grad[0] else None
        grad_r = torch.bmm(blocks_of(x, len(rotation)).mT, blocks_of(g, len(rotation)))
        return grad_x, grad_r


def rotate_input(x: Tensor, rotation: Tensor) -> Tensor:
    """``x R`` over the last dimension: x [..., r b], rotation [r, b, b]."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _RotateInput.apply(flat, rotation).view(x.shape)


def rotate_channels(x: Tensor, rotation: Tensor) -> Tensor:
    """``x R`` over the channels of x [n, r b, ...]."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return rotate_input(x.movedim(1, -1), rotation).movedim(-1, 1)
    r, b = rotation.shape[:2]
    return (rotation.mT @ x.reshape(x.shape[0], r, b, -1)).view(x.shape)


def rotate_weight(w: Tensor, rotation: Tensor, groups: int = 1) -> Tensor:
    """``W R^T`` for w [out, in / groups, ...]: the weight with which ``W (x R)`` is one product.

    The rows are flattened to inputs x kernel; the rotations [groups r, b, b] of a group act on the rows of that group.
    """
    b = rotation.shape[-1]
    # [out, r b] -> [groups, r, out / groups, b]
    rows = w.reshape(groups, w.shape[0] // groups, -1, b).transpose(1, 2)
    return (rows @ rotation.view(groups, -1, b, b).mT).transpose(1, 2).reshape(w.shape)


class _RotatedLinear(torch.autograd.Function):
    """``F.linear(x, W R^T, bias)`` for a frozen W: gradients of x and R from g W alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rotation: Tensor, w: Tensor, bias: Tensor | None, rotated: Tensor | None
    ) -> Tensor:
        ctx.reuse = rotated is not None
        # Keeping a rotated weight made only for this call would hold a copy of every weight until the backward pass.
        ctx.save_for_backward(x, rotation, w if rotated is None else rotated)
        return F.linear(x, rotate_weight(w, rotation) if rotated is None else rotated, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, rotation, w = ctx.saved_tensors
        r, g = len(rotation), g.reshape(-1, g.shape[-1])
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        inner = g @ w
        grad_r = torch.bmm(blocks_of(flat, r).mT, blocks_of(inner, r))
        if ctx.reuse:
            # g W R^T is the gradient of x already, and undoing the orthogonal R on the small matrix gives x^T g W.
            grad_x, grad_r = inner, grad_r @ rotation
        else:
            grad_x = multiply(inner, rotation.mT) if ctx.needs_input_grad[0] else None
        return None if grad_x is None else grad_x.view(x.shape), grad_r, None, None, None


def rotated_linear(
    x: Tensor, rotation: Tensor, w: Tensor, bias: Tensor | None, rotated: Tensor | None = None
) -> Tensor:
    """A linear layer with its weight rotated.

    Args:
        x: [..., in]. rotation: [r, b, b]. w: [out, in], frozen. bias: [out], frozen. All of one dtype.
        rotated: ``rotate_weight(w, rotation)`` where it is kept anyway; saves two products. Only for orthogonal R.
    """
    return _RotatedLinear.apply(x, rotation, w, bias, rotated)
