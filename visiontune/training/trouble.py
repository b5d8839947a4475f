"""Turns what would end a run in a traceback, or go on in silence, into one line that says what to do."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.training.checkpoint import latest
from visiontune.training.config import PreviewConfig

if TYPE_CHECKING:
    from visiontune.training.guards import Guard


@contextmanager
def readable_disk_errors(out: Path) -> Iterator[None]:
    """Report a full disk, wherever in the block it was met, with the checkpoint from which to go on."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(f"the disk that holds {out} is full; free some space, then {_how_to_go_on(out)}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or what led to it is a full disk; torch and safetensors hide the ``OSError`` in their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_loss(loss: float, step: int, out: Path, name: str = "loss") -> None:
    """Stop at a loss (or a gradient's norm) that is not a number, before it reaches the weights.

    Raises:
        UserError: names the step (counted from 1) and the last good checkpoint.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"the {name} is {loss} at step {step}; the weights were not changed by it. Use a lower train.lr or another "
            f"train.precision, then {_how_to_go_on(out)}"
        )


def check_drawing(model: Any, preview: PreviewConfig, guard: Guard | None) -> None:
    """Refuse previews and checks of the guard that the model cannot draw, before there is anything to lose.

    Raises:
        UserError: it draws no pictures, or not in so many steps; the message names the option.
    """
    if preview.prompts and not hasattr(model, "draw"):
        raise UserError(f"model '{model.source}' ({model.family}) draws no pictures: set preview.prompts=[]")
    wanted = {"preview.steps": preview.steps} if preview.prompts else {}
    for option, steps in {**wanted, **({"guards.steps": guard.steps} if guard is not None else {})}.items():
        try:
            model.check_steps(steps)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error


def check_weights(parameters: Iterable[Tensor], step: int, out: Path) -> None:
    """Refuse to save weights that are not numbers over good ones.

    Raises:
        UserError: names the step and the last good checkpoint.
    """
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise UserError(
            f"the weights are no longer finite after step {step} and were not saved. Use a lower train.lr or another "
            f"train.precision, then {_how_to_go_on(out)}"
        )


def _how_to_go_on(out: Path) -> str:
    found = latest(out)
    if found is None:
        return "start again (there is no checkpoint yet)"
    return f"go on from the last good checkpoint, {found}, with train.resume=true"
