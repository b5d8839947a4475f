"""The whole change of weights and biases, for ComfyUI: ``.diff`` and ``.diff_b`` after kohya's names of layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from visiontune.weights._factors import save_tensors
from visiontune.weights.export import Exported, Job, check_biases, is_joint

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

FOLDER = False


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    check_biases(adapters)
    tensors = dict[str, Tensor]()
    for layer, name in job.keys.kohya(adapters.layers).items():
        weight, bias = adapters.change(layer)
        # Readers go by the keys of the model's state dict, less a last ``.weight``, of which a joint weight has none.
        keys = ("_weight.diff", "_bias.diff") if is_joint(adapters, layer) else (".diff", ".diff_b")
        tensors |= {f"{name}{key}": value for key, value in zip(keys, (weight, bias), strict=True) if value is not None}
    save_tensors(tensors, path, job.dtype)
    return Exported(path, f"{len(adapters.layers)} layers")
