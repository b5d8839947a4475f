"""Moving average of the trained parameters, and a way to look through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from visiontune.ops.shards import local

Tensors = list[Tensor] | tuple[Tensor, ...]


def warm_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """``average <- d average + (1 - d) weight``, where ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` updates.

    The decay grows to ``decay``, so that the first weights are soon forgotten. The function that is returned changes
    the averages in place; it is also what ``torch.optim.swa_utils.AveragedModel`` takes as ``multi_avg_fn``.
    """

    def update(average: Tensors, current: Tensors, seen: Tensor | int) -> None:
        n = float(seen)
        torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


class Average:
    """The average of ``parameters`` by :func:`warm_average`; the first update takes them as they are.

    With ``decay=None`` it is inert: the average is the weights themselves.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float | None) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self._begin()

    def _begin(self) -> None:
        self.updates = 0
        self.shadow = [] if self.decay is None else [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are after one optimiser step into the average."""
        if self.decay is None:
            return
        average, current = [*map(local, self.shadow)], [*map(local, self.parameters)]
        if self.updates:
            warm_average(self.decay)(average, current, self.updates)
        else:
            torch._foreach_copy_(average, current)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average; afterwards what they held before, bit for bit."""
        if self.decay is None:
            yield
            return
        # Laid aside in the main memory: a device that is full of training has no room for a third copy.
        aside = [local(p).detach().to("cpu", copy=True) for p in self.parameters]
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(aside)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for own, value in zip(self.parameters, values, strict=True):
            local(own).copy_(local(value))

    def state_dict(self) -> dict | None:
        return None if self.decay is None else {"optimization_step": self.updates, "shadow_params": self.shadow}

    def load_state_dict(self, state: dict | None) -> None:
        """Take up a saved average, at the decay asked for now; one that starts only now begins at the weights."""
        self._begin()
        if self.decay is not None and state:
            self.updates = state["optimization_step"]
            for own, saved in zip(self.shadow, state["shadow_params"], strict=True):
                own.copy_(saved)
