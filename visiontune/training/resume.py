"""What of a run is in a checkpoint, and how a run goes on from one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.training import checkpoint, guards, home, optim, result, trouble

if TYPE_CHECKING:
    from visiontune.training.loop import Trainer


_PICTURES = ("samples", guards.FOLDER)
_ROWS, _PROCESSES = "train.batch_size", "number of processes"
_log = logging.getLogger(__name__)


def save(run: Trainer, step: int) -> None:
    """Write the checkpoint of a run after ``step`` steps.

    Raises:
        UserError: the weights are not finite; nothing is written then.
    """
    accelerator, guard = run.accelerator, run.guard
    trouble.check_weights(run.parameters.values(), step, run.out, accelerator.reduce)
    run.meter.reduce(accelerator)
    if guard is not None:
        guard.meter.reduce(accelerator)
    main = accelerator.is_main_process
    if main or run.sharded:
        parts = {name: part.state_dict() for name, part in run.stateful.items()}
        good = guard.good if guard is not None else None
        state = {"settings": _settings(run), "parts": parts}
        checkpoint.save(run.out, step, _weights(run), state, run.train.keep, good, main)
    accelerator.wait_for_everyone()


def begin(run: Trainer) -> int:
    """Take up the newest checkpoint of the run folder if there is one, and put the folder in order; the steps done.

    Errors are those of :func:`take_up`.
    """
    step = take_up(run)
    if run.accelerator.is_main_process:
        checkpoint.clear_partial(run.out)
        for kind in _PICTURES:
            home.forget_steps(run.out / kind, step)
        run.home.begin()
    return step


def take_up(run: Trainer) -> int:
    """Take up the newest checkpoint of the run folder if there is one; the steps done. Nothing is written.

    Raises:
        UserError: there is one, and ``train.resume`` is off; something lies where the run writes; or see :func:`load`.
    """
    found = checkpoint.latest(run.out)
    if found is not None and not run.train.resume:
        raise UserError(f"{run.out} already holds a run ({found.name}); set train.resume=true, or another name")
    step = 0 if found is None else load(run, found)
    home.refuse_others(run.out, result.place(run))
    home.refuse_unknown(run.out)
    for kind in _PICTURES:
        home.later(run.out / kind, step)
    return step


def load(run: Trainer, found: Path) -> int:
    """Take up the checkpoint ``found``; the number of steps done.

    Raises:
        UserError: it cannot be read, or is of another run than this one.
    """
    if run.sharded and not checkpoint.is_sharded(found):
        raise UserError(f"{found} was made without FSDP: go on without it, or use another name")
    mesh = run.shards.mesh if run.sharded and run.shards is not None else None
    weights, state = _of_now(run, *checkpoint.load(found, optim.state_package(run.optimizer), mesh))
    if state["step"] > run.train.steps:
        raise UserError(f"{found} is past train.steps={run.train.steps}: ask for more steps, or use another name")
    _check_same(run, found, weights, state)
    with torch.no_grad():
        for name, tensor in _weights(run).items():
            tensor.copy_(weights[name])
    for name, part in run.stateful.items():
        saved = state["parts"].get(name)
        # What the run had not then starts now; guards cannot, which say so.
        if saved is not None or name == "guard":
            part.load_state_dict(saved)
    if run.guard is not None:
        run.set_rates()
    return state["step"]


def _of_now(
    run: Trainer, weights: dict[str, Tensor], state: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint in today's layout; that of visiontune 0.1 named its parts one by one, and the network a denoiser."""
    if "parts" in state:
        return weights, state
    main = run.model.names()[0]
    weights = {re.sub(r"^denoiser\.", f"{main}.", name): tensor for name, tensor in weights.items()}
    online = state["online"] or {"objective": {}, "reward": None}
    parts = {
        "optimisation": {"optimizer": state["optimizer"], "taken": state["schedule"]},
        **{name: state[name] for name in ("average", "meter", "guard", "scaler")},
        **online,
    }
    return weights, {"settings": state["settings"], "step": state["step"], "parts": parts}


def _weights(run: Trainer) -> dict[str, Tensor]:
    """Trained parameters and the adapters' buffers, by name."""
    buffers = run.adapters.named_buffers() if run.adapters is not None else ()
    return {**run.parameters, **{f"adapters.{name}": buffer for name, buffer in buffers}}


def _settings(run: Trainer) -> dict[str, Any]:
    """What may not change between a checkpoint and the run that goes on from it."""
    return {
        "seed": run.seed,
        _ROWS: run.train.batch_size,
        "train.accumulate": run.train.accumulate,
        "train.optimizer": run.train.optimizer,
        _PROCESSES: run.accelerator.num_processes,
        "hash of adapter.under": run.under_digest,
    }


def _check_same(run: Trainer, path: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    settings = _settings(run)
    if checkpoint.is_sharded(path) and _other_processes(settings, state["settings"]):
        if run.accelerator.is_main_process:
            was = state["settings"][_PROCESSES]
            words = "%s was made by %d processes, and %d go on: on the same rows, with other noise"
            _log.warning(words, path, was, settings[_PROCESSES])
        settings = {name: value for name, value in settings.items() if name not in (_PROCESSES, _ROWS)}
    for name, value in settings.items():
        # Older checkpoints know of nothing under an adapter.
        was = state["settings"].get(name)
        if was != value:
            raise UserError(f"{path} was made with {name}={was}, not {value}; set it back, or use another name")
    now = _weights(run)
    other = {name for name in now.keys() | weights.keys() if _shape(now, name) != _shape(weights, name)}
    if other:
        raise UserError(
            f"{path} does not fit what is trained now ({min(other)} and {len(other) - 1} more tensors differ); "
            "set model and adapter back, or use another name"
        )


def _other_processes(now: Mapping[str, Any], was: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch are the same, and are dealt to another number of processes."""
    rows, before = (found[_PROCESSES] * found[_ROWS] for found in (now, was))
    return rows == before and now[_PROCESSES] != was[_PROCESSES]


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
