"""`MaskedModel`: a pipeline that fills in masked tokens of a picture, masked (absorbing) discrete diffusion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.errors import UserError
from visiontune.models.pipeline import PipelineModel, own_generator


class MaskedModel(PipelineModel):
    """A picture is a grid of tokens [b, h, w], int64, each below `vocabulary` or `mask_token`.

    Attributes:
        vocabulary: number of tokens a picture is made of; the logits' last axis.
        mask_token: stands for a token that is not known yet.
    """

    vocabulary: int
    mask_token: int

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width in tokens of a picture of that many pixels; the model's own size where it is left open."""
        return (height or self.resolution) // self.downsample, (width or self.resolution) // self.downsample

    def logits(self, tokens: Tensor, cond: Condition) -> Tensor:
        """Logits [b, h, w, v], at least float32, of every token of the grid given the tokens [b, h, w] not masked."""
        with self.autocast():
            found = self._logits(tokens, cond.to(dtype=self.dtype))
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @abstractmethod
    def _logits(self, tokens: Tensor, cond: Condition) -> Tensor:
        """`logits` as the denoiser computes them."""

    @abstractmethod
    def stepper(self, steps: int, temperature: tuple[float, float]) -> Any:
        """The stock scheduler, made anew and set to `steps`; `temperature` goes from the first step's to the last's."""

    def samplers(self) -> tuple[str, ...]:
        return ("model",)

    def sampler(self, name: str) -> Any:
        if name != "model":
            raise UserError(f"sampler '{name}' adds and takes off noise, which masked tokens do not have: take model")
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    def _draw(
        self, requests: Sequence[Request], size: tuple[int, int], steps: int, options: dict[str, Any]
    ) -> np.ndarray:
        if any(request.noise is not None for request in requests):
            raise UserError(f"'{self.source}' starts from masked tokens, not from noise: leave the noise out")
        negatives = options.pop("negative_prompt", None)
        # The stock sampler takes one generator for a whole batch, so each picture is a batch of its own.
        drawn = [
            self.pipe(
                prompt=[request.prompt],
                negative_prompt=[negatives[i]] if negatives else None,
                num_inference_steps=steps,
                generator=own_generator(request),
                height=size[0],
                width=size[1],
                output_type="np",
                **options,
            ).images
            for i, request in enumerate(requests)
        ]
        return np.concatenate(drawn)
