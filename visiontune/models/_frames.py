"""What families of pictures have in common whose VAE is one of clips: a picture is one frame of it."""

from __future__ import annotations

from torch import Tensor

from visiontune.models.diffusion import DiffusionModel


class OneFrame(DiffusionModel):
    """A family whose latents [b, c, h, w] have an axis of frames for its VAE alone."""

    def moments(self, pixels: Tensor) -> Tensor:
        return super().moments(pixels.unsqueeze(2)).squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.unsqueeze(2)).squeeze(2)
