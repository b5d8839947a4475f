"""The long skips of a model that is opened, scaled as its checkpoint or its user says."""

from __future__ import annotations

import re
from typing import Any

from visiontune.errors import UserError
from visiontune.ops.skips import ENTRY, scale

LEAST = 0.5


def set_skips(model: Any, kappa: float | None) -> None:
    """Scale the long skips of a model that was just opened.

    Args:
        kappa: see `visiontune.models.load`; None takes the checkpoint's.

    Raises:
        UserError: the model has no long skips, or kappa is out of range.
    """
    structure = getattr(model, "STRUCTURE", None)
    if structure is None or structure.stages is None:
        if kappa in (None, 1):
            return
        raise UserError(
            f"model.skips is for UNets, and '{model.source}' ({model.family}) has no long skips: leave it out"
        )
    unet = model.networks()[model.names()[0]]
    opened = float(unet.config.get(ENTRY, 1.0))
    wanted = opened if kappa is None else kappa
    if wanted == opened == 1:
        return
    if not LEAST <= wanted <= 1:
        raise UserError(f"model.skips={wanted:g} is out of range: take one from {LEAST:g} to 1")
    taking = [module for name, module in unet.named_modules() if re.fullmatch(structure.stages[2], name)]
    scale(unet, taking, wanted, opened)
