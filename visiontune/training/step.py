"""One forward pass as a module, and where its batches come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from visiontune.core import Batch, Loss
from visiontune.objectives.base import Objective

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel


class Rows(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Batch:
        """This process's batch number ``step``, a pure function of that number."""


class Step(nn.Module):
    """``(batch, rng) -> Loss`` as a module, which accelerate can wrap for autocast and several processes.

    Args:
        model: predicts; its text encoders belong to the module if ``text``.
        adapters: the attached set, or ``None``.
        objective: computes the loss; ``None`` where the module is never called.
        text: whether the text encoders are trained.
    """

    def __init__(
        self, model: DiffusionModel, adapters: nn.Module | None, objective: Objective | None, text: bool
    ) -> None:
        super().__init__()
        self.objective, self._model = objective, [model]
        self.parts = nn.ModuleDict({"denoiser": model.denoiser, **(model.text_encoders if text else {})})
        if adapters is not None:
            self.adapters = adapters

    def forward(self, batch: Batch, rng: torch.Generator) -> Loss:
        assert self.objective is not None
        return self.objective.loss(self._model[0], batch, rng)
