"""Adapters in the formats of other tools.

==========  ==========================================================  =======================================
format      keys                                                        read by
==========  ==========================================================  =======================================
diffusers   ``unet.<layer>.lora_A.weight``, ``lora_B.weight``           diffusers ``load_lora_weights``
kohya       ``lora_unet_<layer>.lora_down.weight``, ``lora_up``, alpha  kohya's scripts, ComfyUI, A1111, diffusers
diff        ``lora_unet_<layer>.diff``, ``.diff_b``                     ComfyUI
==========  ==========================================================  =======================================

LoRA goes over as it is, its strength folded into the second factor, and DoRA with the lengths of its rows
(``lora_magnitude_vector``; in kohya's files ``dora_scale``). Any other method, and DoRA where a rank is given, is the
best approximation of that rank, whose error is returned, or in full as ``diff``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.lora import DoRA
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights.keys import Keys

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

Format = Literal["diffusers", "kohya", "diff"]
_FACTORED = (nn.Linear, *CONVOLUTIONS)
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "diff")


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the file. ranks: rank of each layer, none for ``diff``.
        errors: for each layer, the Frobenius norm of what the factors leave out, relative to the change; 0 is exact.
        dora: whether lengths of rows were written beside the factors.
    """

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    dora: bool = False

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(self.errors.values(), default=0.0)


@torch.no_grad()
def export(
    adapters: AdapterSet,
    path: str | Path,
    kind: Format = "diffusers",
    *,
    rank: int | None = None,
    dtype: torch.dtype,
    keys: Keys | None = None,
) -> Exported:
    """Write a set's change of its base for another tool.

    Args:
        adapters: an attached set, not merged; written at its present ``scale``.
        path: a ``.safetensors`` file; it is whole or absent.
        kind: see the module's table.
        rank: of the approximation where the method is no LoRA; default: as many as the change really has.
        dtype: of the written tensors.
        keys: the model's, see :func:`visiontune.weights.keys.keys_of`, without which only ``diffusers`` can be written.

    Raises:
        UserError: unknown format, one that has no names for the layers, a merged or disabled set, a change of biases
            that the format cannot hold, or of the joint weight of an ``nn.MultiheadAttention``.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format '{kind}'; known: {', '.join(FORMATS)}")
    if not adapters.active:
        raise UserError(f"adapter '{adapters.name}' is merged or disabled: unmerge or enable it before the export")
    if kind == "diff":
        check_biases(adapters)
    done, tensors = Exported(Path(path)), dict[str, Tensor]()
    keys = keys or Keys()
    if kind == "diffusers":
        names = {layer: keys.public(layer) for layer in adapters.layers}
    else:
        names = keys.kohya(adapters.layers)
    for layer in adapters.layers:
        weight, bias = adapters.change(layer)
        joint = layer in adapters.fused and layer.endswith("in_proj")
        if kind == "diff":
            name = names[layer]
            tensors |= _dense_parameters(name, weight, bias) if joint else _dense(name, weight, bias)
            continue
        if joint:
            raise UserError(
                f"'{layer}' is the joint weight of an attention, which {kind} has no name for: export 'diff', or merge"
            )
        if not isinstance(adapters.layer(layer), _FACTORED):
            raise UserError(
                f"'{layer}' is neither linear nor a convolution, as {kind} needs: export as 'diff', or merge"
            )
        if bias is not None and bias.any():
            raise UserError(f"'{layer}' has a changed bias, which {kind} cannot hold: export as 'diff', or merge")
        own = decomposed(adapters, layer) if rank is None else None
        if own is not None:
            down, up, lengths = own
            tensors |= _lengths(kind, names[layer], lengths, weight.dim())
            done.dora, done.errors[layer] = True, 0.0
        else:
            factors = adapters.low_rank(layer)
            down, up = factorise(weight, rank) if factors is None else factors
            if not up.shape[1]:
                continue  # a layer to which a method gave no rank
            done.errors[layer] = _error(weight, down, up)
        done.ranks[layer] = up.shape[1]
        tensors |= _pair(kind, names[layer], down, up)
    written = {key: value.to(dtype).cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(done.path) as temporary:
        save_file(written, temporary, {"format": "pt"})
    return done


@torch.no_grad()
def check_biases(adapters: AdapterSet) -> None:
    """Refuse biases of layers that have none in the base, which readers of the base's layout would leave out.

    Raises:
        UserError: naming the first such layer.
    """
    for layer in adapters.layers:
        bias = adapters.change(layer)[1]
        if bias is not None and bias.any() and getattr(adapters.layer(layer), "bias", None) is None:
            raise UserError(f"'{layer}' got a bias that the base's layer does not have: only visiontune can load that")


def write_merged(pipe: Any, adapters: AdapterSet, folder: str | Path, dtype: torch.dtype) -> Path:
    """Write ``pipe`` as a plain diffusers model with the set merged into it; it stays merged.

    Args:
        pipe: the pipeline that the set is attached to; it is cast.
        adapters: at its present scale. folder: whole or absent. dtype: of the written weights.

    Raises:
        UserError: see :func:`check_biases`.
    """
    folder = Path(folder)
    check_biases(adapters)
    adapters.merge()
    with atomic_write(folder) as partial:
        pipe.to(dtype=dtype).save_pretrained(partial)
    return folder


def decomposed(adapters: AdapterSet, layer: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Factors and lengths of rows of a layer with DoRA; none for other methods and for several groups."""
    adapter = adapters.adapters()[layer]
    return adapter.decomposed(adapters.layer(layer).weight, adapters.scale) if isinstance(adapter, DoRA) else None


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


def _pair(kind: Format, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    up = up.view(*up.shape, *[1] * (down.dim() - 2))
    if kind == "diffusers":
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    # Readers multiply by alpha / rank. One alpha for all layers, whatever their ranks: diffusers mixes up several.
    alpha = torch.tensor(1.0)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * down.shape[0], f"{name}.alpha": alpha}


def _lengths(kind: Format, name: str, lengths: Tensor, dims: int) -> dict[str, Tensor]:
    """PEFT holds those of a convolution as channels of its output, LyCORIS as rows of the weight."""
    if kind == "diffusers":
        return {f"{name}.lora_magnitude_vector": peft_lengths(lengths, dims)}
    return {f"{name}.dora_scale": lengths.view(-1, *[1] * (dims - 1))}


def peft_lengths(lengths: Tensor, dims: int) -> Tensor:
    """Lengths of rows [out] of a weight with ``dims`` dimensions as PEFT's ``lora_magnitude_vector``."""
    return lengths if dims == 2 else lengths.view(1, -1, *[1] * (dims - 2))


def _dense(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {f"{name}.diff": weight} | ({} if bias is None else {f"{name}.diff_b": bias})


def _dense_parameters(name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Readers go by the keys of the model's state dict, less a last ``.weight``, of which these have none."""
    return {f"{name}_weight.diff": weight} | ({} if bias is None else {f"{name}_bias.diff": bias})
