"""What families have in common that denoise patches of the latents of FLUX.2's VAE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visiontune.models.base import require
from visiontune.models.diffusion import DiffusionModel

_PATCH = 2


class PatchModel(DiffusionModel):
    """A family whose latents are patches of 2 x 2 of the VAE's, [b, 4 c, h / 2, w / 2].

    Each of their channels is brought to mean 0 and deviation 1 by the statistics that the VAE (`AutoencoderKLFlux2`)
    keeps of it. The order of the channels within a patch is the family's own: it is that of the statistics.
    """

    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        # Pipelines differ in whether their scale factor counts the patches.
        self.downsample = _PATCH * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.unit = max(self.unit, self.downsample)
        self.latent_channels *= _PATCH**2
        self.resolution = int(self.vae.config.sample_size)
        channels = self.denoiser.config.in_channels
        require(channels == self.latent_channels, self.source, f"its transformer takes {channels} channels")

    def to_latents(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (self._patched(z) - mean) / std

    def from_latents(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return self._unpatched(latents * std + mean)

    def _patched(self, z: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, 4 c, h / 2, w / 2]."""
        return self.pipe._patchify_latents(z)

    def _unpatched(self, patches: Tensor) -> Tensor:
        """`_patched` undone."""
        return self.pipe._unpatchify_latents(patches)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every channel of the patches, [1, c, 1, 1]."""
        norm = self.vae.bn
        std = (norm.running_var + self._least_variance()).sqrt()
        return norm.running_mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)

    def _least_variance(self) -> float:
        """What is added to the variance before its root is taken."""
        return float(self.vae.config.batch_norm_eps)
