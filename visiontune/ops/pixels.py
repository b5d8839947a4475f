"""Pixels on their way between files and models: bytes to floats and back, and differentiable framing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Fit = Literal["shortest", "squash", "longest"]


def to_tensor(images: np.ndarray, device: torch.device | str | None = None) -> Tensor:
    """Pictures ``uint8 [..., h, w, c]`` as ``float32 [..., c, h, w]`` in [0, 1], contiguous, on ``device``."""
    # Bytes travel to the device: they are a quarter of the floats.
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device=device).movedim(-1, -3)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images ``[..., c, h, w]`` in [0, 1] as ``uint8 [..., h, w, c]``; what overshoots is clamped."""
    return images.detach().clamp(0, 1).mul(255).round().byte().movedim(-3, -1).cpu().numpy()


def shown(decoded: Tensor) -> Tensor:
    """Pictures ``[b, 3, h, w]`` or clips ``[b, f, 3, h, w]`` in [0, 1] of what a model decodes; differentiable inside.

    Args:
        decoded: ``[b, 3, (f), h, w]``, about [-1, 1].
    """
    pictures = (decoded / 2 + 0.5).clamp(0, 1)
    return pictures if pictures.ndim == 4 else pictures.movedim(2, 1)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a model wants its images: resized, then cut out of the middle."""

    size: int
    """Length in pixels that the shorter (``fit="shortest"``), the longer or both sides are resized to."""
    crop: int
    """Side of the square that is cut out; nothing is cut where it equals ``size`` and the image is square."""
    fit: Fit = "shortest"
    """``squash`` ignores the aspect ratio; ``longest`` pads with black to a square."""
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    rounds_half_crops: bool = False
    """torchvision rounds the offset of the crop where transformers cuts it off."""

    def __call__(self, images: Tensor) -> Tensor:
        """``[b, 3, h, w]`` -> ``[b, 3, crop, crop]``, antialiased and differentiable.

        Bicubic filters overshoot at edges. What is resized is brought into [0, 1] after each direction, as libraries do
        that resize bytes, with the gradient of what was not: a clamp would stop it where pictures are white or black.
        """
        height, width = images.shape[-2:]
        target = self._target(height, width)
        # Half precision would round the resampling; float64 is kept for exact gradients.
        images = images if images.dtype == torch.float64 else images.float()
        for size in ((height, target[1]), target):
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode=self.filter, antialias=True, align_corners=False)
                images = images + (images.clamp(0, 1) - images).detach()
        if self.fit == "longest":
            rest = [self.crop - side for side in target]
            images = F.pad(images, (rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2))
            return images
        top, left = (self._offset(side - self.crop) for side in target)
        return images[..., top : top + self.crop, left : left + self.crop]

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "longest":
            scale = self.size / max(height, width)
            return round(height * scale), round(width * scale)
        # Rounded down, as both libraries do.
        short = min(height, width)
        return self.size * height // short, self.size * width // short

    def _offset(self, excess: int) -> int:
        return round(excess / 2) if self.rounds_half_crops else excess // 2


class Preprocess(nn.Module):
    """Framing and normalisation: ``[b, 3, h, w]`` in [0, 1] -> what an image encoder takes."""

    mean: Tensor
    std: Tensor

    def __init__(self, framing: Framing, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.framing = framing
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (self.framing(images) - self.mean) / self.std
