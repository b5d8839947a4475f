"""A text-to-image checkpoint as one that paints into pictures: its network gets the input channels that this takes.

Their weights are zero, so that before any training it predicts what it predicted, whatever it is shown.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from visiontune.errors import UserError


@torch.no_grad()
def expand_input(model: Any) -> Any:
    """The same model as an inpainting one, of the same networks but for the first layer of its UNet.

    Args:
        model: of Stable Diffusion or SDXL, as `visiontune.models.load` gives it; not to be used any more.

    Raises:
        UserError: it paints already, or its family has no UNet.
    """
    painting = getattr(model, "PAINTING", None)
    if painting is None:
        raise UserError(f"'{model.source}' ({model.family}) cannot be expanded: give a model of sd or sdxl")
    if model.paints:
        raise UserError(f"'{model.source}' paints into pictures already: train it as it is")
    unet = model.pipe.unet
    unet.conv_in = _widened(unet.conv_in, 2 * model.latent_channels + 1)
    unet.register_to_config(in_channels=unet.conv_in.in_channels)
    return type(model)(getattr(diffusers, painting[0]).from_pipe(model.pipe), model.source)


def _widened(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution that reads further channels, by weights of zero."""
    weight = layer.weight
    made = nn.Conv2d(channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, dtype=weight.dtype)  # type: ignore[arg-type]
    made.to(weight.device).weight.zero_()
    made.weight[:, : layer.in_channels] = weight
    assert layer.bias is not None and made.bias is not None
    made.bias.copy_(layer.bias)
    return made
