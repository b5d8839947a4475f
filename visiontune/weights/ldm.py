"""What Stability's own code calls the layers of a Stable Diffusion UNet (1.x, 2.x, XL).

There every ResNet with its attention and every sampler is one entry of ``input_blocks``, ``middle_block`` or
``output_blocks``, numbered through the whole UNet, so the names follow from how many of each a model has.
"""

from __future__ import annotations

from typing import Any

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_names(unet: Any) -> dict[str, str]:
    """Name of each layer in diffusers -> its name in Stability's code; empty for a network of another kind."""
    if not hasattr(unet, "down_blocks") or not hasattr(unet, "up_blocks"):
        return {}
    modules = dict(unet.named_modules())
    names = {}
    for ours, theirs in {**_OUTSIDE, **_blocks(unet)}.items():
        if ours not in modules:
            continue
        for inner, _ in modules[ours].named_modules():
            renamed = _RESNET.get(inner) if ".resnets." in ours else inner
            if renamed is not None:
                names[f"{ours}.{inner}".rstrip(".")] = f"{theirs}.{renamed}".rstrip(".")
    return names


def _blocks(unet: Any) -> dict[str, str]:
    """The same for the ResNets, transformers and samplers as a whole."""
    names, entry = dict[str, str](), 1
    for b, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{entry}.0"
            names[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{entry}.1"
            entry += 1
        if getattr(block, "downsamplers", None):
            names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{entry}.0.op"
            entry += 1
    for j in range(len(getattr(unet.mid_block, "resnets", ()))):
        names[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
        names[f"mid_block.attentions.{j}"] = f"middle_block.{2 * j + 1}"
    entry = 0
    for b, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{entry}.0"
            names[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{entry}.1"
            entry += 1
        if getattr(block, "upsamplers", None):
            place = 2 if hasattr(block, "attentions") else 1
            names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{entry - 1}.{place}.conv"
    return names
