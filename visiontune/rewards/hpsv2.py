"""HPS v2: a CLIP ViT-H/14 trained on human preferences between images of one prompt.

Wu et al., "Human Preference Score v2", 2023: the cosine of image and prompt, without scale. Its numbers compare images
of the same prompt; they say little across prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from visiontune.models.clip import ClipEncoder, OpenClip, open_clip_preprocess
from visiontune.models.sources import find_file, load_exactly, read_tensors, weights_of
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of HPS v2."""

    version: Literal["2.0", "2.1"] = option("2.1", help="which of the two published checkpoints")
    model: str = option("xswu/HPSv2", help="checkpoint file, its folder, or a Hub id")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    architecture: str = option("ViT-H-14", help="open_clip name of the architecture")
    fit: Literal["longest", "shortest", "squash"] = option(
        "longest", help="longest: pad to a square, as the authors evaluate; shortest: centre crop; squash: stretch"
    )


def build(config: Config) -> HpsV2:
    """The reward of a config; loads the weights."""
    path = find_file(config.model, _FILES[config.version], config.revision)
    import open_clip

    with weights_of(f"HPS v2 '{config.model}'", "open_clip", config.model):
        with _quietly():
            model: Any = open_clip.create_model(config.architecture, pretrained=None)
        tokenizer = open_clip.get_tokenizer(config.architecture)
    load_exactly(model, read_tensors(path), path)
    return HpsV2(OpenClip(model, tokenizer, open_clip_preprocess(model, config.fit)))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without open_clip's warning that the model has no weights: it is about to get them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class HpsV2(Reward):
    """Cosine in [-1, 1]; 0.2 to 0.36 is usual. Differentiable; images may have any size."""

    name = "hpsv2"
    differentiable: bool = True
    range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        image = self.encoder.image_features(images)
        return (image * self.encoder.text_features(prompts)).sum(-1)
