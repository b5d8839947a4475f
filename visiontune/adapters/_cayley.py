"""From packed skew-symmetric parameters to rotations, once per parameter version for many layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from visiontune.adapters._layers import masters
from visiontune.adapters._rotate import Through

_SMALL = 4


@functools.lru_cache(maxsize=64)
def _triangle(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the strict upper triangle of a flat [b, b], row by row, and of its mirror image."""
    row, column = torch.triu_indices(b, b, 1, device=device)
    return row * b + column, column * b + row


def skew(v: Tensor, b: int) -> Tensor:
    """Q = U - U^T [n, b, b] whose strict upper triangle U is filled row by row from ``v`` [n, b (b - 1) / 2]."""
    upper, _ = _triangle(b, v.device)
    q = v.new_zeros(len(v), b * b).scatter_(1, upper.expand(len(v), -1), v).view(-1, b, b)
    return q - q.mT


def packed(s: Tensor) -> Tensor:
    """The gradient of ``v`` for a gradient ``s`` [n, b, b] of ``skew(v)``: the triangle of s - s^T."""
    upper, lower = _triangle(s.shape[1], s.device)
    flat = s.reshape(len(s), -1)
    return flat.index_select(1, upper) - flat.index_select(1, lower)


def inverse(a: Tensor) -> Tensor:
    """The inverses of a [n, b, b] with a positive definite symmetric part, as I - Q has it.

    Such matrices need no pivots, so they can be inverted by quarters, which is products for the most part: two to four
    times as fast as a factorisation for each.
    """
    b = a.shape[-1]
    if b % 2 or b <= _SMALL:
        # inv_ex does not wait for the device to report a singular matrix.
        return torch.linalg.inv_ex(a).inverse
    h = b // 2
    upper_left, upper_right, lower_left, lower_right = a[:, :h, :h], a[:, :h, h:], a[:, h:, :h], a[:, h:, h:]
    first = inverse(upper_left)
    left, right = lower_left @ first, first @ upper_right
    rest = inverse(torch.baddbmm(lower_right, lower_left, right, alpha=-1))
    corner = right @ rest
    whole = torch.empty_like(a, memory_format=torch.contiguous_format)
    whole[:, :h, :h] = torch.baddbmm(first, corner, left)
    whole[:, :h, h:] = corner.neg_()
    whole[:, h:, :h] = (rest @ left).neg_()
    whole[:, h:, h:] = rest
    return whole


def cayley(q: Tensor) -> tuple[Tensor, Tensor]:
    """Exact rotation R = (I + Q)(I - Q)^-1 = 2 M - I and M = (I - Q)^-1, for skew-symmetric Q [n, b, b].

    I - Q is never singular, the eigenvalues of Q being imaginary. R has determinant 1 and no eigenvalue -1.
    """
    identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    m = inverse(identity - q)
    return 2 * m - identity, m


def neumann(q: Tensor, terms: int) -> Tensor:
    """The Cayley transform with a truncated series: (I + Q)(I + Q + ... + Q^(terms - 2)).

    That is I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1); the error is of the order of Q^(terms - 1).
    """
    identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    series = identity
    for _ in range(terms - 2):
        series = identity + q @ series
    return (identity + q) @ series


class _Rotations(torch.autograd.Function):
    """v [n, b (b - 1) / 2] -> R [n, b, b].

    What the backward pass needs is an attribute of the context, not a saved tensor. Saved tensors are freed by the
    first backward pass, while R serves every micro-batch of an optimiser step; and a checkpoint counts the saved
    tensors of its region, which must not depend on whether R was in the cache.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int, scale: float, terms: int) -> Tensor:
        ctx.b, ctx.scale, ctx.terms = b, scale, terms
        q = skew(scale * v, b)
        if terms:
            ctx.q = q
            return neumann(q, terms)
        rotation, ctx.m = cayley(q)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        with _plain(g.device):
            if ctx.terms:
                with torch.enable_grad():
                    q = ctx.q.detach().requires_grad_()
                    (s,) = torch.autograd.grad(neumann(q, ctx.terms), q, g)
            else:
                # dR = 2 dM = 2 M dQ M.
                s = 2 * ctx.m.mT @ g @ ctx.m.mT
            return ctx.scale * packed(s), None, None, None


def rotations(v: Tensor, b: int, scale: float = 1.0, terms: int = 0) -> Tensor:
    """R [n, b, b] for ``scale * Q(v)``, differentiable in ``v``; exact for ``terms=0``, else :func:`neumann`."""
    # Whatever mode the caller is in, the result may serve a later forward pass that needs its graph.
    with torch.inference_mode(False), torch.enable_grad(), _plain(v.device):
        return _Rotations.apply(v, b, scale, terms)


def _plain(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


class _Steps:
    """Counts the steps of every optimiser: fused ones change parameters without a new tensor version."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_Steps.add)


class Cache:
    """The last value computed for a key. Copies and pickles are empty: the value is cheap and may carry a graph."""

    def __init__(self) -> None:
        self.key: Hashable = None
        self.value: Any = None

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if self.key != key:
            self.value = None
            self.key, self.value = key, make()
        return self.value

    def clear(self) -> None:
        self.key = self.value = None

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


class Bank(nn.Module):
    """All blocks of one size: one parameter, one inverse and one cat of gradients for all layers.

    Args:
        b: block size. counts: number of blocks of each layer. place: device and dtype. terms: see :func:`rotations`.
    """

    def __init__(self, b: int, counts: Sequence[int], place: dict[str, Any], terms: int) -> None:
        super().__init__()
        self.b, self.counts, self.terms = b, list(counts), terms
        self.v = nn.Parameter(torch.zeros(sum(counts), b * (b - 1) // 2, **place))
        self._exact, self._cast, self._kept = Cache(), Cache(), Cache()
        self.on_made: Callable[[Tensor], None] | None = None

    def key(self, scale: float) -> tuple[Hashable, ...]:
        """Changes whenever the rotations do, other than by writes through ``.data`` outside an optimiser."""
        return _Steps.count, self.v._version, self.v.data_ptr(), self.v.requires_grad, scale

    def rotations(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """R [blocks, b, b] of each layer."""
        key = self.key(scale)
        return self._cast.get((key, dtype), lambda: self._split(key, scale, dtype))

    def through(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """R of each layer as :func:`kept_linear` takes it."""
        key = self.key(scale)
        return self._kept.get((key, dtype), lambda: self._split_through(key, scale, dtype))

    def refresh(self) -> None:
        for cache in (self._exact, self._cast, self._kept):
            cache.clear()

    def triangles(self) -> tuple[Tensor, ...]:
        """Each layer's part of the parameter."""
        return self.v.detach().split(self.counts)

    def _split(self, key: Hashable, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        r = self._exact.get(key, lambda: self._make(scale))
        with torch.inference_mode(False), torch.enable_grad():
            # Split once: the gradients of all layers are then joined once, and a slice each would be a full bank each.
            return r.to(dtype).split(self.counts)

    def _split_through(self, key: Hashable, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        r = self._exact.get(key, lambda: self._make(scale))
        with torch.inference_mode(False), torch.enable_grad(), _plain(r.device):
            return Through.apply(r.to(dtype)).split(self.counts)

    def _make(self, scale: float) -> Tensor:
        r = rotations(self.v, self.b, scale, self.terms)
        if self.on_made is not None:
            self.on_made(r.detach())
        return r


def make_banks(
    layers: Mapping[str, nn.Module], shapes: Mapping[str, tuple[int, int]], terms: int = 0
) -> tuple[nn.ModuleDict, dict[str, tuple[Bank, int]]]:
    """Banks for layers whose (block size, number of blocks) are given, and each layer's bank and number in it."""
    banks, where = nn.ModuleDict(), dict[str, tuple[Bank, int]]()
    for b in sorted({size for size, _ in shapes.values()}):
        members = [name for name, (size, _) in shapes.items() if size == b]
        bank = Bank(b, [shapes[name][1] for name in members], masters(layers[members[0]]), terms)
        banks[f"b{b}"] = bank
        where |= {name: (bank, i) for i, name in enumerate(members)}
    return banks, where
