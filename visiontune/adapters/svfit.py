"""SVFit: training of the largest singular values of each weight.

Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
arXiv 2409.05926.

    W = U S V^T,    W' = W + U_r (S_r t) V_r^T,    t [r], zero at the start

That is the paper's training of S_r with one learning rate for singular values of every size; weight decay pulls the
values towards those of the base. With all of them (``energy: 1``) it is SVDiff.
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
    """Options of SVFit; r parameters for each layer (each group of a convolution)."""

    rank: int | None = option(
        None, least=1, greatest=16384, help="r, at most the smaller side of a weight; default: by energy"
    )
    energy: float = option(
        0.99, above=0, greatest=1, help="the smallest r whose squared singular values sum to this share; in (0, 1]"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SVFit for the layers of one component; decomposes each weight once."""
    factorise = functools.partial(singular_factors, config=config)
    return Method({name: _factors.Diagonal(layer, factorise) for name, layer in layers.items()})


def singular_factors(w: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """U_r S_r [out, r] and V_r^T [r, d] of w [out, d]."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    r = min(config.rank, len(s)) if config.rank is not None else energy_rank(s, config.energy)
    return u[:, :r] * s[:r], v[:r]


def energy_rank(s: Tensor, energy: float) -> int:
    """The smallest number of leading singular values ``s`` that hold a share ``energy`` of their squares."""
    share = s.square().cumsum(0) / s.square().sum()
    return min(int((share < energy - 1e-12).sum()) + 1, len(s))
