"""LoRA as kohya's scripts write it, for ComfyUI and A1111 too, and DoRA as LyCORIS does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from visiontune.weights._factors import Factors, check_factored, factored, save_tensors
from visiontune.weights._native import joined
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job
from visiontune.weights.keys import Reader
from visiontune.weights.metadata import of_file

FOLDER = False
_MOST = 16  # layers that a line names
_DORA = (
    "its dora_scale is read by LyCORIS; kohya's scripts and diffusers leave it out, and ComfyUI makes something else "
    "of it: they need --rank (a plain LoRA) or --format diff"
)


def check(changes: Changes, job: Job) -> None:
    job.keys.kohya(changes.layers)
    check_factored(changes, "kohya")


def write(changes: Changes, path: Path, job: Job) -> Exported:
    keys = job.keys
    done, written = factored(changes, job, path, keys.ALPHA)
    tensors = dict[str, Tensor]()
    for name, native in keys.kohya(changes.layers).items():
        if factors := joined(native, written, keys):
            tensors |= _tensors_of(name, factors, keys.ALPHA or float(factors.rank))
    save_tensors(tensors, path, of_file(done, job, "kohya"))
    if done.dora:
        done.notes.append(_DORA)
    done.notes += [
        f"{name} {left}: {reader.mend}" for name, reader in keys.READERS.items() if (left := _left(reader, done))
    ]
    return done


def _left(reader: Reader, done: Exported) -> str:
    """What a reader does not read of what was written, in words; nothing if it reads all."""
    unread = [layer for layer in done.ranks if not reader.places.match(layer)]
    if len(unread) == len(done.ranks):
        return "reads none of it"
    more = f" and {len(unread) - _MOST} more" if len(unread) > _MOST else ""
    return f"has no place for {', '.join(unread[:_MOST])}{more}" if unread else ""


def _tensors_of(name: str, factors: Factors, alpha: float) -> dict[str, Tensor]:
    found = {
        f"{name}.lora_down.weight": factors.down,
        f"{name}.lora_up.weight": factors.shaped_up(),
        f"{name}.alpha": torch.tensor(alpha),
    }
    if factors.lengths is not None:
        found[f"{name}.dora_scale"] = factors.lengths.view(-1, *[1] * (factors.down.dim() - 1))
    return found
