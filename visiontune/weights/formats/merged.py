"""A plain diffusers model with the set merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.files import atomic_write
from visiontune.weights.export import Exported, Job, check_biases

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

FOLDER = True


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    if job.pipe is None:
        raise ValueError("a merged model is written from the pipeline that the set is attached to: give pipe")
    check_biases(adapters)
    adapters.merge()
    with atomic_write(path) as partial:
        job.pipe.to(dtype=job.dtype).save_pretrained(partial)
    return Exported(path, "a diffusers model with the adapter in it")
