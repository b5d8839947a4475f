"""A plain model, in the layout that it was opened from, with the set merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.files import atomic_write
from visiontune.weights.export import Exported, Job, check_biases

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

FOLDER = True


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    if job.model is None:
        raise ValueError("a merged model is written from the model that the set is attached to: give model")
    check_biases(adapters)
    adapters.merge()
    with atomic_write(path) as partial:
        for network in job.model.networks().values():
            network.to(dtype=job.dtype)
        job.model.save(partial)
    return Exported(path, "a plain model with the adapter in it")
