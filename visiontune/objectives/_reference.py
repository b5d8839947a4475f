"""What the untrained model predicts of the noisy latents that a step trains on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.core import Batch, Condition
from visiontune.objectives.base import Tools, condition_of

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


class Reference:
    """The base's predictions, by its own conditions, which are kept where the text encoder is trained."""

    def __init__(self) -> None:
        self._conditions: dict[str, Condition] = {}

    def predict(self, model: DiffusionModel, x_t: Tensor, t: Tensor, batch: Batch, tools: Tools) -> Tensor:
        """Its prediction for the rows of a batch, like ``x_t``, without gradients.

        Args:
            x_t, t: their noisy latents and timesteps ``[b]``.
        """
        with tools.reference(), torch.no_grad():
            cond = batch.cond if batch.cond is not None else self._of_prompts(model, batch.prompts, tools)
            return model.predict(x_t, t, condition_of(model, replace(batch, cond=cond.to(x_t.device))))

    def _of_prompts(self, model: DiffusionModel, prompts: list[str], tools: Tools) -> Condition:
        for prompt in prompts:
            # Each prompt by itself: its condition does not depend on which others a batch had.
            if tools.lockstep or prompt not in self._conditions:
                self._conditions[prompt] = model.embed([prompt]).to("cpu")
        return Condition.cat([self._conditions[prompt] for prompt in prompts])
