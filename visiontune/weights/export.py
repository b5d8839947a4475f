"""Adapters in the formats of other tools.

==========  ==========================================================  =======================================
format      keys                                                        read by
==========  ==========================================================  =======================================
diffusers   ``unet.<layer>.lora_A.weight``, ``lora_B.weight``           diffusers ``load_lora_weights``, PEFT, ComfyUI
kohya       ``lora_unet_<layer>.lora_down.weight``, ``lora_up``, alpha  kohya's scripts, ComfyUI, A1111, diffusers
diff        ``lora_unet_<layer>.diff``, ``.diff_b``                     ComfyUI
==========  ==========================================================  =======================================

LoRA goes over as it is, its strength folded into the second factor. Any other method is the best approximation of a
given rank, whose error is returned, or in full as ``diff``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights.names import kohya_name, public_name

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

Format = Literal["diffusers", "kohya", "diff"]
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "diff")


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the file. ranks: rank of each layer, none for ``diff``.
        errors: for each layer, the Frobenius norm of what the factors leave out, relative to the change; 0 is exact.
    """

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(self.errors.values(), default=0.0)


@torch.no_grad()
def export(
    adapters: AdapterSet, path: str | Path, kind: Format = "diffusers", *, rank: int | None = None, dtype: torch.dtype
) -> Exported:
    """Write a set's change of its base for another tool.

    Args:
        adapters: an attached set, not merged; written at its present ``scale``.
        path: a ``.safetensors`` file; it is whole or absent.
        kind: see the module's table.
        rank: of the approximation where the method is no LoRA; default: as many as the change really has.
        dtype: of the written tensors.

    Raises:
        UserError: unknown format, a merged or disabled set, a change of biases that the format cannot hold, or of the
            joint weight of an ``nn.MultiheadAttention``.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format '{kind}'; known: {', '.join(FORMATS)}")
    if not adapters.active:
        raise UserError(f"adapter '{adapters.name}' is merged or disabled: unmerge or enable it before the export")
    done, tensors = Exported(Path(path)), dict[str, Tensor]()
    for layer in adapters.layers:
        weight, bias = adapters.change(layer)
        joint = layer in adapters.fused and layer.endswith("in_proj")
        if kind == "diff":
            name = kohya_name(layer, _two_encoders(adapters))
            tensors |= _dense_parameters(name, weight, bias) if joint else _dense(name, weight, bias)
            continue
        if joint:
            raise UserError(
                f"'{layer}' is the joint weight of an attention, which {kind} has no name for: export 'diff', or merge"
            )
        if bias is not None and bias.any():
            raise UserError(f"'{layer}' has a changed bias, which {kind} cannot hold: export as 'diff', or merge")
        factors = adapters.low_rank(layer)
        down, up = factorise(weight, rank) if factors is None else factors
        done.ranks[layer] = up.shape[1]
        done.errors[layer] = _error(weight, down, up)
        tensors |= _pair(kind, layer, adapters, down, up)
    written = {key: value.to(dtype).cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(done.path) as temporary:
        save_file(written, temporary, {"format": "pt"})
    return done


def factorise(change: Tensor, rank: int | None = None, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The best ``up @ down`` of a rank for ``change`` [out, in, kernel ...]: down [r, in, kernel ...], up [out, r].

    Without ``rank``, all singular values above ``tolerance`` of the largest.
    """
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    r = rank or max(1, int((s > tolerance * s[0]).sum()))
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).view(-1, *change.shape[1:]), u[:, :r] * root


def _error(change: Tensor, down: Tensor, up: Tensor) -> float:
    left = change.flatten(1).double() - up.double() @ down.flatten(1).double()
    return float(left.norm() / change.double().norm().clamp_min(1e-30))


def _two_encoders(adapters: AdapterSet) -> bool:
    return any(name.startswith("text_encoder_2.") for name in adapters.layers)


def _pair(kind: Format, layer: str, adapters: AdapterSet, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    up = up.view(*up.shape, *[1] * (down.dim() - 2))
    if kind == "diffusers":
        name = public_name(layer)
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    # Readers multiply by alpha / rank. One alpha for all layers, whatever their ranks: diffusers mixes up several.
    name, alpha = kohya_name(layer, _two_encoders(adapters)), torch.tensor(1.0)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * down.shape[0], f"{name}.alpha": alpha}


def _dense(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {f"{name}.diff": weight} | ({} if bias is None else {f"{name}.diff_b": bias})


def _dense_parameters(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Readers go by the keys of the model's state dict, less a last ``.weight``, of which these have none."""
    return {f"{name}_weight.diff": weight} | ({} if bias is None else {f"{name}_bias.diff": bias})
