"""Stable Diffusion 1.x and 2.x, which kohya's scripts train in diffusers' names; Stability's names of a UNet.

In Stability's code every ResNet with its attention and every sampler is one entry of ``input_blocks``,
``middle_block`` or ``output_blocks``, numbered through the whole UNet, so the names follow from how many of each a
model has. Files may use them for any of these models, XL included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from visiontune.errors import UserError
from visiontune.weights import keys
from visiontune.weights.keys import Native, Reader

# What files put in front of a component's layers, dots apart: kohya's scripts number encoders where there are two, and
# some tools always; others have diffusers' or ComfyUI's own prefixes before names of any kind.
_READ: tuple[dict[str, str], ...] = (
    {"unet": "lora_unet", "text_encoder": "lora_te"},
    {"unet": "oft_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    {"unet": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
    {"unet": "diffusion_model", "text_encoder": "text_encoders_clip_l_transformer"},
    {"unet": "model_diffusion_model", "text_encoder_2": "text_encoders_clip_g_transformer"},
)
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


class Keys(keys.Keys):
    """The names of diffusers, with a prefix and without dots."""

    ALPHA = 1.0  # one for all layers, whatever their ranks: diffusers mixes up several
    READERS: ClassVar[Mapping[str, Reader]] = {
        # It looks inside transformers, ResNets, samplers, and the attention and MLP of text encoders.
        "sd-scripts": Reader(
            re.compile(r"unet\..*\.(attentions|resnets|downsamplers|upsamplers)\.|text_encoder.*\.(self_attn|mlp)\."),
            "LyCORIS and diffusers read them; for sd-scripts merge, or narrow adapter.targets",
        )
    }
    PREFIXES: ClassVar[dict[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}

    @classmethod
    def in_blocks(cls) -> tuple[str, ...]:
        return (r"(?:down|up|input|output)_blocks[._]\d+[._]", r"(?:mid|middle)_block[._]")

    @property
    def encoders(self) -> Mapping[str, str]:
        """What ComfyUI calls the text encoders: by the width, Stable Diffusion 2 has another than 1."""
        config = getattr(self.modules.get("text_encoder"), "config", None)
        return {"text_encoder": "clip_h" if getattr(config, "hidden_size", None) == 1024 else "clip_l"}

    def described(self, prediction: str | None) -> tuple[str, str]:
        if self.encoders["text_encoder"] == "clip_l":
            return "stable-diffusion-v1", "sd_v1"
        return ("stable-diffusion-v2-768-v", "sd_v2_v") if prediction == "v" else ("stable-diffusion-v2-512", "sd_v2")

    def unet_names(self) -> Mapping[str, str]:
        """What kohya's scripts call layers of the UNet, where it is not diffusers' name."""
        return {}

    def kohya(self, layers: Iterable[str]) -> dict[str, Native]:
        return {name: Native((layer,)) for layer, name in self._kohya(layers).items()}

    def _kohya(self, layers: Iterable[str]) -> dict[str, str]:
        layers = list(layers)
        for layer in layers:
            if layer.partition(".")[0] not in self.PREFIXES:
                known = ", ".join(self.PREFIXES)
                raise UserError(f"'{layer}' belongs to no component that kohya's format knows ({known})")
        return self._flat(layers, self.PREFIXES, self.unet_names())

    def comfy(self, layers: Iterable[str]) -> dict[str, Native]:
        """Text encoders by keys of the state dict: of kohya's names ComfyUI has those of attention and MLP alone."""
        return {self._generic(layer) or name: Native((layer,)) for layer, name in self._kohya(layers).items()}

    def _generic(self, layer: str) -> str | None:
        component, _, rest = self.public(layer).partition(".")
        encoder = self.encoders.get(component)
        return encoder and f"text_encoders.{encoder}.transformer.{rest}"

    def names(self, layers: Iterable[str]) -> dict[str, str]:
        layers = list(layers)
        found, ldm = super().names(layers), ldm_names(self.modules.get("unet"))
        for prefixes in _READ:
            for unet in ({}, ldm):
                found |= {name: layer for layer, name in self._flat(layers, prefixes, unet).items()}
        return found | {name: layer for layer in layers if (name := self._generic(layer))}

    def _flat(self, layers: list[str], prefixes: Mapping[str, str], unet: Mapping[str, str]) -> dict[str, str]:
        """The layers whose component has a prefix, under it."""
        names = {}
        for layer in layers:
            component, _, rest = self.public(layer).partition(".")
            if component in prefixes:
                rest = unet.get(rest, rest) if component == "unet" else rest
                names[layer] = f"{prefixes[component]}_{rest.replace('.', '_')}"
        return names


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
