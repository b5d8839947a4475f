"""LoRA, OFT and BOFT in a folder of PEFT's own, of one component or of a model that is one module.

See :mod:`visiontune.weights.peft_folders`. OFT and BOFT go over as they are; sets of other methods where they are
factors, or where a rank is given, as LoRA.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from visiontune.adapters import AdapterSet
from visiontune.adapters._cayley import skew
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights._factors import check_factored, factored, save_tensors
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job, off_by
from visiontune.weights.formats.diffusers import tensors_of
from visiontune.weights.metadata import of_file
from visiontune.weights.peft_folders import PREFIX, Tensors, refuse_kernel

if TYPE_CHECKING:
    from peft import PeftConfig

FOLDER = True
_BUTTERFLY = (
    "PEFT loads BOFT of several factors only where its CUDA extension builds, and elsewhere stops at a size mismatch: "
    "there use --rank (a LoRA) or another format"
)


def check(changes: Changes, job: Job) -> None:
    """Refuse what ``peft.PeftModel.from_pretrained`` does not load.

    Raises:
        UserError: several components, or a method or a layer that PEFT's format cannot hold, such as a part of an
            ``nn.MultiheadAttention``; PEFT, which writes its own config, is not installed.
    """
    part = _part(changes, job)
    if importlib.util.find_spec("peft") is None:
        raise UserError("PEFT, which writes its own config, is not installed: pip install 'visiontune[peft]'")
    if own := _own(part, job):
        for layer in part.layers:
            refuse_kernel(layer, part.layer(layer).weight)
        (_oft if own.method == "oft" else _boft)(part, own, job)
        return
    check_factored(part, "PEFT")
    for found in part.sets:
        for layer in found.layers:
            if job.rank is None and layer in part.layers and _unfactored(part, layer):
                raise UserError(
                    f"PEFT has no format for '{found.method}' on '{layer}', and no --rank of a LoRA is given"
                )


def write(changes: Changes, path: Path, job: Job) -> Exported:
    part = _part(changes, job)
    component, own = _component(part, job), _own(part, job)
    if own is None:
        done, config, tensors = _lora(part, path, job)
    else:
        config, tensors, errors = (_oft if own.method == "oft" else _boft)(part, own, job)
        done = Exported(path, f"PEFT's {own.method} on {len(part.layers)} layers", errors=errors)
        if getattr(config, "boft_n_butterfly_factor", 1) > 1:
            done.notes.append(_BUTTERFLY)
    left = {layer.partition(".")[0] for layer in changes.layers} - {layer.partition(".")[0] for layer in part.layers}
    if left:
        done.notes.append(f"not written: {', '.join(sorted(left))}; each needs a folder of its own, by --component")
    with atomic_write(path) as partial:
        partial.mkdir()
        config.save_pretrained(str(partial))
        header = of_file(done, job, "peft")
        save_tensors(_named(tensors, component, job), partial / "adapter_model.safetensors", header)
    return done


def _part(changes: Changes, job: Job) -> Changes:
    """The changes of the only component, or of the one that was chosen."""
    components = sorted({layer.partition(".")[0] for layer in changes.layers})
    known = ", ".join(components)
    if job.component is None and len(components) > 1 and job.root is None:
        raise UserError(f"a PEFT folder holds one component (--component), not {known}")
    if job.component not in (None, *components):
        raise UserError(f"the adapter has no component '{job.component}'; it has {known}")
    one = job.component or (components[0] if job.root is None else None)
    part = changes if one is None else changes.only(one)
    for layer in part.layers:
        if any(layer in found.fused for found in part.sets):
            raise UserError(f"PEFT cannot load a part of a torch attention, as '{layer}'")
    return part


def _component(part: Changes, job: Job) -> str:
    """The beginning of our names of layers that PEFT's do not have; nothing where one module has all networks."""
    return "" if job.component is None and job.root is not None else f"{part.layers[0].partition('.')[0]}."


def _own(part: Changes, job: Job) -> AdapterSet | None:
    """The set that PEFT has a method for which is no LoRA."""
    found = [s for s in part.sets if any(layer in part.layers for layer in s.layers)]
    return found[0] if job.rank is None and len(found) == 1 and found[0].method in ("oft", "boft") else None


def _unfactored(part: Changes, layer: str) -> bool:
    return part.low_rank(layer) is None and part.decomposed(layer) is None


def _named(tensors: Tensors, component: str, job: Job) -> Tensors:
    """By PEFT's keys, which begin with a level more for text encoders of transformers before 5: both, for both to read.

    What belongs to the other version is left aside there.
    """
    named = {}
    for key, value in tensors.items():
        for name in {key, job.keys.public(key)}:
            named[f"{PREFIX}{name.removeprefix(component)}"] = value.clone()
    return named


def _targets(part: Changes, job: Job) -> list[str]:
    component = _component(part, job)
    return sorted(layer.removeprefix(component) for layer in part.layers)


def _lora(part: Changes, path: Path, job: Job) -> tuple[Exported, PeftConfig, Tensors]:
    from peft import LoraConfig

    done, written = factored(part, job, path)
    done.what = f"PEFT's lora on {len(written)} layers"
    tensors: Tensors = {}
    for layer, factors in written.items():
        tensors |= tensors_of(layer, factors)
    rank, component = max(done.ranks.values(), default=1), _component(part, job)
    others = {layer.removeprefix(component): own for layer, own in done.ranks.items() if own != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_dora=done.dora,
        target_modules=sorted(layer.removeprefix(component) for layer in written),
    )
    return done, config, tensors


def _oft(part: Changes, own: AdapterSet, job: Job) -> tuple[PeftConfig, Tensors, dict[str, float]]:
    from peft import OFTConfig

    config, tensors, errors = own.config, dict[str, Tensor](), dict[str, float]()
    sign = -1 if config.cayley == "exact" else 1
    sizes, counts = set(), set()
    for layer in part.layers:
        adapter = own.adapters()[layer]
        if adapter.gain is not None:
            raise UserError(f"PEFT's OFT has no factor for each output, as '{layer}' has")
        sizes.add(adapter.bank.b)
        counts.add(part.layer(layer).weight.shape[1] // adapter.bank.b)
        turned = sign * own.scale * adapter.tensors()["v"].detach()
        tensors[f"{layer}.oft_R.weight"] = turned.to(job.dtype)
        errors[layer] = off_by(turned.to(job.dtype), turned, turned)
    if len(sizes) > 1 and len(counts) > 1:
        raise UserError(f"PEFT has one block size, or one number of blocks, for all layers, not sizes {sorted(sizes)}")
    alike = len(sizes) == 1
    return (
        OFTConfig(
            r=0 if alike else counts.pop(),
            oft_block_size=sizes.pop() if alike else 0,
            block_share=config.block_share,
            use_cayley_neumann=config.cayley == "neumann",
            num_cayley_neumann_terms=config.terms,
            target_modules=_targets(part, job),
        ),
        tensors,
        errors,
    )


def _boft(part: Changes, own: AdapterSet, job: Job) -> tuple[PeftConfig, Tensors, dict[str, float]]:
    from peft import BOFTConfig

    tensors, errors = Tensors(), dict[str, float]()
    sizes, counts = set(), set()
    for layer in part.layers:
        adapter, weight = own.adapters()[layer], part.layer(layer).weight
        b = adapter.bank.b
        blocks = -own.scale * skew(adapter.tensors()["v"].detach(), b).unflatten(0, (-1, adapter.blocks))
        # A factor near one would lose most of what it is off from it.
        gain = weight.new_zeros(len(weight)) if adapter.gain is None else own.scale * adapter.gain.detach()
        tensors |= {f"{layer}.boft_R": blocks.to(job.dtype), f"{layer}.boft_s": 1 + gain.float()[:, None]}
        errors[layer] = off_by(blocks.to(job.dtype), blocks, blocks)
        sizes.add(b)
        counts.add(len(blocks))
    config = BOFTConfig(
        boft_block_size=_one(sizes, "block size"),
        boft_n_butterfly_factor=_one(counts, "number of factors"),
        target_modules=_targets(part, job),
    )
    return config, tensors, errors


def _one(values: set[int], what: str) -> int:
    if len(values) > 1:
        raise UserError(f"PEFT has one {what} for all layers, not {sorted(values)}")
    return values.pop()
