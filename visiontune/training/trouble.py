"""Turns what would end a run in a traceback, or go on in silence, into one line that says what to do."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.shards import local
from visiontune.sampling.pipeline import checked_guidance
from visiontune.training.checkpoint import latest
from visiontune.training.config import PreviewConfig

if TYPE_CHECKING:
    from visiontune.training.guards import Guard
    from visiontune.training.loop import Trainer

_log = logging.getLogger(__name__)
# Batches, or rollouts, that may teach nothing before it is said of the run: rare rewards do not come in each.
_IDLE = 5


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


class Idle:
    """Watches the first steps of a run for a gradient; one that begins without any trains nothing.

    A gradient of exactly 0 of all that is trained is no small one: warm-ups and factors that start at zero leave some.
    """

    def __init__(self) -> None:
        self._steps, self._over = 0, False

    def check(self, run: Trainer, step: int, terms: Mapping[str, Tensor]) -> None:
        """Look at the gradients of step ``step``, complete and not yet clipped, and at what the step logs.

        Raises:
            UserError: there was none in the first steps of the run, or in all of them; it says why that may be.
        """
        # A run that goes on has had gradients before.
        self._over = self._over or step != self._steps
        if self._over:
            return
        if any(p.grad is not None and bool(p.grad.any()) for p in run.parameters.values()):
            self._over = True
            return
        self._steps += 1
        if run.online and step == 0 and _flat(terms):
            _log.warning("the first rollout teaches nothing: %s", _why(run, terms))
        if self._steps == min(_IDLE * run.objective.updates, run.train.steps):
            raise UserError(
                f"nothing was trained: the gradient was exactly 0 in all of the first {self._steps} steps, since "
                f"{_why(run, terms)}"
            )


def _flat(terms: Mapping[str, Tensor]) -> bool:
    """Whether a rollout had no prompt whose pictures differ in their rewards."""
    return any(name in terms and float(terms[name]) == 1 for name in ("flat_prompts", "ties"))


def _why(run: Trainer, terms: Mapping[str, Tensor]) -> str:
    """The likely reason for which there is no gradient, and what to change."""
    reward = getattr(run.lender.reward, "name", "the reward")
    if getattr(getattr(run.adapters, "config", None), "alpha", None) == 0:
        return "adapter.alpha=0 multiplies all that it does by 0: take another alpha"
    if run.objective.needs.differentiable:
        return (
            f"the gradient of reward '{reward}' is 0 at every picture: it rounds, counts or is cut off (round, byte, a "
            "comparison, clamp). Take a smooth one, or objective=ddpo"
        )
    if not _flat(terms):
        return (
            "the loss does not depend on what is trained: look at adapter.targets, at masks that are all black, and at "
            "weights that are 0"
        )
    if run.train.batch_size * run.accelerator.num_processes == 1:
        return "a picture is compared with none but itself: raise train.batch_size, and objective.group"
    value = f"{float(terms['reward']):.4g}" if "reward" in terms else "the same"
    return (
        f"the pictures of each prompt have equal rewards ('{reward}', {value} in the mean): take a reward that tells "
        "them apart, larger groups, or a lower objective.reward_noise"
    )


def check_drawing(model: Any, preview: PreviewConfig, guard: Guard | None) -> None:
    """Refuse previews and checks of the guard that the model cannot draw, before there is anything to lose.

    Raises:
        UserError: it draws no pictures, or not in so many steps; the message names the option.
    """
    if preview.prompts and not hasattr(model, "draw"):
        raise UserError(f"model '{model.source}' ({model.family}) draws no pictures: set preview.prompts=[]")
    drawn: dict[str, tuple[Any, GuidanceStack | None]] = {}
    if preview.prompts:
        drawn["preview"] = preview, GuidanceStack.of_options(preview, "preview.guidance")
    if guard is not None:
        drawn["guards"] = guard, guard.guidance
    for section, (how, terms) in drawn.items():
        with named(f"{section}.steps"):
            model.check_steps(how.steps)
        with named(f"{section}.guidance"):
            scale = getattr(how, "image_cfg_scale", None)
            checked_guidance(model, how.steps, how.cfg_scale, terms, image_cfg_scale=scale)


@contextmanager
def named(option: str) -> Iterator[None]:
    """Put the option that led to an error in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def check_weights(
    parameters: Iterable[Tensor], step: int, out: Path, add: Callable[[Tensor], Tensor] = lambda count: count
) -> None:
    """Refuse to save weights that are not numbers over good ones.

    Args:
        add: gives the sum of a count over the processes that have parts of them.

    Raises:
        UserError: names the step and the last good checkpoint.
    """
    bad = sum((~torch.isfinite(local(p)).all()).float() for p in parameters)
    if add(torch.as_tensor(bad)) > 0:
        raise UserError(
            f"the weights are no longer finite after step {step} and were not saved. Use a lower train.lr or another "
            f"train.precision, then {_how_to_go_on(out)}"
        )


def _how_to_go_on(out: Path) -> str:
    found = latest(out)
    if found is None:
        return "start again (there is no checkpoint yet)"
    return f"go on from the last good checkpoint, {found}, with train.resume=true"
