"""Models of clips: latents have frames, and so has what they draw."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tiny_rollout import TinyModel as Rolled
from tiny_training import TinyDenoiser, TinyModel
from torch import nn

from visiontune.core import Condition
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.models.pipeline import own_generator

FRAMES = 3


class Framewise(Rolled):
    """Clips whose frames know nothing of each other: what holds for pictures is known to hold for them."""

    def latent_shape(self, frames: int = FRAMES, height: int = 32, width: int = 32):
        return 2, frames, height // 8, width // 8

    def predict(self, x_t, t, cond):
        frames = x_t.shape[2]
        each = cond[torch.arange(len(cond)).repeat_interleave(frames)]
        found = super().predict(as_pictures(x_t), t.repeat_interleave(frames), each)
        return as_clips(found, frames)


def as_pictures(clips: torch.Tensor) -> torch.Tensor:
    """[b, c, f, ...] -> [b f, c, ...]"""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(pictures: torch.Tensor, frames: int = FRAMES) -> torch.Tensor:
    """The other way round."""
    return pictures.unflatten(0, (-1, frames)).transpose(1, 2)


class TinyVideoDenoiser(TinyDenoiser):
    """[b, 4, f, 8, 8] -> the same, of which a frame depends on those beside it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.first, self.last = nn.Conv3d(4, width, 3, padding=1), nn.Conv3d(width, 4, 3, padding=1)

    def _body(self, x, shift):
        return self.last(torch.tanh(self.first(x) + shift[:, :, None, None, None]))


class TinyVideo(TinyModel):
    """Latents [4, 3, 8, 8], clips of three frames of 16x16 pixels."""

    family = source = "tiny-video"

    def check_steps(self, steps: int) -> None:
        """It draws in any number."""

    def __init__(self, prediction: str = "eps", seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(prediction, seed, TinyVideoDenoiser())

    def latent_shape(self, height: int = 16, width: int = 16, frames: int = FRAMES):
        return 4, frames, height // 2, width // 2

    def decode(self, latents):
        """Pixels [b, 3, 3, 16, 16] in (-1, 1)."""
        return torch.tanh(F.interpolate(latents[:, :3] + 0.5 * latents[:, 3:], scale_factor=(1, 2, 2)))

    def moments(self, pixels):
        """Of clips [b, 3, f, h, w], or of pictures, which are clips of one frame."""
        clips = pixels if pixels.ndim == 5 else pixels[:, :, None]
        small = F.avg_pool3d(clips, (1, 2, 2))
        mean = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return torch.cat([mean, torch.full_like(mean, 0.1)], 1)

    def latents_from_moments(self, moments, eps=None):
        mean, std = moments.chunk(2, dim=1)
        return mean if eps is None else mean + std * eps

    def size(self, height=None, width=None):
        return height or 16, width or 16

    def draw(self, requests, *, steps, guidance, sampler="model", size=None) -> np.ndarray:
        with torch.no_grad():
            cond: Condition = self.embed([request.prompt for request in requests])
            begin = Start(generator=[own_generator(request) for request in requests])
            final = rollout(self, cond, guidance=guidance, chain=steps, start=begin).final
            return (self.decode(final) / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()
