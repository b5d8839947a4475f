"""Sampling of masked tokens: all are masked at first, and every step keeps those that the model is surest of.

The steps are the stock scheduler's own, so that the pictures are those of the stock pipeline. After step i of T,
cos(pi / 2 * i / T) of the tokens are still masked (MaskGIT, Chang et al., 2022, arXiv 2202.04200).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontune.core import Condition


class Unmasked(Protocol):
    """What sampling needs of a model; see `visiontune.models.base.MaskedModel`."""

    mask_token: int
    downsample: int
    resolution: int

    def unconditional(self, count: int) -> Condition: ...
    def logits(self, tokens: Tensor, cond: Condition) -> Tensor: ...
    def sampler(self, steps: int, temperature: tuple[float, float]) -> Any: ...


def guided_logits(
    model: Unmasked, tokens: Tensor, cond: Condition, uncond: Condition | None, cfg_scale: float
) -> Tensor:
    """Logits [b, h, w, v] under guidance, u + cfg_scale (c - u), in one call of the denoiser; 1 is none.

    `uncond` None means `model.unconditional`; what it lacks in `extra` it takes from `cond`.
    """
    if cfg_scale == 1.0:
        return model.logits(tokens, cond)
    uncond = model.unconditional(len(cond)) if uncond is None else uncond
    both = Condition.cat([replace(uncond, extra={**cond.extra, **uncond.extra}), cond])
    without, given = model.logits(torch.cat([tokens, tokens]), both).chunk(2)
    return without + cfg_scale * (given - without)


@torch.no_grad()
def unmask(
    model: Unmasked,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    cfg_scale: float = 1.0,
    steps: int = 12,
    temperature: tuple[float, float] = (2.0, 0.0),
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Draw tokens [b, h, w] for the rows of `cond`.

    Args:
        uncond, cfg_scale: see `guided_logits`.
        steps: T.
        temperature: of the noise on the model's confidence, at the first and the last step.
        generator: one for all rows, as the stock pipeline takes it, or one for each, whose picture then does not depend
            on what else is in the batch but for rounding.
        size: height and width in pixels; the model's resolution when left out.
    """
    height, width = (side // model.downsample for side in size or (model.resolution, model.resolution))
    tokens = torch.full((len(cond), height * width), model.mask_token, device=cond.tokens.device)
    if cfg_scale != 1.0 and uncond is None:
        uncond = model.unconditional(len(cond))
    scheduler = model.sampler(steps, temperature)
    for t in scheduler.timesteps:
        logits = guided_logits(model, tokens.view(-1, height, width), cond, uncond, cfg_scale).flatten(1, 2)
        if isinstance(generator, Sequence):
            rows = zip(logits.split(1), tokens.split(1), generator, strict=True)
            tokens = torch.cat([scheduler.step(x, t, known, generator=g).prev_sample for x, known, g in rows])
        else:
            tokens = scheduler.step(logits, t, tokens, generator=generator).prev_sample
    return tokens.view(-1, height, width)
