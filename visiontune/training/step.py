"""One forward pass as a module, and where its batches come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from visiontune.core import Batch, Loss
from visiontune.objectives.base import Tools, check_loss

if TYPE_CHECKING:
    from visiontune.models.base import Model


class Rows(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch:
        """This process's batch number ``step``, a pure function of that number."""

    def close(self) -> None:
        """Wait until nothing works ahead of the steps; batches can be had afterwards."""


class Step(nn.Module):
    """``(batch, tools) -> Loss`` as a module, which accelerate can wrap for autocast and several processes.

    Args:
        model: in the precision of the run. parts: the networks that gradients pass through, which belong to the module.
        adapters: the attached set, or ``None``.
        objective: computes the loss; the module of one that is online is never called.
    """

    def __init__(self, model: Model, parts: dict[str, nn.Module], adapters: nn.Module | None, objective: Any) -> None:
        super().__init__()
        self.objective, self._model = objective, [model]
        self.parts = nn.ModuleDict(parts)
        if adapters is not None:
            self.adapters = adapters

    def forward(self, batch: Batch, tools: Tools) -> Loss:
        return check_loss(self.objective.loss(self._model[0], batch, tools), self.objective)
