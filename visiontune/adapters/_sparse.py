"""Layers of whose weight only chosen entries are trained.

No copy of the weight is made, none is kept for the backward pass, and no gradient of the weight's shape outlives the
backward pass of its layer. Positions are flat indices (int64) of a weight in its logical, row-major order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visiontune.adapters._layers import NORMS, Beneath, compute_dtype, masters
from visiontune.adapters._method import Adapter, Method

SAMPLED_DENSITY = 0.1


@contextmanager
def changed(w: Tensor, index: Tensor, change: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Inside the block: ``w`` in ``dtype`` with ``change`` added at ``index``.

    With ``w`` already in ``dtype`` its own memory holds the sum meanwhile and, afterwards, what it held before, bit
    for bit. That is why the version counter is passed by: for everybody else nothing has happened.
    """
    data = w.data
    before = _taken(data, index)
    after = (before.to(change.dtype) + change).to(dtype)
    if w.dtype != dtype:
        yield _put(data.to(dtype), index, after)
        return
    _put(data, index, after)
    try:
        yield data
    finally:
        _put(data, index, before)


def _taken(w: Tensor, index: Tensor) -> Tensor:
    """``w.take(index)``, in a third to two thirds of the time where the memory is in that order."""
    return w.view(-1).index_select(0, index) if w.is_contiguous() else w.take(index)


def _put(w: Tensor, index: Tensor, values: Tensor) -> Tensor:
    if not w.is_contiguous():
        return w.put_(index, values)
    w.view(-1).index_copy_(0, index, values)
    return w


@dataclass
class Matmul:
    """``x W^T + b`` of a linear layer; ``pattern`` is a CSR matrix of the trained positions, or ``None``."""

    pattern: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Matmul:
        # Torch has no deep copy of CSR tensors, and nobody writes to this one.
        return self

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w, bias)

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return g @ w

    def grad_entries(self, g: Tensor, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        pattern = self.pattern
        # The model may have been moved since the pattern was made.
        if pattern is None or pattern.device != x.device or x.dtype not in (torch.float32, torch.float64):
            return _taken(g.mT @ x, index)
        pattern = pattern.to(x.dtype)
        # It multiplies rows by columns; left to itself it lays the columns out more slowly.
        rows, columns = g.mT.contiguous(), x.mT.contiguous().mT
        return torch.sparse.sampled_addmm(pattern, rows, columns, beta=0.0).values()


@dataclass
class Convolution:
    """A convolution with zero padding; other paddings are applied to its input beforehand."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        zeros = [0] * len(self.stride)
        return torch.convolution(x, w, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(g, x, w, [True, False, False])[0]

    def grad_entries(self, g: Tensor, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        return _taken(self._backward(g, x, w, [False, True, False])[1], index)

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Any:
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, wanted
        )


@dataclass
class Lookup:
    """Rows of an embedding."""

    padding_idx: int
    by_frequency: bool

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, w)

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("token ids have no gradient")

    def grad_entries(self, g: Tensor, x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        backward = torch.ops.aten.embedding_dense_backward
        return _taken(backward(g, x, w.shape[0], self.padding_idx, self.by_frequency), index)


Product = Matmul | Convolution | Lookup


def product_of(layer: Any, index: Tensor) -> Product:
    """How ``layer`` uses its weight."""
    if isinstance(layer, nn.Linear):
        return Matmul(_pattern(layer.weight, index))
    if isinstance(layer, nn.Embedding):
        return Lookup(-1 if layer.padding_idx is None else layer.padding_idx, layer.scale_grad_by_freq)
    padded = _pads_itself(layer)
    return Convolution(layer.stride, [0] * len(layer.stride) if padded else layer.padding, layer.dilation, layer.groups)


def pad(layer: Any, x: Tensor) -> Tensor:
    """The input with the padding that :class:`Convolution` leaves out."""
    if not _pads_itself(layer):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _pads_itself(layer: Any) -> bool:
    return hasattr(layer, "padding_mode") and (layer.padding_mode != "zeros" or isinstance(layer.padding, str))


def _pattern(w: Tensor, index: Tensor) -> Tensor | None:
    """CSR matrix of ones at ``index`` for the sampled product, where that is the faster one: few entries on a CPU."""
    if (
        w.device.type != "cpu"
        or not torch.backends.mkl.is_available()
        or not 0 < len(index) < SAMPLED_DENSITY * w.numel()
    ):
        return None
    rows, columns = w.shape
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(index // columns, minlength=rows).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        ones = torch.ones(len(index))
        return torch.sparse_csr_tensor(starts, index % columns, ones, (rows, columns), check_invariants=False)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor, bias: Tensor | None, w: Tensor, index: Tensor, product: Product
    ) -> Tensor:
        ctx.save_for_backward(x, change, w)
        # The positions are there anyway, and the weight may be for this call alone.
        ctx.index, ctx.product = index, product
        with changed(w, index, change, _dtype(x, w)) as current:
            return product.forward(x, current, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, change, w = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            with changed(w, ctx.index, change, g.dtype) as current:
                grad_x = ctx.product.grad_input(g, x, current)
        grad_change = ctx.product.grad_entries(g, x, w, ctx.index).to(change.dtype)
        if ctx.needs_input_grad[2]:
            channels = -1 if isinstance(ctx.product, Matmul) else 1
            grad_bias = g.movedim(channels, -1).flatten(0, -2).sum(0)
        return grad_x, grad_change, grad_bias, None, None, None


def _dtype(x: Tensor, w: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else w.dtype


def with_entries(x: Tensor, change: Tensor, bias: Tensor | None, w: Tensor, index: Tensor, product: Product) -> Tensor:
    """The output of a layer whose frozen weight ``w`` has ``change`` added at ``index``.

    Args:
        x: the layer's input, of the dtype to compute in. bias: of that dtype, may want a gradient.
        change: [n], of ``w``'s dtype or a wider one; the only one that gets a gradient for the weight.
        index: [n], ascending. product: from :func:`product_of`.
    """
    return _Entries.apply(x, change, bias, w, index, product)


class Entries(nn.Module, Adapter):
    """Changes, zero at the start, of chosen entries of one layer: ``index`` [n] in its weight, ``bias_index`` [m] in
    its bias, both ascending."""

    change: nn.Parameter | None
    bias_change: nn.Parameter | None
    index: Tensor
    bias_index: Tensor

    def __init__(self, layer: Any, index: Tensor, bias_index: Tensor) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, lest the base become a submodule
        self.choose(index, bias_index)

    def choose(self, index: Tensor, bias_index: Tensor) -> None:
        """Train these entries, from zero change."""
        layer = self.layer[0]
        place = masters(layer)
        for prefix, positions in (("", index), ("bias_", bias_index)):
            positions = positions.to(place["device"])
            self.register_buffer(f"{prefix}index", positions)
            change = nn.Parameter(torch.zeros(len(positions), **place)) if len(positions) else None
            self.register_parameter(f"{prefix}change", change)
        self.product = None if isinstance(layer, NORMS) or self.change is None else product_of(layer, self.index)

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale scatter(change)``."""
        return w if self.change is None else _scattered(w, self.index, scale * self.change)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``b + scale scatter(bias_change)``."""
        return b if b is None or self.bias_change is None else _scattered(b, self.bias_index, scale * self.bias_change)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer with its entries changed; neither a second weight nor a dense gradient outlives this layer."""
        bias = self.bias(beneath.bias(), scale)
        if self.change is None or self.product is None or not beneath.frozen:
            return beneath.using(x, self.weight(beneath.weight(), scale), bias)
        dtype = compute_dtype(x) if x.is_floating_point() else beneath.layer.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = pad(beneath.layer, x.to(dtype) if x.is_floating_point() else x)
            bias = None if bias is None else bias.to(dtype)
            return with_entries(x, scale * self.change, bias, beneath.layer.weight, self.index, self.product)

    def tensors(self) -> dict[str, Tensor]:
        saved = {"index": self.index, "bias_index": self.bias_index}
        return saved | {name: parameter for name, parameter in self.named_parameters()}


class InPlace(Method):
    """A method whose adapters are :class:`Entries`."""

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the saved choice of entries: chosen anew, from a rounded base or by chance, it would be another."""
        for name, tensors in saved.items():
            entry = self.adapters[name]
            if isinstance(entry, Entries) and {"index", "bias_index"} <= tensors.keys():
                entry.choose(tensors["index"], tensors["bias_index"])


def _scattered(w: Tensor, index: Tensor, change: Tensor) -> Tensor:
    return w.put(index, (w.take(index).to(change.dtype) + change).to(w.dtype))
