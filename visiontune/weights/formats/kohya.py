"""LoRA as kohya's scripts write it, for ComfyUI and A1111 too, and DoRA as LyCORIS does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.weights._factors import Factors, write_factors
from visiontune.weights.export import Exported, Job

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

FOLDER = False
_DORA = "its dora_scale is read by LyCORIS; diffusers and ComfyUI need --rank (a plain LoRA) or --format diff"


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    done = write_factors(adapters, path, job, "kohya", job.keys.kohya(adapters.layers), _tensors_of)
    done.note = _DORA if done.dora else ""
    return done


def _tensors_of(name: str, factors: Factors) -> dict[str, Tensor]:
    # Readers multiply by alpha / rank. One alpha for all layers, whatever their ranks: diffusers mixes up several.
    found = {
        f"{name}.lora_down.weight": factors.down,
        f"{name}.lora_up.weight": factors.shaped_up() * factors.rank,
        f"{name}.alpha": torch.tensor(1.0),
    }
    if factors.lengths is not None:
        found[f"{name}.dora_scale"] = factors.lengths.view(-1, *[1] * (factors.down.dim() - 1))
    return found
