"""Subject fidelity: cosine between an image and photographs of the subject in the space of DINO.

The metric DINO of Ruiz et al., "DreamBooth", CVPR 2023, here with any ViT of transformers (DINO, DINOv2). It looks at
the whole image: copying a photograph scores best, so pair it with a reward that reads the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.data import pictures
from visiontune.errors import UserError
from visiontune.models.sources import pretrained, weights_of
from visiontune.ops.pixels import Framing, Preprocess, to_tensor
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the DINO reward."""

    references: Path | None = option(None, help="folder of images of the subject, or one image; required")
    model: str = option("facebook/dinov2-base", help="folder or Hub id of a ViT with a class token")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    over: Literal["mean", "max"] = option("mean", help="how the cosines with several references become one score")


def build(config: Config) -> Dino:
    """The reward of a config; loads the weights and the references."""
    if config.references is None:
        raise UserError("the reward dino needs references: set references: FOLDER, with images of the subject")
    references = _read(config.references.expanduser())
    from transformers import AutoImageProcessor, AutoModel

    with weights_of(f"the image encoder '{config.model}'", "transformers", config.model, revision=config.revision):
        # The published DINO has no pooler, which is not read here.
        model: Any = pretrained(AutoModel, config.model, unread=("pooler.",), revision=config.revision or "main")
        processor = AutoImageProcessor.from_pretrained(config.model, revision=config.revision or "main")
        preprocess = Preprocess(_framing(processor), processor.image_mean, processor.image_std)
    return Dino(model, preprocess, references, config.over)


class Dino(Reward):
    """Cosine in [-1, 1]; differentiable; images may have any size. Prompts are not read."""

    name = "dino"
    differentiable: bool = True
    range: tuple[float, float] = (-1.0, 1.0)

    def __init__(self, model: nn.Module, preprocess: Preprocess, references: list[Tensor], over: str = "mean") -> None:
        self.model: Any = model.float().eval().requires_grad_(False)
        self.preprocess, self.over = preprocess, over
        with torch.no_grad():
            self.references = torch.cat([self.features(image) for image in references])

    def features(self, images: Tensor) -> Tensor:
        """Unit class-token features ``[b, d]`` of images ``[b, 3, h, w]`` in [0, 1]."""
        self.model.to(images.device)
        pixels = self.preprocess.to(images.device)(images)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        features = self.features(images)
        cosines = features @ self.references.to(features).T
        return cosines.amax(1) if self.over == "max" else cosines.mean(1)


def _framing(processor: Any) -> Framing:
    size, crops = processor.size, getattr(processor, "do_center_crop", False)
    if processor.resample not in _FILTERS:
        raise ValueError(f"its preprocessing resamples by filter {processor.resample}, which is not supported")
    filter = _FILTERS[processor.resample]
    if crops and size.get("shortest_edge"):
        crop = processor.crop_size["height"]
        return Framing(size=size["shortest_edge"], crop=crop, filter=filter)
    if not crops and size.get("height") and size["height"] == size.get("width"):
        return Framing(size=size["height"], crop=size["height"], fit="squash", filter=filter)
    raise ValueError(f"its preprocessing resizes to {dict(size)}, which is not supported")


def _read(path: Path) -> list[Tensor]:
    """Images ``[1, 3, h, w]`` of a file or a folder."""
    files = [path] if path.is_file() else pictures.in_folder(path) if path.is_dir() else []
    if not files:
        raise UserError(f"there are no reference images in {path}")
    return [to_tensor(np.array(pictures.read(file)))[None] for file in files]
