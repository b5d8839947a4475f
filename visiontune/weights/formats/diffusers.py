"""LoRA and DoRA as diffusers' ``load_lora_weights`` reads them: PEFT's keys after the component's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from visiontune.errors import UserError
from visiontune.weights._factors import Factors, write_factors
from visiontune.weights.export import Exported, Job

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

FOLDER = False


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    _refuse_unread(adapters, getattr(job.model, "pipe", None))
    names = {layer: job.keys.public(layer) for layer in adapters.layers}
    return write_factors(adapters, path, job, "diffusers", names, tensors_of)


def _refuse_unread(adapters: AdapterSet, pipe: Any) -> None:
    """Refuse layers of parts that the pipeline's ``load_lora_weights`` leaves out without a word.

    Raises:
        UserError: naming the first such part.
    """
    if not hasattr(pipe, "_lora_loadable_modules"):
        return
    for layer in adapters.layers:
        part = layer.partition(".")[0]
        if part not in pipe._lora_loadable_modules:
            raise UserError(f"{type(pipe).__name__} loads no LoRA of its {part}, which this adapter has: export merged")


def tensors_of(name: str, factors: Factors) -> dict[str, Tensor]:
    """``lora_A``, ``lora_B``; PEFT holds the lengths of a convolution's rows as channels of its output."""
    found = {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.shaped_up()}
    if factors.lengths is not None:
        kernel = factors.down.dim() - 2
        lengths = factors.lengths.view(1, -1, *[1] * kernel) if kernel else factors.lengths
        found[f"{name}.lora_magnitude_vector"] = lengths
    return found
