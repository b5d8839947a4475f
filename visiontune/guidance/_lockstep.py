"""ControlNets run block by block beside each other, with their streams merged between the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance._controls import Features
from visiontune.guidance._merging import Rule


def check_nets(nets: Iterable[Any], full: bool) -> None:
    """Refuse ControlNets that cannot be merged: UserError."""
    for net in nets:
        if net.config.global_pool_conditions:
            raise UserError(
                "maxfusion: a ControlNet that averages its features over the picture has no places to merge"
            )
        plain = net.class_embedding is None and net.config.controlnet_conditioning_channel_order == "rgb"
        if full and not plain:
            raise UserError("maxfusion: a ControlNet of classes, or of BGR, cannot go in step: set merge to final")
    if full and len({(len(net.down_blocks), net.mid_block is None) for net in nets}) > 1:
        raise UserError("maxfusion: the ControlNets have other blocks than each other: set merge to final")


def lockstep(
    nets: Sequence[Any], arguments: Mapping[str, Any], shown: Sequence[Tensor], rule: Rule, on: Tensor
) -> list[Features]:
    """What ControlNets give whose streams are merged between their blocks.

    Args:
        shown: the picture of each, [1 or b, c, h, w] in [0, 1]. on: [k, b], which nets are there for a row.
    """
    x, words = arguments["sample"], arguments["encoder_hidden_states"]

    def merged(streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return rule.inner(torch.stack([*streams]), on).unbind()

    times = [_time(net, arguments) for net in nets]
    streams = merged([net.conv_in(x) + net.controlnet_cond_embedding(s) for net, s in zip(nets, shown, strict=True)])
    layers = [streams]
    for blocks in zip(*(net.down_blocks for net in nets), strict=True):
        found = [_called(*one, words)[1] for one in zip(blocks, streams, times, strict=True)]
        layers += map(merged, zip(*found, strict=True))
        # A block's last residual is what it hands on.
        streams = layers[-1]
    middles = [net.mid_block for net in nets]
    if middles[0] is not None:
        streams = merged([_called(*one, words) for one in zip(middles, streams, times, strict=True)])
    return [
        (*(conv(layer[i]) for conv, layer in zip(net.controlnet_down_blocks, layers, strict=True)),
         net.controlnet_mid_block(streams[i]))
        for i, net in enumerate(nets)
    ]  # fmt: skip


def _called(block: Any, x: Tensor, time: Tensor, words: Tensor) -> Any:
    crossed = {"encoder_hidden_states": words} if getattr(block, "has_cross_attention", False) else {}
    return block(x, time, **crossed)


def _time(net: Any, arguments: Mapping[str, Any]) -> Tensor:
    """The embedding of a call's time, and of what else an SDXL is told; ControlNets have the layers of their UNet."""
    unet: Any = UNet2DConditionModel
    told: Tensor = net.time_embedding(unet.get_time_embed(net, arguments["sample"], arguments["timestep"]))
    more = unet.get_aug_embed(net, told, arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs"))
    return told if more is None else told + more
