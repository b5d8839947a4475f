"""LoRA files of other tools: diffusers, PEFT, kohya's scripts and what writes like them.

Factors of any rank, strength and layer become one LoRA set, whose rank is the greatest of them; smaller ones are padded
with zeros, and the strengths ``alpha / rank`` are folded into the second factor, so the change is the file's own. Where
a layer has lengths of rows (DoRA), the set is one of DoRA; layers without them keep those that their factors give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontune import adapters, outside
from visiontune.adapters import AdapterSet
from visiontune.adapters._attention import named_layers
from visiontune.adapters.lora import LAYERS, row_lengths
from visiontune.errors import UserError
from visiontune.weights._factors import Factors
from visiontune.weights.keys import Keys

_ENDINGS = {
    "down": (".lora_A.weight", ".lora_down.weight", ".lora.down.weight"),
    "up": (".lora_B.weight", ".lora_up.weight", ".lora.up.weight"),
    "alpha": (".alpha",),
    "lengths": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),  # PEFT's
    "dora_scale": (".dora_scale",),  # LyCORIS's
}


def read_lora(
    path: str | Path, modules: Mapping[str, nn.Module], keys: Keys | None = None, name: str = "default"
) -> AdapterSet:
    """Attach the LoRA of a file.

    Args:
        path: a ``.safetensors`` file whose keys name layers as diffusers and PEFT do, or as ``keys`` says.
        modules: component name (``unet``, ``text_encoder``, ...) -> module.
        keys: the model's, see :func:`visiontune.weights.keys.keys_of`; by default the names of diffusers and PEFT.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: the file cannot be read, a key belongs to no layer, a layer lacks a factor, or a shape does not fit.
    """
    tensors = read_tensors(path)
    layers = [f"{c}.{n}" for c, module in modules.items() for n, m in named_layers(module) if isinstance(m, LAYERS)]
    return attach_lora(_factors(tensors, (keys or Keys()).names(layers), path), modules, name, path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or one line that says what is wrong with it."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): convert it, or copy it again") from error


def attach_lora(
    factors: Mapping[str, Factors], modules: Mapping[str, nn.Module], name: str, path: str | Path
) -> AdapterSet:
    """A LoRA or DoRA set with the factors of each layer.

    Raises:
        UserError: ``path`` does not fit a layer.
    """
    rank = max(given.down.shape[0] for given in factors.values())
    dora = any(given.lengths is not None for given in factors.values())
    used = {component: module for component, module in modules.items() if _has(component, factors)}
    made = adapters.attach(used, "lora", targets=list(factors), name=name, rank=rank, dora=dora)
    own = made.tensors()
    try:
        for layer, (down, up, lengths) in factors.items():
            _fill(own[f"{layer}.down"], down, 0, layer, path)
            _fill(own[f"{layer}.up"], up, 1, layer, path)
            if dora:
                base = made.layer(layer).weight
                if lengths is None:
                    lengths = row_lengths(base.double() + (up.double() @ down.double().flatten(1)).view_as(base))
                _fill(own[f"{layer}.gain"], lengths - row_lengths(base), 0, layer, path)
    except UserError:
        made.detach()
        raise
    made.refresh()
    return made.eval()


@torch.no_grad()
def _fill(own: Tensor, given: Tensor, dim: int, layer: str, path: str | Path) -> None:
    """Copy into the first rows (``dim`` 0) or columns (1), as many as the given rank."""
    rank = given.shape[dim]
    corner = own.narrow(dim, 0, rank) if given.dim() == own.dim() else own
    if corner.shape != given.shape:
        raise UserError(
            f"{path}: '{layer}' has a factor of shape {tuple(given.shape)}, the model takes {tuple(own.shape)}: "
            "load it into the model it was trained on"
        )
    own.zero_()
    corner.copy_(given)


def _has(component: str, factors: Mapping[str, Factors]) -> bool:
    return any(layer.startswith(f"{component}.") for layer in factors)


def _factors(tensors: Mapping[str, Tensor], names: Mapping[str, str], path: str | Path) -> dict[str, Factors]:
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        part, stem = split_key(key)
        layer = names.get(stem.removeprefix("base_model.model.")) if part else None
        if layer is None:
            unknown.append(key)
        else:
            halves.setdefault(layer, {})[part] = value
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(tensors)} keys belong to no layer of this model, such as '{unknown[0]}': "
            "give the model that it was trained on"
        )
    if not halves:
        raise UserError(f"{path} holds no tensors")
    configs = _configs(path)
    return {
        layer: pair_up(layer, parts, path, configs.get(layer.partition(".")[0], {})) for layer, parts in halves.items()
    }


def split_key(key: str) -> tuple[str, str]:
    """Which part of a layer's LoRA a key is (empty: none that is known), and what is left of the name."""
    for part, endings in _ENDINGS.items():
        for ending in endings:
            if key.endswith(ending):
                return part, key.removesuffix(ending)
    return "", key


def pair_up(layer: str, parts: Mapping[str, Tensor], path: str | Path, config: Mapping[str, Any]) -> Factors:
    """The factors of a layer, the second one with the strength that the file or PEFT's ``config`` gives it.

    Raises:
        UserError: a factor is missing, or the lengths are those of the weight's columns.
    """
    for part in ("down", "up"):
        if part not in parts:
            raise UserError(f"{path}: '{layer}' has no {part} factor: copy the file again")
    down, up = parts["down"].float(), parts["up"].float()
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(layer.partition(".")[2], config, rank)
    strength = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    lengths = parts.get("lengths")
    if "dora_scale" in parts:
        lengths = parts["dora_scale"]
        if len(lengths) != len(up):
            raise UserError(
                f"{path}: the DoRA of '{layer}' scales inputs (LyCORIS without wd_on_out), which has no counterpart "
                "here: merge it with the tool that trained it"
            )
    return Factors(down, strength * up.flatten(1), None if lengths is None else lengths.double().flatten())


def _alpha(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """PEFT's alpha of a layer; where nothing is said it is the rank."""
    patterns = config.get("alpha_pattern") or {}
    own = next(
        (pattern for pattern in patterns if outside.matches(rf"(.*\.)?({pattern})", layer, "alpha_pattern")), None
    )
    return float(patterns[own] if own else config.get("lora_alpha") or rank)


def _configs(path: str | Path) -> dict[str, dict[str, Any]]:
    """PEFT's config of each component, as diffusers writes it into the header of its files: ``unet.lora_alpha`` ..."""
    with safe_open(path, "pt") as file:
        flat = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    return configs
