"""Samples as models of pictures and texts are trained on them: pixels and captions, with nothing encoded before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiontune.core import Batch
from visiontune.data import transforms
from visiontune.data.base import Config, Sample, listed
from visiontune.data.buckets import Size
from visiontune.data.picks import Pick, reading
from visiontune.errors import UserError


class PixelRows:
    """Pictures in one square size, cropped and flipped as the recipe says, with their captions.

    Args:
        samples: the instance samples.
        config: resolution, crop, flip.
        resolution: side in pixels where the recipe names none.

    Attributes:
        samples, config: as given.
        buckets: the indices of all samples under the one size.
        prior, sets: none.
        train_text: that what texts become is computed in every step.

    Raises:
        UserError: no sample, one without a caption, which is what its picture is compared with, or captions that are
            to be dropped.
    """

    train_text = True

    def __init__(self, samples: Sequence[Sample], config: Config, resolution: int) -> None:
        self.samples, self.config, self.prior = list(samples), config, list[int]()
        side = config.resolution or resolution
        self.buckets: dict[Size, list[int]] = {(side, side): [*range(len(self.samples))]}
        self.sets: dict[int, list[int]] = {}
        if not self.samples:
            raise UserError("the dataset has no images to train on: put images into data.root")
        if config.caption_dropout:
            raise UserError("data.caption_dropout leaves pictures without what they are told apart by: set it to 0")
        if bare := [sample.id for sample in self.samples if not sample.caption.strip()]:
            raise UserError(
                f"{len(bare)} pictures have no caption to be told from others by: {listed(bare)}: write one into a "
                ".txt file beside each, or set data.prompt"
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def collate(self, picks: Sequence[Pick]) -> Batch:
        """The batch of some rows: ``image`` ``[b, 3, h, w]`` in [0, 1], and captions."""
        samples = [self.samples[pick.index] for pick in picks]
        return Batch(
            prompts=[sample.caption for sample in samples],
            data={"image": torch.stack([self._pixels(p, s) for p, s in zip(picks, samples, strict=True)])},
            cond=None,
            weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
            prior=torch.zeros(len(picks), dtype=torch.bool),
            ids=[sample.id for sample in samples],
        )

    def _pixels(self, pick: Pick, sample: Sample) -> Tensor:
        picture, place = reading(sample, sample.sources["image"].open), pick.centering(self.config)
        return (transforms.to_pixels(picture, pick.size, flip=pick.flip, centering=place) + 1) / 2
