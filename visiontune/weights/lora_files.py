"""Adapter files of other tools: LoRA, DoRA and what changes whole weights.

Factors of any rank, strength and layer become one LoRA set, whose rank is the greatest of them; smaller ones are padded
with zeros, and the strengths ``alpha / rank`` are folded into the second factor, so the change is the file's own. Where
a layer has lengths of rows (DoRA), the set is one of DoRA; layers without them keep those that their factors give. A
file with any layer that is more than that (LoHa, LoKr, OFT, differences of weights, biases) becomes a ``dense`` set.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visiontune import adapters
from visiontune.adapters import AdapterSet
from visiontune.adapters._attention import named_layers
from visiontune.adapters._quantised import weight_of
from visiontune.adapters.dense import LAYERS
from visiontune.adapters.lora import row_lengths
from visiontune.errors import UserError
from visiontune.outside import parse_json, regular, shown
from visiontune.weights import peft_fields
from visiontune.weights._changes import Dense, Misfit, Strength, change_of, dense
from visiontune.weights._factors import Factors
from visiontune.weights._native import split, whole
from visiontune.weights._parts import places
from visiontune.weights.keys import Keys, Native
from visiontune.weights.keys._likely import likely

Changes = Mapping[str, Factors | Dense]


def read_lora(
    path: str | Path, modules: Mapping[str, nn.Module], keys: Keys | None = None, name: str = "default"
) -> AdapterSet:
    """Attach the adapter of a file.

    Args:
        path: a ``.safetensors`` file whose keys name layers as diffusers and PEFT do, or as ``keys`` says.
        modules: component name (``unet``, ``text_encoder``, ...) -> module.
        keys: the model's, see :func:`visiontune.weights.keys.keys_of`; by default the names of diffusers and PEFT.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: the file cannot be read or is of another format, a key belongs to no layer, a layer lacks a part, a
            shape does not fit, a value is not finite, or its header says what cannot be read.
    """
    tensors, header = read_tensors(path)
    if "visiontune_format" in header:
        raise UserError(f"{path} is an adapter of visiontune already: use it as it is")
    return attach_changes(changes(path, tensors, modules, keys or Keys(), _configs(path, header)), modules, name)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and what its header says beside them.

    Raises:
        UserError: it is no such file, or holds values that are not finite.
    """
    file = regular(path)
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            header = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}): convert it, or copy it again") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    for key, value in tensors.items():
        if value.is_complex() or not (value.is_floating_point() or value.numel() == 1):
            raise UserError(
                f"{path}: '{shown(key)}' is of {value.dtype}, as no part of an adapter is: copy the file again"
            )
        if not value.float().isfinite().all():
            raise UserError(f"{path}: '{shown(key)}' has values that are not finite: the training of it failed")
    return tensors, header


def changes(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    keys: Keys,
    configs: Mapping[str, Mapping[str, Any]],
) -> Changes:
    """The change of each layer that a file has.

    Args:
        path: for messages.
        tensors: by the file's keys.
        modules: component -> module.
        keys: what the file may call their layers.
        configs: component -> PEFT's options, checked; empty where nothing is said.

    Raises:
        UserError: see :func:`read_lora`.
    """
    layers = {
        f"{component}.{name}": layer
        for component, module in modules.items()
        for name, layer in named_layers(module)
        if isinstance(layer, LAYERS) and layer.weight is not None
    }
    names = {name: Native((layer,)) for name, layer in _bare(layers).items()} | keys.natives(layers)
    found, bundled = places(path, tensors, functools.partial(_named, names), lambda: _mend(tensors, keys))
    parts: dict[Native, dict[str, Tensor]] = {}
    stems: dict[Native, str] = {}
    for key, place in found.items():
        parts.setdefault(place.native, {})[place.part] = tensors[key].float()
        stems[place.native] = place.stem
    if not parts:
        raise UserError(f"{path} changes no layer")
    if bundled:
        named = ", ".join(map(shown, bundled))
        warnings.warn(f"{path}: the embeddings bundled with it are left out: {named}", stacklevel=3)
    result: dict[str, Factors | Dense] = {}
    for native, own in parts.items():
        component = native.layers[0].partition(".")[0]
        strength = _strength(configs.get(component, {}), (stems[native], *native.layers), str(path))
        try:
            result |= _changes_of(native, own, layers, strength, stems[native].startswith("oft_"))
        except Misfit as error:
            raise UserError(f"{path}: '{' + '.join(native.layers)}' {error}") from error
    return result


def _mend(names: Iterable[str], keys: Keys) -> str:
    """What helps where a file has names that the model's layers do not have."""
    families = likely(names)
    if families and keys.family not in families:
        return f"its names are of {', '.join(families)}: give the model that it was trained on"
    if type(keys) is Keys and any(key.startswith("lora_") for key in names):
        return f"kohya's names of layers are not known for the family '{keys.family}': give a file in diffusers' names"
    return "give the model that it was trained on"


def _changes_of(
    native: Native, parts: Mapping[str, Tensor], layers: Mapping[str, nn.Module], strength: Strength, kohyas_oft: bool
) -> dict[str, Factors | Dense]:
    """The changes of the model's layers that a layer of the file is, from its parts."""
    weights = [_base(layers[layer]) for layer in native.layers]
    change = change_of(parts, whole(native, weights), strength, kohyas_oft)
    if not _finite(change):
        raise Misfit("has a change that is too large for a number: the training of it failed")
    found = split(native, change, [len(weight) for weight in weights])
    for layer, weight in zip(native.layers, weights, strict=True):
        # Of embeddings and of several groups, tools have factors of other shapes than visiontune.
        plain = isinstance(layers[layer], nn.Linear) or getattr(layers[layer], "groups", 0) == 1
        if layer in found and not plain:
            found[layer] = dense(found[layer], weight)
    return found


def _base(layer: nn.Module) -> Tensor:
    """The weight where files are read, which need not be where the model lies."""
    return weight_of(layer).detach().cpu()


def _finite(change: Factors | Dense) -> bool:
    """Whether the weight's change has a number in every place, of factors whatever their product may be."""
    if isinstance(change, Dense):
        return all(value is None or bool(value.isfinite().all()) for value in change)
    most = change.rank * float(change.up.abs().max()) * float(change.down.abs().max())
    return most < torch.finfo(torch.float32).max


def _bare(layers: Iterable[str]) -> dict[str, str]:
    """Layers by their names without the component, where that is clear: as diffusers' first files have them, and under
    what ComfyUI calls any denoiser."""
    named: dict[str, list[str]] = {}
    for layer in layers:
        named.setdefault(layer.partition(".")[2], []).append(layer)
    clear = {name: found[0] for name, found in named.items() if len(found) == 1}
    return clear | {f"diffusion_model.{name}": layer for name, layer in clear.items()}


def _named(names: Mapping[str, Native], stem: str) -> Native | None:
    """What a name is to the model's layers; files that have Stability's or kohya's names may have dots in them."""
    return names.get(stem) or names.get(stem.replace(".", "_"))


def attach_changes(found: Changes, modules: Mapping[str, nn.Module], name: str) -> AdapterSet:
    """A LoRA, DoRA or dense set with the change of each layer, in evaluation mode."""
    used = {c: module for c, module in modules.items() if any(layer.startswith(f"{c}.") for layer in found)}
    factors = {layer: change for layer, change in found.items() if isinstance(change, Factors)}
    attach = _attach_factors if len(factors) == len(found) else _attach_dense
    made = attach(found, used, name)  # type: ignore[arg-type]
    made.refresh()
    return made.eval()


@torch.no_grad()
def _attach_factors(factors: Mapping[str, Factors], modules: Mapping[str, nn.Module], name: str) -> AdapterSet:
    rank = max(given.rank for given in factors.values())
    dora = any(given.lengths is not None for given in factors.values())
    made = adapters.attach(modules, "lora", targets=list(factors), name=name, rank=rank, dora=dora)
    own = made.tensors()
    for layer, (down, up, lengths) in factors.items():
        own[f"{layer}.down"].zero_()[: len(down)] = down
        own[f"{layer}.up"].zero_()[:, : len(down)] = up
        if dora:
            base = _base(made.layer(layer))
            if lengths is None:
                lengths = row_lengths(base.double() + (up.double() @ down.double().flatten(1)).view_as(base))
            own[f"{layer}.gain"].copy_(lengths - row_lengths(base))
    return made


@torch.no_grad()
def _attach_dense(found: Changes, modules: Mapping[str, nn.Module], name: str) -> AdapterSet:
    biases = any(isinstance(change, Dense) and change.bias is not None for change in found.values())
    made = adapters.attach(modules, "dense", targets=list(found), name=name, biases=biases)
    own = made.tensors()
    for layer, change in found.items():
        weight, bias = dense(change, _base(made.layer(layer)))
        if weight is not None:
            own[f"{layer}.change"].copy_(weight)
        if bias is not None:
            shift = own.get(f"{layer}.shift")
            if shift is None or shift.shape != bias.shape:
                made.detach()
                raise UserError(f"'{layer}' has a change of its bias that the model's layer does not take")
            shift.copy_(bias)
    return made


def _strength(config: Mapping[str, Any], names: tuple[str, ...], path: str) -> Strength:
    """PEFT's ``alpha / r`` of a layer; 1 where nothing is said."""

    def strength(rank: int) -> float:
        if not config:
            return 1.0
        patterns = config.get("alpha_pattern") or {}
        own = next((p for p in patterns if any(peft_fields.matches(p, n.partition(".")[2], path) for n in names)), None)
        alpha = patterns[own] if own is not None else config.get("lora_alpha", 8)  # PEFT's default
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return strength


def _configs(path: str | Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's options of each component, as diffusers writes them into a file's header: ``unet.lora_alpha`` ..."""
    where = f"the header of {path} (lora_adapter_metadata)"
    flat = parse_json(header.get("lora_adapter_metadata", "{}"), where)
    if not isinstance(flat, dict):
        raise UserError(f"{where} is no mapping of PEFT's options: save the adapter again")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, option = key.partition(".")
        configs.setdefault(component, {})[option] = value
    for component, config in configs.items():
        peft_fields.check(config, "LORA", f"{where}, {shown(component)}")
    return configs
