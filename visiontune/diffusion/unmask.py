"""Sampling of masked tokens: all are masked at first, and every step keeps those that the model is surest of.

The steps are the stock scheduler's own, so that the pictures are those of the stock pipeline. After step i of T,
cos(pi / 2 * i / T) of the tokens are still masked (MaskGIT, Chang et al., 2022, arXiv 2202.04200).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.guidance import NO_GUIDANCE, Guidance


class Unmasked(Protocol):
    """What sampling needs of a model; see `visiontune.models.masked.MaskedModel`."""

    mask_token: int

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]: ...
    def unconditional(self, count: int) -> Condition: ...
    def logits(self, tokens: Tensor, cond: Condition) -> Tensor: ...
    def stepper(self, steps: int, temperature: tuple[float, float]) -> Any: ...


def guided_logits(
    model: Unmasked, tokens: Tensor, cond: Condition, uncond: Condition | None, guidance: Guidance
) -> Tensor:
    """Guided logits [b, h, w, v]; how noisy a row is, is the share of its tokens that are masked.

    `uncond` None takes the family's own, where the guidance needs one.
    """
    if guidance.contrasts and uncond is None:
        uncond = model.unconditional(len(cond))
    level = (tokens == model.mask_token).flatten(1).float().mean(1)
    begun = guidance.begin(model)
    return begun(lambda x, _, told: model.logits(x, told), tokens, level, level, cond, uncond)


@torch.no_grad()
def unmask(
    model: Unmasked,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    guidance: Guidance = NO_GUIDANCE,
    steps: int = 12,
    temperature: tuple[float, float] = (2.0, 0.0),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw tokens [b, h, w] for the rows of `cond`.

    Args:
        uncond: what to guide away from, where the guidance does; None takes the family's own.
        steps: T.
        temperature: of the noise on the model's confidence, at the first and the last step.
        generator: one for all rows, as the stock pipeline takes it, or one for each, whose picture then does not depend
            on what else is in the batch but for rounding.
        size: height and width in pixels; the model's resolution when left out.
    """
    height, width = model.grid(*(size or ()))
    tokens = torch.full((len(cond), height * width), model.mask_token, device=cond.tokens.device)
    if guidance.contrasts and uncond is None:
        uncond = model.unconditional(len(cond))
    scheduler = model.stepper(steps, temperature)
    guidance = guidance.begin(model)
    for t in scheduler.timesteps:
        logits = guided_logits(model, tokens.view(-1, height, width), cond, uncond, guidance).flatten(1, 2)
        if isinstance(generator, Sequence):
            rows = zip(logits.split(1), tokens.split(1), generator, strict=True)
            tokens = torch.cat([scheduler.step(x, t, known, generator=g).prev_sample for x, known, g in rows])
        else:
            tokens = scheduler.step(logits, t, tokens, generator=generator).prev_sample
    return tokens.view(-1, height, width)
