"""`ContrastiveModel`: pictures and texts as vectors of one space, which agree where the two belong together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from visiontune.models.base import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What a tower gives, before it is brought to unit length.

    Attributes:
        pooled: [b, d] of the whole picture or text.
        dense: [b, n, d] of each patch, row by row, or of each token: by the layers that make the pooled vector.
    """

    pooled: Tensor
    dense: Tensor


class ContrastiveModel(Model):
    """A family of two towers: the roles `vision` and `text`, and as `head` what is in neither.

    Attributes:
        architectures: the classes that `config.json` names, or the formats of others, that the family understands.
    """

    task = "zero-shot-image-classification"
    architectures: ClassVar[tuple[str, ...]]

    @abstractmethod
    def image_features(self, images: Tensor) -> Features:
        """Of pictures [b, 3, h, w] in [0, 1], of any size; differentiable."""

    @abstractmethod
    def text_features(self, prompts: Sequence[str]) -> Features:
        """Of texts, cut where they are too long; differentiable in the weights."""

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """What a cosine is multiplied by to become a logit, a scalar; differentiable."""
