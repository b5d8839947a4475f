"""The whole change of weights and biases, for ComfyUI: ``.diff`` and ``.diff_b`` after its names of the layers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from visiontune.weights._factors import save_tensors
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job, check_biases, off_by, rounded
from visiontune.weights.metadata import of_file

FOLDER = False


def check(changes: Changes, job: Job) -> None:
    job.keys.comfy(changes.layers)
    check_biases(changes)


def write(changes: Changes, path: Path, job: Job) -> Exported:
    tensors, done = dict[str, Tensor](), Exported(path, "")
    for layer, name in job.keys.comfy(changes.layers).items():
        # Readers go by the keys of the model's state dict, less a last ``.weight``, of which a joint weight has none.
        endings = ("_weight.diff", "_bias.diff") if changes.joint(layer) else (".diff", ".diff_b")
        for ending, change in zip(endings, changes.change(layer), strict=True):
            if change is not None and change.any():
                written = change.to(job.dtype)
                tensors[f"{name}{ending}"] = written
                done.errors[layer] = max(done.errors.get(layer, 0.0), off_by(written, change, change))
    save_tensors(tensors, path, of_file(done, job, "diff"))
    done.what, done.notes = f"{len(done.errors)} layers", rounded(job.dtype, done.worst)
    return done
