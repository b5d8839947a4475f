"""LoRA files of other tools: diffusers, PEFT, kohya's scripts and what writes like them.

Factors of any rank, strength and layer become one LoRA set, whose rank is the greatest of them; smaller ones are padded
with zeros, and the strengths ``alpha / rank`` are folded into the second factor, so the change is the file's own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontune import adapters
from visiontune.adapters import AdapterSet
from visiontune.adapters._attention import named_layers
from visiontune.adapters.lora import LAYERS
from visiontune.errors import UserError
from visiontune.weights.names import kohya_name, public_name

_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")
Factors = dict[str, tuple[Tensor, Tensor]]


def read_lora(path: str | Path, modules: Mapping[str, nn.Module], name: str = "default") -> AdapterSet:
    """Attach the LoRA of a file.

    Args:
        path: a ``.safetensors`` file whose keys name layers as diffusers, PEFT or kohya do.
        modules: component name (``unet``, ``text_encoder``, ...) -> module.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: the file cannot be read, a key belongs to no layer, a layer lacks a factor, or a shape does not fit.
    """
    tensors = read_tensors(path)
    return attach_lora(_factors(tensors, _layer_names(modules), path), modules, name, path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or one line that says what is wrong with it."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}): convert it, or copy it again") from error


def attach_lora(factors: Factors, modules: Mapping[str, nn.Module], name: str, path: str | Path) -> AdapterSet:
    """A LoRA set whose changes are ``up @ down``: layer -> down [r, in, kernel ...], up [out, r].

    Raises:
        UserError: ``path`` does not fit a layer.
    """
    rank = max(down.shape[0] for down, _ in factors.values())
    used = {component: module for component, module in modules.items() if _has(component, factors)}
    made = adapters.attach(used, "lora", targets=list(factors), name=name, rank=rank)
    own = made.tensors()
    try:
        for layer, (down, up) in factors.items():
            _fill(own[f"{layer}.down"], down, 0, layer, path)
            _fill(own[f"{layer}.up"], up, 1, layer, path)
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


def _has(component: str, factors: Factors) -> bool:
    return any(layer.startswith(f"{component}.") for layer in factors)


def _layer_names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every name that a file may use -> the layer's own full name."""
    layers = [f"{c}.{n}" for c, module in modules.items() for n, m in named_layers(module) if isinstance(m, LAYERS)]
    names = {layer: layer for layer in layers} | {public_name(layer): layer for layer in layers}
    for two in (False, True):
        names |= {kohya_name(layer, two): layer for layer in layers}
    return names


def _factors(tensors: Mapping[str, Tensor], names: Mapping[str, str], path: str | Path) -> Factors:
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
            "give the model that it was trained on; keys in Stability's own layout are converted by loading the file"
            " into diffusers and saving it again"
        )
    if not halves:
        raise UserError(f"{path} holds no tensors")
    configs = _configs(path)
    return {
        layer: pair_up(layer, parts, path, configs.get(layer.partition(".")[0], {})) for layer, parts in halves.items()
    }


def split_key(key: str) -> tuple[str, str]:
    """Which part of a layer's LoRA a key is (empty: none that is known), and what is left of the name."""
    for part, endings in {"down": _DOWN, "up": _UP, "alpha": (".alpha",)}.items():
        for ending in endings:
            if key.endswith(ending):
                return part, key.removesuffix(ending)
    return "", key


def pair_up(
    layer: str, parts: Mapping[str, Tensor], path: str | Path, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Both factors of a layer, the second one with the strength that the file or PEFT's ``config`` gives it."""
    for part in ("down", "up"):
        if part not in parts:
            raise UserError(f"{path}: '{layer}' has no {part} factor: copy the file again")
    down, up = parts["down"].float(), parts["up"].float()
    rank = down.shape[0]
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(layer.partition(".")[2], config, rank)
    return down, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * up.flatten(1)


def _alpha(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """PEFT's alpha of a layer; where nothing is said it is the rank."""
    patterns = config.get("alpha_pattern") or {}
    own = next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", layer)), None)
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
