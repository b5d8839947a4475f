"""Adapters in the formats of other tools; each is a file of :mod:`visiontune.weights.formats`.

LoRA goes over as it is, its strength folded into the second factor, and DoRA with the lengths of its rows. Where a
format has factors alone, any other method, and DoRA where a rank is given, is the best approximation of that rank,
whose error is returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visiontune.errors import UserError
from visiontune.weights import formats
from visiontune.weights.keys import Keys

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet


@dataclass(frozen=True, kw_only=True)
class Job:
    """How to write.

    Attributes:
        dtype: of the written tensors.
        rank: of the approximation of what is no LoRA; none for as many as the change really has.
        keys: what other tools call the model's layers.
        model: the one that the set is attached to: whole models are written from it, and a file of adapters is held
            against what its pipeline loads.
    """

    dtype: torch.dtype
    rank: int | None = None
    keys: Keys = field(default_factory=Keys)
    model: Any = None


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the file or folder. what: in words.
        ranks: rank of each layer, none where there are no factors.
        errors: for each layer, the Frobenius norm of what the factors leave out, relative to the change; 0 is exact.
        dora: whether lengths of rows were written beside the factors.
        note: what the user has to know of its readers.
    """

    path: Path
    what: str
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    dora: bool = False
    note: str = ""

    @property
    def worst(self) -> float:
        """The largest error of a layer."""
        return max(self.errors.values(), default=0.0)

    def text(self) -> str:
        """One line on what was written and how much of the change it leaves out."""
        ranks = f", ranks {min(self.ranks.values())} to {max(self.ranks.values())}" if self.ranks else ""
        loss = f", leaves out {self.worst:.2%} of a layer's change at most" if self.errors else ""
        return f"{self.path}, {self.what}{ranks}{loss}"


@torch.no_grad()
def export(
    adapters: AdapterSet,
    path: str | Path,
    kind: str = "diffusers",
    *,
    dtype: torch.dtype,
    rank: int | None = None,
    keys: Keys | None = None,
    model: Any = None,
) -> Exported:
    """Write a set's change of its base for another tool.

    Args:
        adapters: an attached set, not merged; written at its present ``scale``.
        path: a ``.safetensors`` file or a folder, as the format has it; it is whole or absent.
        kind: the format.
        dtype, rank, model: see :class:`Job`; ``merged`` needs ``model``, and leaves it cast and merged.
        keys: the model's, see :func:`visiontune.weights.keys.keys_of`; by default the names of diffusers and PEFT,
            without which ``kohya`` and ``diff`` cannot be written.

    Raises:
        UserError: unknown format, one that has no names for the layers, a merged or disabled set, or a change that the
            format cannot hold: of biases, or of the joint weight of an ``nn.MultiheadAttention``.
    """
    writer = formats.load(kind)
    if not adapters.active:
        raise UserError(f"adapter '{adapters.name}' is merged or disabled: unmerge or enable it before the export")
    return writer.write(adapters, Path(path), Job(dtype=dtype, rank=rank, keys=keys or Keys(), model=model))


def check_biases(adapters: AdapterSet) -> None:
    """Refuse biases of layers that have none in the base, which readers of the base's layout would leave out.

    Raises:
        UserError: naming the first such layer.
    """
    for layer in adapters.layers:
        bias = adapters.change(layer)[1]
        if bias is not None and bias.any() and getattr(adapters.layer(layer), "bias", None) is None:
            raise UserError(f"'{layer}' got a bias that the base's layer does not have: only visiontune can load that")


def is_joint(adapters: AdapterSet, layer: str) -> bool:
    """Whether a layer is the joint projection of an ``nn.MultiheadAttention``, which is no layer of its own."""
    return layer in adapters.fused and layer.endswith("in_proj")
