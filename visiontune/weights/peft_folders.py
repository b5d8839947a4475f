"""LoRA, OFT and BOFT in PEFT's own folders (``adapter_config.json`` and ``adapter_model.safetensors``), there and back.

A folder holds the adapter of one module, as PEFT's models do. What PEFT stores otherwise than visiontune:

- its exact Cayley transform turns the other way than its truncated series, which turns as visiontune does;
- BOFT's blocks are whole matrices, of which PEFT takes half the difference to their transpose, and its outputs' factor
  starts at one;
- OFT of a convolution with a kernel is not the rotation of its weight in PEFT (it sums overlapping patches), so such a
  layer is refused in both directions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontune import adapters
from visiontune.adapters import AdapterSet, boft, oft
from visiontune.adapters._cayley import packed, skew
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights.export import decomposed, peft_lengths
from visiontune.weights.lora_files import attach_lora, pair_up, read_tensors, split_key

if TYPE_CHECKING:
    from peft import PeftConfig

_PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------- writing


@torch.no_grad()
def write_peft(attached: AdapterSet, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a set of one component for ``peft.PeftModel.from_pretrained``, at its present scale.

    Raises:
        UserError: several components, or a method or a layer that PEFT's format cannot hold, such as a part of an
            ``nn.MultiheadAttention``.
    """
    writers: dict[str, Callable[[AdapterSet], tuple[Any, Tensors]]] = {"lora": _lora, "oft": _oft, "boft": _boft}
    components = {layer.partition(".")[0] for layer in attached.layers}
    if attached.method not in writers:
        raise UserError(f"PEFT has no format for '{attached.method}'; it has one for {', '.join(writers)}")
    if len(components) > 1:
        raise UserError(f"a PEFT folder holds one component, not {', '.join(sorted(components))}: export as diffusers")
    if attached.fused:
        raise UserError(f"PEFT cannot load a part of a torch attention, as '{attached.fused[0]}': export as 'diff'")
    config, tensors = writers[attached.method](attached)
    component = components.pop()
    strip = f"{component}."
    config.target_modules = sorted(layer.removeprefix(strip) for layer in attached.layers)
    folder = Path(folder)
    with atomic_write(folder) as partial:
        partial.mkdir()
        config.save_pretrained(str(partial))
        named = {f"{_PREFIX}{key.removeprefix(strip)}": value for key, value in tensors.items()}
        ready = {key: value.to(dtype).cpu().contiguous() for key, value in named.items()}
        save_file(ready, partial / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _lora(attached: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import LoraConfig

    tensors: Tensors = {}
    for layer in attached.layers:
        own = decomposed(attached, layer)
        factors = attached.low_rank(layer) if own is None else own[:2]
        if factors is None:
            raise UserError(f"'{layer}' is no plain LoRA (groups, embeddings): export it as diffusers")
        down, up = factors
        if own is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = peft_lengths(own[2], down.dim())
        tensors |= {
            f"{layer}.lora_A.weight": down,
            f"{layer}.lora_B.weight": up.view(*up.shape, *[1] * (down.dim() - 2)),
        }
    rank = attached.config.rank
    return LoraConfig(r=rank, lora_alpha=rank, use_dora=attached.config.dora), tensors


def _oft(attached: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import OFTConfig

    config = attached.config
    sign = -1 if config.cayley == "exact" else 1
    tensors: Tensors = {}
    sizes = set()
    for layer, adapter in attached.adapters().items():
        _refuse_kernel(layer, attached.weight(layer))
        if adapter.gain is not None:
            raise UserError(f"PEFT's OFT has no factor for each output, as '{layer}' has: export it as diffusers")
        sizes.add(adapter.bank.b)
        tensors[f"{layer}.oft_R.weight"] = sign * attached.scale * adapter.tensors()["v"]
    return OFTConfig(
        r=0,
        oft_block_size=_one(sizes, "block size"),
        block_share=config.block_share,
        use_cayley_neumann=config.cayley == "neumann",
        num_cayley_neumann_terms=config.terms,
    ), tensors


def _boft(attached: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import BOFTConfig

    tensors: Tensors = {}
    sizes, counts = set(), set()
    for layer, adapter in attached.adapters().items():
        weight = attached.weight(layer)
        _refuse_kernel(layer, weight)
        b = adapter.bank.b
        blocks = -attached.scale * skew(adapter.tensors()["v"], b).unflatten(0, (-1, adapter.blocks))
        gain = weight.new_zeros(len(weight)) if adapter.gain is None else attached.scale * adapter.gain
        tensors |= {f"{layer}.boft_R": blocks, f"{layer}.boft_s": 1 + gain[:, None]}
        sizes.add(b)
        counts.add(len(blocks))
    return BOFTConfig(
        boft_block_size=_one(sizes, "block size"), boft_n_butterfly_factor=_one(counts, "number of factors")
    ), tensors


def _one(values: set[int], what: str) -> int:
    if len(values) > 1:
        raise UserError(f"PEFT has one {what} for all layers, not {sorted(values)}: narrow the targets")
    return values.pop()


def _refuse_kernel(layer: str, weight: Tensor) -> None:
    if weight[0, 0].numel() > 1:
        raise UserError(f"PEFT does not rotate the weight of a convolution with a kernel, as '{layer}': export a diff")


# ---------------------------------------------------------------------------------------------------- reading


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
        layer = key.removeprefix(_PREFIX)
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
            _refuse_kernel(layer, made.weight(layer))
        made.fill(file, values)
    except UserError:
        made.detach()
        raise
    return made.eval()
