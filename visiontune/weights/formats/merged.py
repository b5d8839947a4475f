"""A plain model, in the layout that it was opened from, with the sets merged into it."""

from __future__ import annotations

from pathlib import Path

import torch

from visiontune.files import atomic_write
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job, check_biases, off_by, rounded

FOLDER = True


def check(changes: Changes, job: Job) -> None:
    check_biases(changes)


def write(changes: Changes, path: Path, job: Job) -> Exported:
    if job.model is None:
        raise ValueError("a merged model is written from the model that the set is attached to: give model")
    done = Exported(path, "a plain model with the adapter in it")
    done.errors = {layer: _error(changes, layer, job.dtype) for layer in changes.layers}
    done.notes = rounded(job.dtype, done.worst)
    changes.merge()
    if getattr(job.model, "rated", ()):
        done.notes.append(f"draws the best by {', '.join(job.model.rated)}, and can be asked for nothing else")
    with atomic_write(path) as partial:
        for network in job.model.networks().values():
            network.to(dtype=job.dtype)
        job.model.save(partial)
    return done


def _error(changes: Changes, layer: str, dtype: torch.dtype) -> float:
    """What rounding takes from the change: of a weight that is large beside it, more than of the change alone."""
    base = changes.layer(layer)
    errors = []
    for before, change in zip((base.weight, getattr(base, "bias", None)), changes.change(layer), strict=True):
        if change is not None and before is not None:
            wanted = before.double() + change.double()
            errors.append(off_by(wanted.to(before.dtype).to(dtype), wanted, change))
    return max(errors)
