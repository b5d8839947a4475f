"""WeLore: fine-tuning of the leading components of those matrices whose spectrum says that they compress well.

Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", arXiv
2407.11239.

    r = #{i : sigma_i / sigma_1 > theta},   W' = W + (B A - B0 A0),   B0 A0 = U_r S_r V_r^T

One theta serves all matrices of a component: the value under which a share ``reduction`` of all their normalised
singular values lies. A matrix that loses no smaller a share of its own is one of low rank, and its factors B and A are
trained, from B0 and A0; the others stay frozen. The paper puts B0 A0 in the place of W, which compresses the base and
moves it; here what the factors leave out stays, so the start is the base bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.adapters import corda
from visiontune.adapters._low_rank import LAYERS, matrices
from visiontune.adapters._method import start_follows
from visiontune.adapters._slots import Slot
from visiontune.adapters.base import Method
from visiontune.errors import UserError
from visiontune.schema import option

__all__ = ["LAYERS", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of WeLore; r (in + out) parameters for each linear layer of low rank."""

    reduction: float = option(
        0.5,
        above=0,
        below=1,
        help="share of the singular values of each component that the threshold cuts off; more: fewer parameters",
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """WeLore for the layers of one component; decomposes each weight once, and those of low rank twice.

    Raises:
        UserError: all weights are zero.
    """
    return WeLore(config, layers)


class WeLore(Method):
    """The differences of the factors of one component, and nothing in its frozen layers."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        self.slots, self.layers = {name: Slot() for name in layers}, dict(layers)
        super().__init__(self.slots)
        found = ranks({name: spectrum(layer) for name, layer in layers.items()}, config.reduction)
        if not found:
            raise UserError("all weights that adapter.targets names are zero, which have no components to train")
        self.put(found)
        for name in found:
            adapter = self.slots[name].inner
            adapter.start(layers[name], [None] * adapter.groups)

    def put(self, found: Mapping[str, int]) -> None:
        """Differences of these ranks, to be started; none in the other layers."""
        with start_follows():
            for name, slot in self.slots.items():
                slot.put(corda.Components(corda.Config(rank=found[name]), self.layers[name]) if name in found else None)

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the saved ranks; a layer without tensors is frozen."""
        self.put({name: tensors["up"].shape[1] for name, tensors in saved.items() if "up" in tensors})


def spectrum(layer: Any) -> Tensor:
    """Singular values of a layer's weight over its largest, descending; for groups the largest of each place."""
    values = torch.linalg.svdvals(matrices(layer, layer.weight))
    return (values / values[:, :1].clamp_min(torch.finfo(values.dtype).tiny)).amax(0)


def ranks(spectra: Mapping[str, Tensor], reduction: float) -> dict[str, int]:
    """The ranks of the matrices that are of low rank; of a matrix of zeros nothing is.

    Args:
        spectra: normalised singular values, of every matrix. reduction: in (0, 1).
    """
    spectra = {name: values for name, values in spectra.items() if values.any()}
    if not spectra:
        return {}
    every = torch.cat(list(spectra.values()))
    cut = every.kthvalue(math.ceil(reduction * len(every) - 1e-9)).values.clamp_max(1 - 1e-9)
    lost = {name: int((values <= cut).sum()) for name, values in spectra.items()}
    together = sum(lost.values())
    # In whole numbers, so that equal shares are equal: never are all below what they lose together.
    return {
        name: len(values) - lost[name]
        for name, values in spectra.items()
        if lost[name] * len(every) >= together * len(values)
    }
