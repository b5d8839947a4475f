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


def rotated(w: Tensor, rotation: Tensor) -> Tensor:
    """``W R^T`` [out, r b] for rotation [r, b, b], a view of its transpose.

    As rows of the transpose the blocks are written by one batched product, whose result must be contiguous to be one;
    :func:`multiply` takes a product for each block. A linear layer reads either layout as fast.
    """
    r, b = rotation.shape[:2]
    return torch.bmm(rotation, blocks_of(w, r).mT).view(r * b, -1).mT


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
    if groups == 1:
        return rotate_input(w.flatten(1), rotation.mT).view(w.shape)
    b = rotation.shape[-1]
    # [out, r b] -> [groups, r, out / groups, b]
    rows = w.reshape(groups, w.shape[0] // groups, -1, b).transpose(1, 2)
    return (rows @ rotation.view(groups, -1, b, b).mT).transpose(1, 2).reshape(w.shape)


class _RotatedLinear(torch.autograd.Function):
    """``F.linear(x, W R^T, bias)`` for a frozen W: gradients of x and R from g W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        # Keeping the rotated weight would hold a copy of every weight until the backward pass.
        ctx.save_for_backward(x, rotation, w)
        return F.linear(x, rotated(w, rotation), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, rotation, w = ctx.saved_tensors
        inner = g.reshape(-1, g.shape[-1]) @ w
        grad_x = multiply(inner, rotation.mT).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, _blocks_of_product(x, inner, len(rotation)), None, None


class _KeptLinear(torch.autograd.Function):
    """The same with W R^T at hand; the gradient of R is short of a last factor R, see :func:`kept_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, through: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
        ctx.blocks = len(through)
        ctx.save_for_backward(x, kept)
        return F.linear(x, kept, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, kept = ctx.saved_tensors
        grad_x = g.reshape(-1, g.shape[-1]) @ kept
        return grad_x.view(x.shape), _blocks_of_product(x, grad_x, ctx.blocks), None, None


def _blocks_of_product(x: Tensor, y: Tensor, r: int) -> Tensor:
    """The r diagonal blocks of ``x^T y`` [r, b, b]."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return torch.bmm(blocks_of(flat, r).mT, blocks_of(y, r))


def rotated_linear(x: Tensor, rotation: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with its weight rotated.

    Args:
        x: [..., in]. rotation: [r, b, b]. w: [out, in], frozen. bias: [out], frozen. All of one dtype.
    """
    return _RotatedLinear.apply(x, rotation, w, bias)


def kept_linear(x: Tensor, through: Tensor, kept: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose rotated weight ``W R^T`` is kept: two products fewer. Only for orthogonal R.

    The gradient x^T g W R^T of that weight is the one of R times R^T, so R is undone on the small matrices: by
    ``through`` [r, b, b], which is R with a backward pass that multiplies by R, once for the layers of a whole bank.
    """
    return _KeptLinear.apply(x, through, kept, bias)


class Through(torch.autograd.Function):
    """R [n, b, b] as ``through`` of :func:`kept_linear`."""

    @staticmethod
    def forward(ctx: Any, rotation: Tensor) -> Tensor:
        # An attribute, since the result serves every micro-batch of an optimiser step.
        ctx.rotation = rotation.detach()
        return rotation.view_as(rotation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g @ ctx.rotation
