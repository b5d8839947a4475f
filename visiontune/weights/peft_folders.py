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

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visiontune import adapters
from visiontune.adapters import AdapterSet, boft, oft
from visiontune.adapters._attention import named_layers
from visiontune.adapters._cayley import packed
from visiontune.adapters._layers import fan_in
from visiontune.errors import UserError
from visiontune.outside import read_json, shown
from visiontune.weights import peft_fields
from visiontune.weights.keys import Keys
from visiontune.weights.lora_files import attach_changes, changes, read_tensors

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
# More make no difference in float32, and a file could ask for any number.
_MOST_TERMS = 1000


def read_peft(folder: str | Path, modules: Mapping[str, nn.Module], name: str = "default") -> AdapterSet:
    """Attach the adapter of a PEFT folder.

    Args:
        folder: as ``PeftModel.save_pretrained`` writes it: LoRA, OFT or BOFT.
        modules: component -> the module that the folder belongs to; with several, the folder is of the one module that
            they are children of, and its layers' names begin with theirs.
        name: see :func:`visiontune.adapters.attach`.

    Raises:
        UserError: no such folder, another method, an option or a key that is not read, or what visiontune's method
            cannot be.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    config = read_json(where, "adapter_config.json of PEFT's folder")
    if not isinstance(config, dict):
        raise UserError(f"{where} is no mapping of PEFT's options: give a folder that PEFT saved")
    readers = {"LORA": _read_lora, "OFT": _read_oft, "BOFT": _read_boft}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in readers:
        said = shown(str(kind))
        raise UserError(f"{folder} holds PEFT's {said}; readable are {', '.join(readers)}; the bridge trains any")
    peft_fields.check(config, kind, str(where))
    file = folder / "adapter_model.safetensors"
    tensors = {}
    for key, value in read_tensors(file)[0].items():
        layer = key.removeprefix(PREFIX)
        if len(modules) == 1:
            component, module = next(iter(modules.items()))
            if not hasattr(module, "text_model"):
                # A level of text encoders that transformers 5 has dropped; visiontune writes both.
                layer = layer.removeprefix("text_model.")
            layer = f"{component}.{layer}"
        tensors[layer] = value.float()
    return readers[kind](file, config, tensors, modules, name)


def of_root(folder: Path, networks: Collection[str]) -> bool:
    """Whether a folder's layers are named from the networks on, as those of a model that is one module."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return False
    named = {key.removeprefix(PREFIX).partition(".")[0] for key in read_tensors(file)[0]}
    return bool(named) and named <= {*networks}


def _read_lora(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    found = changes(file, tensors, modules, Keys(modules=modules), {component: config for component in modules})
    return attach_changes(found, modules, name)


def _read_oft(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    series, values, sizes = bool(config.get("use_cayley_neumann")), Tensors(), dict[str, int]()
    terms = int(config.get("num_cayley_neumann_terms", 5))
    if series and not 3 <= terms <= _MOST_TERMS:
        raise UserError(f"{file}: OFT with num_cayley_neumann_terms={terms} has no counterpart here: merge it in PEFT")
    radius = _radius(file, config)
    for layer, _, value in _layers(file, tensors, modules, {".oft_R.weight": 2}):
        sizes[layer] = b = (math.isqrt(8 * value.shape[1] + 1) + 1) // 2
        if not value.numel() or b * (b - 1) // 2 != value.shape[1]:
            raise UserError(f"{file}: '{layer}' has rotations of shape {tuple(value.shape)}: copy the adapter again")
        value = value if radius is None else _projected(value, radius)
        values[f"{layer}.v"] = value if series else -value
    common: dict[str, Any] = {
        "block_share": bool(config.get("block_share")),
        "cayley": "neumann" if series else "exact",
        "terms": terms if series else 5,
    }
    if radius is not None:
        if len(set(sizes.values())) > 1:
            raise UserError(
                f"{file}: its layers have blocks of {_listed(sizes.values())} and COFT's bound, which differs by size "
                "here: merge it in PEFT"
            )
        # PEFT's radius has no factor b^2.
        common |= {"coft": True, "eps": radius / max(sizes.values()) ** 2}
    count = int(config.get("r") or 0)
    options = [oft.Config(n_blocks=count, **common)] if count > 0 else []
    options.append(oft.Config(block_size=max(sizes.values()), **common))
    inputs = {layer: fan_in(module) for layer, module in _modules(modules).items() if layer in sizes}
    own = next((c for c in options if all(_size(c, n, inputs[n]) == b for n, b in sizes.items())), None)
    if own is None:
        raise UserError(
            f"{file}: PEFT's layers have blocks of {_listed(sizes.values())}, which neither one size nor one number of "
            "blocks gives here: merge it in PEFT, or give the model that it was trained on"
        )
    return _attach(file, modules, own, values, name)


def _radius(file: Path, config: Mapping[str, Any]) -> float | None:
    """PEFT's eps where the rotations are bounded."""
    if not config.get("coft"):
        return None
    eps = float(config.get("eps", 6e-5))
    if eps <= 0:
        raise UserError(f"{file}: OFT with coft and eps={eps} turns nothing: train it with a positive eps")
    return eps


def _size(config: oft.Config, layer: str, inputs: int) -> int:
    try:
        return oft.block_size(config, layer, inputs)
    except UserError:
        return 0


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, sorted(set(numbers))))


def _projected(v: Tensor, radius: float) -> Tensor:
    """What PEFT's COFT makes of a layer's blocks [r, b (b - 1) / 2] before it turns anything."""
    norm = 2**0.5 * v.norm(dim=1, keepdim=True)
    return v * (radius / len(v) ** 0.5 / norm.clamp_min(1e-30)).clamp_max(1)


def _read_boft(
    file: Path, config: Mapping[str, Any], tensors: Tensors, modules: Mapping[str, nn.Module], name: str
) -> AdapterSet:
    values, shapes = Tensors(), dict[str, tuple[int, int]]()
    for layer, part, value in _layers(file, tensors, modules, {".boft_R": 4, ".boft_s": 2}):
        if part == ".boft_s":
            values[f"{layer}.gain"] = value.flatten() - 1
            continue
        if value.shape[2] != value.shape[3] or not value.numel():
            raise UserError(f"{file}: '{layer}' has rotations of shape {tuple(value.shape)}: copy the adapter again")
        values[f"{layer}.v"] = -packed(value.flatten(0, 1)) / 2
        shapes[layer] = (value.shape[-1], len(value))
    if not shapes:
        raise UserError(f"{file} has no rotations: copy the adapter again")
    b, m = (max(pair[i] for pair in shapes.values()) for i in (0, 1))
    if b % 2:
        raise UserError(f"{file}: PEFT's BOFT has blocks of {b}, visiontune's are even: merge it in PEFT")
    own = boft.Config(block_size=b, factors=m, rescale=True)
    inputs = {layer: fan_in(module) for layer, module in _modules(modules).items() if layer in shapes}
    if any(inputs[layer] % 2 or boft.shape(own, layer, inputs[layer]) != shape for layer, shape in shapes.items()):
        raise UserError(
            f"{file}: PEFT's layers have blocks of {_listed(b for b, _ in shapes.values())}, which one size does not "
            "give here: merge it in PEFT, or give the model that it was trained on"
        )
    return _attach(file, modules, own, values, name)


def _modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        f"{component}.{name}": layer
        for component, module in modules.items()
        for name, layer in named_layers(module)
        if isinstance(layer, oft.LAYERS)
    }


def _layers(
    file: Path, tensors: Tensors, modules: Mapping[str, nn.Module], endings: Mapping[str, int]
) -> Iterator[tuple[str, str, Tensor]]:
    """Layer, ending and tensor of each key; ``endings`` have the number of dimensions that a tensor must have."""
    names = Keys(modules=modules).names(_modules(modules))
    for key, value in tensors.items():
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        if ending is None:
            raise UserError(f"{file}: '{shown(key)}' is not '<layer>{next(iter(endings))}': merge the adapter in PEFT")
        layer = names.get(key.removesuffix(ending))
        if layer is None:
            raise UserError(f"{file}: '{shown(key)}' belongs to no layer: give the model that it was trained on")
        if value.dim() != endings[ending]:
            raise UserError(f"{file}: '{shown(key)}' has shape {tuple(value.shape)}: copy the adapter again")
        yield layer, ending, value


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
