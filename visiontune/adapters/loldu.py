"""LoLDU: training of the diagonal of a lower-diagonal-upper factorisation of each weight.

Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
arXiv 2410.13618.

    W = P L D U,    W' = W + (alpha / r) P L_r diag(D_r t) U_r,    t [r], zero at the start

The first r pivots are trained, relative to their size: since D U is the upper factor of the LU decomposition, nothing
is divided by a pivot, however small.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontune.adapters import _factors, _low_rank
from visiontune.adapters.base import Method
from visiontune.schema import option

LAYERS = _low_rank.LAYERS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoLDU; r parameters for each layer (each group of a convolution)."""

    rank: int = option(64, least=1, greatest=16384, help="r, at most the smaller side of a weight")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: the change is multiplied by alpha / rank; default: rank"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """LoLDU for the layers of one component; decomposes each weight once."""
    factorise = functools.partial(triangular_factors, config=config)
    return Method({name: _factors.Diagonal(layer, factorise) for name, layer in layers.items()})


def triangular_factors(w: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(alpha / r) P L_r [out, r] and D_r U_r [r, d] of w [out, d]."""
    p, lower, upper = torch.linalg.lu(w)
    r = min(config.rank, upper.shape[0])
    strength = 1.0 if config.alpha is None else config.alpha / config.rank
    return strength * (p @ lower[:, :r]), upper[:r]
