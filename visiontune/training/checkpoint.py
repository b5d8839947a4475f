"""Checkpoints that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.training import scattered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STATE, WEIGHTS = "state.pt", "weights.safetensors"


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return out / "checkpoints" / f"step-{step:06d}"


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in the run folder ``out``, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (out / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def latest(out: Path) -> Path | None:
    """The newest checkpoint of the run folder ``out``, if there is one."""
    found = steps(out)
    return folder(out, found[-1]) if found else None


def newest(out: Path, step: int) -> Path | None:
    """The newest checkpoint that is not after ``step``, if there is one."""
    found = [s for s in steps(out) if s <= step]
    return folder(out, found[-1]) if found else None


def save(
    out: Path,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    good: int | None = None,
    main: bool = True,
) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    One process does, or all of them where tensors are sharded: these lie beside the rest then, the weights among them.

    Args:
        out: the run folder.
        step: optimiser steps done.
        weights: trained tensors by name, stored as safetensors.
        state: everything else (optimiser, schedule, averages), stored by ``torch.save`` and read with ``weights_only``.
        keep: how many checkpoints remain.
        good: the newest checkpoint that is not after this step remains too.
        main: whether this process writes what is not sharded.
    """
    target, content = folder(out, step), {**state, "step": step}
    if main:
        remove_folder(target)
    with atomic_write(target) if main else nullcontext(target) as partial:
        if main:
            partial.mkdir()
        if scattered.has_parts(weights):
            place = broadcast_object_list([partial])[0]
            content = scattered.write(place / scattered.FOLDER, {**content, "weights": weights})
        if main:
            _write(partial, weights, content)
    if main:
        _forget(out, keep, good)
    return target


def _write(partial: Path, weights: dict[str, Tensor], content: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    if "weights" not in content:
        save_file({k: v.detach().contiguous().cpu() for k, v in weights.items()}, partial / WEIGHTS)
    # Through a file object: given a path, torch reports a full disk as an unexplained position.
    with (partial / STATE).open("wb") as file:
        torch.save(content, file)


def _forget(out: Path, keep: int, good: int | None) -> None:
    kept = None if good is None else newest(out, good)
    for old in (folder(out, s) for s in steps(out)[:-keep]):
        if old != kept:
            remove_folder(old)


def is_sharded(path: Path) -> bool:
    """Whether the weights of a checkpoint lie in parts."""
    return (path / scattered.FOLDER).is_dir()


def load(
    path: Path, package: str | None = None, mesh: DeviceMesh | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state of the checkpoint ``path``, on the CPU; what was sharded, on the devices of ``mesh``.

    Args:
        path: the checkpoint.
        package: the state may hold objects of its classes; otherwise it holds tensors and plain values.
        mesh: the processes to share out among what was sharded; without one it is whole.

    Raises:
        UserError: the folder's files cannot be read.
    """
    from safetensors.torch import load_file

    try:
        with torch.serialization.safe_globals(_classes(path / STATE, package)):
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        if is_sharded(path):
            state = scattered.read(path / scattered.FOLDER, state, mesh)
            return state.pop("weights"), state
        return load_file(path / WEIGHTS), state
    except Exception as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({error}); remove that folder to use an older one"
        ) from error


def _classes(file: Path, package: str | None) -> list[Any]:
    """The classes of ``package`` that the file names."""
    if package is None:
        return []
    named = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    modules = [name.rpartition(".") for name in named if name.startswith(f"{package}.")]
    # The optimiser is there already, and with it whatever its state consists of: a file has nothing imported.
    found = [getattr(sys.modules.get(module), name, None) for module, _, name in modules]
    return [kind for kind in found if isinstance(kind, type)]


def clear_partial(out: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in (out / "checkpoints").glob(".step-*"):
        if re.fullmatch(r"\.step-\d+\.(\d+\.tmp|old)", path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder if there is one.

    It is renamed first, so that a process killed meanwhile leaves no half checkpoint under a valid name.
    """
    if path.exists():
        doomed = path.with_name(f".{path.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
