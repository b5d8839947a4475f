"""Nets that control a tiny UNet of two levels, whose zero convolutions do something."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter


def controlnet(unet: Any, seed: int) -> ControlNetModel:
    """A ControlNet of a UNet, of two pixels a latent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 16), load_weights_from_unet=False
        ).eval()
        for name, parameter in made.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def adapter(seed: int, channels: tuple[int, ...] = (16, 32), downscale: int = 2, inputs: int = 3) -> T2IAdapter:
    """A T2I-Adapter for the tiny UNets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = T2IAdapter(in_channels=inputs, channels=list(channels), num_res_blocks=1, downscale_factor=downscale)
    return made.eval().requires_grad_(False)
