"""One row of a batch before it is read: which sample, at which size, and its random choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from visiontune.data.base import Config, Sample
from visiontune.data.buckets import Size
from visiontune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One row of a batch before it is encoded: which sample, at which size, its random choices, and of which set."""

    index: int
    size: Size
    flip: bool = False
    drop: bool = False
    hide: bool = False
    seed: int = 0
    set: int = 0

    def centering(self, config: Config) -> tuple[float, float]:
        """Where the row is cropped, in all its columns."""
        if config.crop == "center":
            return 0.5, 0.5
        x, y = torch.rand(2, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return x, y


def reading(sample: Sample, read: Callable[[], Any]) -> Any:
    """What ``read`` gives of a sample's file.

    Raises:
        UserError: it cannot be read; it names the sample.
    """
    try:
        return read()
    except Exception as error:  # a damaged file can raise nearly anything from inside a decoder
        raise UserError(f"cannot read image {sample.id}: {' '.join(str(error).split())}") from error
