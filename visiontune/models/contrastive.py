"""`ContrastiveModel`: pictures and texts as vectors of one space, which agree where the two belong together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from visiontune.models.base import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What a tower gives, before it is brought to unit length.

    Attributes:
        pooled: [b, d] of the whole picture or text.
        dense: [b, n, d] of each patch, row by row, or of each token: by the layers that make the pooled vector.
        mask: [b, n] True where a token is of the text, its marks of beginning and end included; None for pictures.
    """

    pooled: Tensor
    dense: Tensor
    mask: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Join along the batch; texts of fewer tokens are padded, which their mask leaves out."""
        longest = max(part.dense.shape[1] for part in parts)
        dense = [pad(part.dense, (0, 0, 0, longest - part.dense.shape[1])) for part in parts]
        masks = [pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts if part.mask is not None]
        pooled = torch.cat([part.pooled for part in parts])
        return Features(pooled=pooled, dense=torch.cat(dense), mask=torch.cat(masks) if masks else None)


class ContrastiveModel(Model):
    """A family of two towers: the roles `vision` and `text`, and as `head` what is in neither.

    Attributes:
        architectures: the classes that `config.json` names, or the formats of others, that the family understands.
    """

    task = "zero-shot-image-classification"
    architectures: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side in pixels of the square that pictures are brought to."""

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

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to a logit, a scalar; None where the family has none. Differentiable."""
        return None

    @abstractmethod
    def clamp(self) -> None:
        """Bring a trained `logit_scale` back to 100 at most, where training of CLIP holds it."""
