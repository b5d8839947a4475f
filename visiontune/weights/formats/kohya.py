"""LoRA as kohya's scripts write it, for ComfyUI and A1111 too, and DoRA as LyCORIS does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from visiontune.weights._factors import Factors, check_factored, factored, save_tensors
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job
from visiontune.weights.metadata import of_file

FOLDER = False
# One for all layers, whatever their ranks: diffusers mixes up several.
_ALPHA = 1.0
_DORA = (
    "its dora_scale is read by LyCORIS; sd-scripts and diffusers leave it out, and ComfyUI makes something else of it: "
    "they need --rank (a plain LoRA) or --format diff"
)
# sd-scripts looks inside transformers, ResNets, samplers, and the attention and MLP of text encoders.
_READ = re.compile(r"unet\..*\.(attentions|resnets|downsamplers|upsamplers)\.|text_encoder.*\.(self_attn|mlp)\.")


def check(changes: Changes, job: Job) -> None:
    job.keys.kohya(changes.layers)
    check_factored(changes, "kohya")


def write(changes: Changes, path: Path, job: Job) -> Exported:
    done, written = factored(changes, job, path, _ALPHA)
    tensors, names = dict[str, Tensor](), job.keys.kohya(changes.layers)
    for layer, factors in written.items():
        tensors |= _tensors_of(names[layer], factors)
    save_tensors(tensors, path, of_file(done, job, "kohya"))
    if done.dora:
        done.notes.append(_DORA)
    if unread := [layer for layer in done.ranks if not read_by_scripts(layer)]:
        done.notes.append(
            f"sd-scripts leaves out {', '.join(unread)}; LyCORIS and diffusers read them: for sd-scripts merge, or "
            "narrow adapter.targets"
        )
    return done


def read_by_scripts(layer: str) -> bool:
    """Whether sd-scripts' ``networks/lora.py`` makes a LoRA for a layer of Stable Diffusion."""
    return bool(_READ.match(layer))


def _tensors_of(name: str, factors: Factors) -> dict[str, Tensor]:
    found = {
        f"{name}.lora_down.weight": factors.down,
        f"{name}.lora_up.weight": factors.shaped_up(),
        f"{name}.alpha": torch.tensor(_ALPHA),
    }
    if factors.lengths is not None:
        found[f"{name}.dora_scale"] = factors.lengths.view(-1, *[1] * (factors.down.dim() - 1))
    return found
