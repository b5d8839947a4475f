"""A text-to-image checkpoint as one that paints into pictures, or edits them: its network gets the input channels that
this takes.

Their weights are zero, so that before any training it predicts what it predicted, whatever it is shown.
"""

from __future__ import annotations

from typing import Any, Literal

import diffusers
import torch
from torch import nn

from visiontune.errors import UserError

Purpose = Literal["paint", "edit"]


@torch.no_grad()
def expand_input(model: Any, purpose: Purpose = "paint") -> Any:
    """The same model as an inpainting one, or as one of InstructPix2Pix (Brooks et al., 2022, arXiv 2211.09800, section
    3.2), of the same networks but for the first layer of its UNet.

    Args:
        model: of Stable Diffusion or SDXL, as `visiontune.models.load` gives it; not to be used any more.
        purpose: what it is to do with pictures: `paint` where a mask is white, or `edit` them.

    Raises:
        UserError: it reads pictures already, it is told its guidance, or its family has no UNet.
    """
    if not hasattr(model, "PAINTING"):
        raise UserError(f"'{model.source}' ({model.family}) cannot be expanded: give a model of sd or sdxl")
    if model.reads.pictures:
        does = "paints into" if model.paints else "edits"
        raise UserError(f"'{model.source}' {does} pictures already: train it as it is")
    if purpose == "edit" and model.embedded:
        raise UserError(f"'{model.source}' is told its guidance, and pipelines that edit tell none: take its base")
    unet = model.pipe.unet
    unet.conv_in = _widened(unet.conv_in, 2 * model.latent_channels + (purpose == "paint"))
    unet.register_to_config(in_channels=unet.conv_in.in_channels)
    pipeline = getattr(diffusers, model.PAINTING if purpose == "paint" else model.EDITING)
    return type(model)(pipeline.from_pipe(model.pipe), model.source)


def _widened(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution that reads further channels, by weights of zero."""
    weight = layer.weight
    made = nn.Conv2d(channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, dtype=weight.dtype)  # type: ignore[arg-type]
    made.to(weight.device).weight.zero_()
    made.weight[:, : layer.in_channels] = weight
    assert layer.bias is not None and made.bias is not None
    made.bias.copy_(layer.bias)
    return made
