"""PEFT's own folders (``adapter_config.json`` and ``adapter_model.safetensors``) with LoRA, OFT or BOFT of one module.

What PEFT stores otherwise than visiontune:

- its exact Cayley transform turns the other way than its truncated series, which turns as visiontune does;
- BOFT's blocks are whole matrices, of which PEFT takes half the difference to their transpose, and its outputs' factor
  starts at one;
- OFT of a convolution with a kernel is not the rotation of its weight in PEFT (it sums overlapping patches), so such a
  layer is refused in both directions.

They are written by :mod:`visiontune.weights.formats.peft`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visiontune import adapters
from visiontune.adapters import AdapterSet, boft, oft
from visiontune.adapters._cayley import packed
from visiontune.errors import UserError
from visiontune.weights.lora_files import attach_lora, pair_up, read_tensors, split_key

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


def read_peft(folder: str | Path, modules: Mapping[str, nn.Module], name: str = "default") -> AdapterSet:
    """Attach the adapter of a PEFT folder.

    Args:
        folder: as ``PeftModel.save_pretrained`` writes it: LoRA, OFT or BOFT.
        modules: component -> the module that the folder belongs to.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: no such folder, another method, a key without its layer, or what visiontune's method cannot be.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable adapter_config.json: give a folder that PEFT saved") from error
    readers = {"LORA": _read_lora, "OFT": _read_oft, "BOFT": _read_boft}
    kind = config.get("peft_type")
    if kind not in readers:
        raise UserError(f"{folder} holds PEFT's {kind}; readable are {', '.join(readers)}; the bridge trains any")
    file = folder / "adapter_model.safetensors"
    component, module = next(iter(modules.items()))
    tensors = {}
    for key, value in read_tensors(file).items():
        layer = key.removeprefix(PREFIX)
        if not hasattr(module, "text_model"):
            # A level of text encoders that transformers 5 has dropped; visiontune writes both.
            layer = layer.removeprefix("text_model.")
        tensors[f"{component}.{layer}"] = value.float()
    return readers[kind](file, config, tensors, {component: module}, name)


def _read_lora(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, layer = split_key(key)
        if not part:
            raise UserError(f"{file}: '{key}' is no part of a LoRA or DoRA: merge it in PEFT")
        halves.setdefault(layer, {})[part] = value
    factors = {layer: pair_up(layer, parts, file, config) for layer, parts in halves.items()}
    return attach_lora(factors, modules, name, file)


def _read_oft(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    series = bool(config.get("use_cayley_neumann"))
    rows = {_layer(file, key, ".oft_R.weight"): value for key, value in tensors.items()}
    sizes = {layer: math.isqrt(8 * v.shape[1] + 1) // 2 + 1 for layer, v in rows.items()}
    own = oft.Config(
        block_size=max(sizes.values()),
        block_share=bool(config.get("block_share")),
        cayley="neumann" if series else "exact",
        terms=int(config.get("num_cayley_neumann_terms", 5)),
    )
    values = {f"{layer}.v": v if series else -v for layer, v in rows.items()}
    return _attach(file, modules, own, values, name)


def _read_boft(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    values, shapes = {}, set()
    for key, value in tensors.items():
        if key.endswith(".boft_s"):
            values[f"{_layer(file, key, '.boft_s')}.gain"] = value.flatten() - 1
            continue
        layer, blocks = _layer(file, key, ".boft_R"), value.flatten(0, 1)
        values[f"{layer}.v"] = -packed(blocks) / 2
        shapes.add((blocks.shape[-1], len(value)))
    own = boft.Config(block_size=max(b for b, _ in shapes), factors=max(m for _, m in shapes), rescale=True)
    return _attach(file, modules, own, values, name)


def _layer(file: Path, key: str, ending: str) -> str:
    if not key.endswith(ending):
        raise UserError(f"{file}: '{key}' is not '<layer>{ending}': merge the adapter in PEFT")
    return key.removesuffix(ending)


def _attach(file: Path, modules: Mapping[str, nn.Module], config: Any, values: Tensors, name: str) -> AdapterSet:
    layers = sorted({key.rpartition(".")[0] for key in values})
    made = adapters.attach(modules, config, targets=layers, name=name)
    try:
        for layer in made.layers:
            refuse_kernel(layer, made.weight(layer), ": merge it in PEFT")
        made.fill(file, values)
    except UserError:
        made.detach()
        raise
    return made.eval()


def refuse_kernel(layer: str, weight: Tensor, mend: str = "") -> None:
    """Refuse a convolution with a kernel; the line ends with the ``mend``."""
    if weight[0, 0].numel() > 1:
        raise UserError(f"PEFT does not rotate the weight of a convolution with a kernel, as '{layer}'{mend}")
