"""LoRA and DoRA as diffusers' ``load_lora_weights`` reads them: PEFT's keys after the component's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from visiontune.errors import UserError
from visiontune.weights._factors import Factors, check_factored, factored, save_tensors
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job
from visiontune.weights.metadata import of_file

FOLDER = False


def check(changes: Changes, job: Job) -> None:
    _refuse_unread(changes, getattr(job.model, "pipe", None))
    check_factored(changes, "diffusers")


def write(changes: Changes, path: Path, job: Job) -> Exported:
    done, written = factored(changes, job, path)
    tensors = dict[str, Tensor]()
    for layer, factors in written.items():
        # Text encoders are loaded by transformers, which takes names of parameters; PEFT leaves their end out.
        ending = ".weight" if layer.startswith("text_encoder") else ""
        tensors |= tensors_of(job.keys.public(layer), factors, ending)
    save_tensors(tensors, path, of_file(done, job, "diffusers"))
    return done


def _refuse_unread(changes: Changes, pipe: Any) -> None:
    """Refuse layers of parts that the pipeline's ``load_lora_weights`` leaves out without a word, or of all without it.

    Raises:
        UserError: naming the first such part.
    """
    if pipe is None:
        return
    loadable = getattr(pipe, "_lora_loadable_modules", ())
    for layer in changes.layers:
        part = layer.partition(".")[0]
        if part not in loadable:
            raise UserError(f"{type(pipe).__name__} loads no LoRA of its {part}, which this adapter has")


def tensors_of(name: str, factors: Factors, ending: str = "") -> dict[str, Tensor]:
    """``lora_A``, ``lora_B``; PEFT holds the lengths of a convolution's rows as channels of its output."""
    found = {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.shaped_up()}
    if factors.lengths is not None:
        kernel = factors.down.dim() - 2
        lengths = factors.lengths.view(1, -1, *[1] * kernel) if kernel else factors.lengths
        found[f"{name}.lora_magnitude_vector{ending}"] = lengths
    return found
