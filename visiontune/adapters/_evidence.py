"""What a method may ask about a task before training: the inputs and the gradients of its layers.

The statistics are those of the base model with the set off, over a fixed list of losses. With several processes every
one sees its own losses, and the sums are taken over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import fan_in, masters
from visiontune.adapters._sparse import pad
from visiontune.errors import UserError

Reduce = Callable[[Tensor], Tensor]
PORTION = 2**30  # bytes


@dataclass
class Moments:
    """Sums over the inputs of a layer; an input of a convolution is a patch, flattened like a row of its weight.

    Attributes:
        second: ``[groups, d, d]``, sum of x x^T.
        first: ``[groups, d]``, sum of x.
        count: number of inputs x.
    """

    second: Tensor
    first: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Count in inputs ``[groups, n, d]``."""
        self.second += x.mT @ x
        self.first += x.sum(1)
        self.count += x.shape[1]

    def covariance(self) -> Tensor:
        """``[groups, d, d]`` of the centred inputs, float64 on the CPU."""
        mean = self.first.cpu().double() / self.count
        return self.second.cpu().double() / self.count - mean[:, :, None] * mean[:, None]


class Evidence:
    """Statistics of one component's layers.

    Args:
        layers: by name.
        losses: each call gives the same training loss again, of a batch of its own; the adapters act in it as they are.
        reduce: gives the sum of a tensor over processes, in a new tensor or the same; none with one process.
        off: context in which the set that asks does not act.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        losses: Sequence[Callable[[], Tensor]],
        reduce: Reduce | None = None,
        off: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.layers, self.losses, self.reduce, self.off = dict(layers), list(losses), reduce or (lambda t: t), off

    def portions(self, size: int = PORTION) -> Iterator[dict[str, Moments]]:
        """:meth:`moments` of as many layers at a time as fit into ``size`` bytes, one at least.

        The losses are computed anew for each portion. Squares of the inputs of wide convolutions are large.
        """
        names: list[str] = []
        filled = 0
        for name, layer in self.layers.items():
            needed = int(getattr(layer, "groups", 1)) * fan_in(layer) ** 2 * masters(layer)["dtype"].itemsize
            if names and filled + needed > size:
                yield self.moments(names)
                names, filled = [], 0
            names.append(name)
            filled += needed
        yield self.moments(names)

    def over(self, losses: Sequence[Callable[[], Tensor]]) -> Evidence:
        """The same layers under other losses, some of these for instance."""
        return Evidence(self.layers, losses, self.reduce, self.off)

    @torch.no_grad()
    def moments(self, names: Sequence[str] | None = None) -> dict[str, Moments]:
        """Sums over the layers' inputs; of all layers, or those of the given names.

        Raises:
            UserError: a layer was not called.
        """
        names = list(self.layers) if names is None else names
        found: dict[str, Moments] = {}
        hooks = [
            self.layers[name].register_forward_pre_hook(
                lambda layer, args, name=name: _count_in(found, name, layer, args[0])
            )
            for name in names
        ]
        try:
            with self.off():
                for loss in self.losses:
                    loss()
        finally:
            for hook in hooks:
                hook.remove()
        self._all(names, found)
        for name in names:
            moments = found[name]
            moments.second, moments.first = self.reduce(moments.second), self.reduce(moments.first)
            moments.count = int(self.reduce(torch.tensor(moments.count, device=moments.first.device)))
        return {name: found[name] for name in names}

    def gradients(self) -> dict[str, Tensor]:
        """Sum over the losses of the gradient of each layer's weight, float32 or wider.

        Raises:
            UserError: a layer takes no part in the loss, or is quantised.
        """
        return self._sums(lambda gradient: gradient)

    def squares(self) -> dict[str, Tensor]:
        """The same sum of squared gradients: how much a small step on each entry alone would lower the losses."""
        return self._sums(torch.square)

    @contextmanager
    def trainable(self) -> Iterator[dict[str, nn.Parameter]]:
        """Inside the block the layers' weights ask for gradients, and the set is off.

        Raises:
            UserError: a weight is quantised.
        """
        weights: dict[str, nn.Parameter] = {}
        for name, layer in self.layers.items():
            assert isinstance(layer.weight, nn.Parameter)
            if not layer.weight.is_floating_point():
                raise UserError(f"layer '{name}' is quantised and has no gradient: plan on a floating-point base")
            weights[name] = layer.weight
        with self.off():
            for weight in weights.values():
                weight.requires_grad_(True)
            try:
                yield weights
            finally:
                for weight in weights.values():
                    weight.requires_grad_(False)
                    weight.grad = None

    def _sums(self, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def take(name: str, layer: nn.Module, weight: Tensor) -> None:
            # Freed at once, so that no more than one gradient of a weight's shape is about beside the sums.
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            value = of(gradient.to(masters(layer)["dtype"]))
            found[name] = found[name] + value if name in found else value

        with self.trainable() as weights:
            hooks = [
                weight.register_post_accumulate_grad_hook(lambda w, name=name: take(name, self.layers[name], w))
                for name, weight in weights.items()
            ]
            try:
                for loss in self.losses:
                    loss().backward(inputs=list(weights.values()))
            finally:
                for hook in hooks:
                    hook.remove()
        self._all(self.layers, found)
        return {name: self.reduce(found[name]) for name in self.layers}

    def _all(self, names: Iterable[str], found: Mapping[str, Any]) -> None:
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"layer '{missing[0]}' takes no part in the loss: leave it out of adapter.targets")


def _count_in(found: dict[str, Moments], name: str, layer: Any, x: Tensor) -> None:
    # Under autocast the sums would be rounded to half precision.
    with torch.autocast(x.device.type, enabled=False):
        rows = inputs(layer, x.to(masters(layer)["dtype"]))
        if name not in found:
            groups, _, d = rows.shape
            found[name] = Moments(rows.new_zeros(groups, d, d), rows.new_zeros(groups, d))
        found[name].add(rows)


def inputs(layer: Any, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with, ``[groups, n, in / groups x kernel]``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.Conv2d):
        x = pad(layer, x)
        padding = 0 if isinstance(layer.padding, str) or layer.padding_mode != "zeros" else layer.padding
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    else:
        # A convolution whose kernels each pick one entry.
        d, groups = layer.weight[0].numel(), layer.groups
        picks = torch.eye(d, dtype=x.dtype, device=x.device).view(d, *layer.weight.shape[1:])
        patches = layer._conv_forward(x, picks.repeat(groups, *[1] * (picks.dim() - 1)), None).flatten(2)
    batch, rows, places = patches.shape
    return patches.view(batch, layer.groups, rows // layer.groups, places).permute(1, 0, 3, 2).flatten(1, 2)
