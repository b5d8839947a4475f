"""The whole change of weights and biases, for ComfyUI: ``.diff`` and ``.diff_b`` after its names of the layers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from visiontune.weights._changes import Dense
from visiontune.weights._factors import save_tensors
from visiontune.weights._native import stacked
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job, check_biases, off_by, rounded
from visiontune.weights.metadata import of_file

FOLDER = False


def check(changes: Changes, job: Job) -> None:
    job.keys.comfy(changes.layers)
    check_biases(changes)


def write(changes: Changes, path: Path, job: Job) -> Exported:
    tensors, done = dict[str, Tensor](), Exported(path, "")
    for name, native in job.keys.comfy(changes.layers).items():
        parts = {layer: _rounded(changes, layer, job, done) for layer in native.layers if layer in changes.layers}
        # Readers go by the keys of the model's state dict, less a last ``.weight``, of which a joint weight has none.
        endings = ("_weight.diff", "_bias.diff") if changes.joint(native.layers[0]) else (".diff", ".diff_b")
        for ending, change in zip(endings, stacked(native, parts, job.keys), strict=True):
            if change is not None:
                tensors[f"{name}{ending}"] = change
    save_tensors(tensors, path, of_file(done, job, "diff"))
    done.what, done.notes = f"{len(done.errors)} layers", rounded(job.dtype, done.worst)
    return done


def _rounded(changes: Changes, layer: str, job: Job, done: Exported) -> Dense:
    """What a layer's weight and bias change by as it is written; how far that is off goes into ``done``."""
    found = []
    for change in changes.change(layer):
        written = None if change is None or not change.any() else change.to(job.dtype)
        if written is not None and change is not None:
            done.errors[layer] = max(done.errors.get(layer, 0.0), off_by(written, change, change))
        found.append(written)
    return Dense(*found)
