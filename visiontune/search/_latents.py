"""What a search that samples on latents itself makes of a setting: conditions, pictures and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.errors import UserError
from visiontune.ops.pixels import shown, to_uint8
from visiontune.search.base import Setting

if TYPE_CHECKING:
    import numpy as np

    from visiontune.models.diffusion import DiffusionModel


def diffusion(at: Setting) -> DiffusionModel:
    """The setting's model, which has latents: `Search.check` has refused others."""
    return cast("DiffusionModel", at.model)


def conditions(at: Setting, requests: Sequence[Request]) -> tuple[Condition, Condition | None]:
    """What requests ask for, and what they are guided away from."""
    model, negatives = diffusion(at), any(one.negative for one in requests)
    if not at.guidance.contrasts:
        if negatives:
            raise UserError("the guidance compares with nothing, so a negative prompt has no effect: leave it out")
        return model.read(requests), None
    return model.read(requests), model.read(requests, negative=True) if negatives else model.unconditional(
        len(requests)
    )


class Judge:
    """The reward of clean latents; `pictures` holds the latest of each row."""

    def __init__(self, at: Setting, asked: Sequence[Request]) -> None:
        self.at, self.asked, self.pictures = at, asked, dict[int, "np.ndarray"]()

    def __call__(self, x_0: Tensor, rows: Sequence[int]) -> Tensor:
        pictures = pictures_of(self.at, x_0)
        self.pictures.update(zip(rows, pictures, strict=True))
        return torch.tensor(self.at.score(pictures, [self.asked[i] for i in rows]), dtype=torch.float64)


def pictures_of(at: Setting, latents: Tensor) -> np.ndarray:
    """Pictures uint8 [n, (f), h, w, 3] of clean latents [n, c, (f), h, w]."""
    pictures = shown(at.model.decode(latents))
    if not bool(pictures.isfinite().all()):
        raise UserError("a picture is not finite: sample in fp32 or bf16, or lower the adapter's scale")
    return to_uint8(pictures)
