"""Rescale: a guided prediction brought back to the deviation of the prompt's own.

Lin et al., 2023, arXiv 2305.08891, section 3.4: phi p std(c) / std(p) + (1 - phi) p, over all values of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visiontune.guidance.base import Control, Strength, rows_of
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Control):
    """The deviation of the prediction, against overexposure."""

    scale: float = option(0.7, least=0, greatest=1, help="phi: 0 leaves the prediction, 1 gives it c's deviation")

    def control(self, p: Tensor, c: Tensor, phi: Strength) -> Tensor:
        back = p * (c.std(rows_of(c), keepdim=True) / p.std(rows_of(p), keepdim=True))
        return phi * back + (1 - phi) * p


def build(config: Config) -> Config:
    """The term."""
    return config
