"""The pocket world's oracle as a reward: exact, but blind to gradients.

Without a subject: 1 where the image shows just what its prompt asks (objects, count, relation), else 0. With a subject:
how much the image's best object looks like it, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.ops.pixels import to_uint8
from visiontune.pocket import oracle
from visiontune.pocket.world import SIZE, SUBJECTS
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import nearest, option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the oracle reward."""

    subject: str | None = option(None, help="score likeness to this pocket subject instead of the prompt")

    def __post_init__(self) -> None:
        if self.subject is not None and self.subject not in SUBJECTS:
            raise UserError(f"subject '{self.subject}' is not in the pocket world{nearest(self.subject, SUBJECTS)}")


def build(config: Config) -> OracleReward:
    """The reward of a config."""
    return OracleReward(config.subject)


class OracleReward(Reward):
    """See the module; images must be 64x64."""

    name = "oracle"
    range: tuple[float, float] = (0.0, 1.0)

    def __init__(self, subject: str | None = None) -> None:
        self.subject = SUBJECTS[subject] if subject else None

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        if images.shape[-2:] != (SIZE, SIZE):
            height, width = images.shape[-2:]
            raise UserError(f"reward '{self.name}' reads images of {SIZE}x{SIZE} pixels, not {width}x{height}")
        pictures = to_uint8(images)
        if self.subject:
            scores = [oracle.subject_fidelity(picture, self.subject) for picture in pictures]
        else:
            scores = [float(_matches(picture, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def _matches(picture: np.ndarray, prompt: str) -> bool:
    try:
        return oracle.matches(picture, prompt)
    except ValueError as error:
        raise UserError(f"the oracle cannot judge this prompt: {error}") from error
