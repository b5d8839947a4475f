"""The long skips of a model that is opened, scaled as its checkpoint or its user says."""

from __future__ import annotations

import re
from typing import Any

from visiontune.errors import UserError
from visiontune.ops.skips import kappa_of, scale

LEAST = 0.5


def set_skips(model: Any, kappa: float | None) -> None:
    """Scale the long skips of a model that was just opened.

    Args:
        kappa: see `visiontune.models.load`; None takes the checkpoint's.

    Raises:
        UserError: the model has no long skips, or kappa is out of range.
    """
    networks = model.of(*model.names())
    opened = kappa_of(networks.values())
    wanted = opened if kappa is None else kappa
    if wanted == opened == 1:
        return
    if not LEAST <= wanted <= 1:
        raise UserError(f"model.skips={wanted:g} is out of range: take one from {LEAST:g} to 1")
    structure = getattr(model, "STRUCTURE", None)
    if structure is None or structure.stages is None:
        raise UserError(
            f"model.skips is for UNets, and '{model.source}' ({model.family}) has no long skips: leave it out"
        )
    unet = networks[model.names()[0]]
    taking = [module for name, module in unet.named_modules() if re.fullmatch(structure.stages[2], name)]
    scale(unet, taking, wanted, opened)
