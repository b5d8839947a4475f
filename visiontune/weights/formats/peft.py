"""LoRA, OFT and BOFT of one component in a folder of PEFT's own; see :mod:`visiontune.weights.peft_folders`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune.adapters._cayley import skew
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights._factors import Factors, decomposed, save_tensors
from visiontune.weights.export import Exported, Job
from visiontune.weights.formats.diffusers import tensors_of
from visiontune.weights.peft_folders import PREFIX, Tensors, refuse_kernel

if TYPE_CHECKING:
    from peft import PeftConfig

    from visiontune.adapters import AdapterSet

FOLDER = True


def write(adapters: AdapterSet, path: Path, job: Job) -> Exported:
    """Write a set of one component for ``peft.PeftModel.from_pretrained``.

    Raises:
        UserError: several components, or a method or a layer that PEFT's format cannot hold, such as a part of an
            ``nn.MultiheadAttention``.
    """
    writers: dict[str, Callable[[AdapterSet], tuple[Any, Tensors]]] = {"lora": _lora, "oft": _oft, "boft": _boft}
    components = {layer.partition(".")[0] for layer in adapters.layers}
    if adapters.method not in writers:
        raise UserError(f"PEFT has no format for '{adapters.method}'; it has one for {', '.join(writers)}")
    if len(components) > 1:
        raise UserError(f"a PEFT folder holds one component, not {', '.join(sorted(components))}: export as diffusers")
    if adapters.fused:
        raise UserError(f"PEFT cannot load a part of a torch attention, as '{adapters.fused[0]}': export as 'diff'")
    config, tensors = writers[adapters.method](adapters)
    strip = f"{components.pop()}."
    config.target_modules = sorted(layer.removeprefix(strip) for layer in adapters.layers)
    with atomic_write(path) as partial:
        partial.mkdir()
        config.save_pretrained(str(partial))
        named = {f"{PREFIX}{key.removeprefix(strip)}": value for key, value in tensors.items()}
        save_tensors(named, partial / "adapter_model.safetensors", job.dtype)
    return Exported(path, f"PEFT's {adapters.method} on {len(adapters.layers)} layers")


def _lora(adapters: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import LoraConfig

    tensors: Tensors = {}
    for layer in adapters.layers:
        found, plain = decomposed(adapters, layer), adapters.low_rank(layer)
        if found is None and plain is None:
            raise UserError(f"'{layer}' is no plain LoRA (groups, embeddings): export it as diffusers")
        tensors |= tensors_of(layer, found or Factors(*plain))
    rank = adapters.config.rank
    return LoraConfig(r=rank, lora_alpha=rank, use_dora=adapters.config.dora), tensors


def _oft(adapters: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import OFTConfig

    config = adapters.config
    sign = -1 if config.cayley == "exact" else 1
    tensors: Tensors = {}
    sizes = set()
    for layer, adapter in adapters.adapters().items():
        refuse_kernel(layer, adapters.weight(layer))
        if adapter.gain is not None:
            raise UserError(f"PEFT's OFT has no factor for each output, as '{layer}' has: export it as diffusers")
        sizes.add(adapter.bank.b)
        tensors[f"{layer}.oft_R.weight"] = sign * adapters.scale * adapter.tensors()["v"]
    return OFTConfig(
        r=0,
        oft_block_size=_one(sizes, "block size"),
        block_share=config.block_share,
        use_cayley_neumann=config.cayley == "neumann",
        num_cayley_neumann_terms=config.terms,
    ), tensors


def _boft(adapters: AdapterSet) -> tuple[PeftConfig, Tensors]:
    from peft import BOFTConfig

    tensors: Tensors = {}
    sizes, counts = set(), set()
    for layer, adapter in adapters.adapters().items():
        weight = adapters.weight(layer)
        refuse_kernel(layer, weight)
        b = adapter.bank.b
        blocks = -adapters.scale * skew(adapter.tensors()["v"], b).unflatten(0, (-1, adapter.blocks))
        gain = weight.new_zeros(len(weight)) if adapter.gain is None else adapters.scale * adapter.gain
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
