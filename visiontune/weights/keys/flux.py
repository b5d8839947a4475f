"""FLUX.1, which kohya's scripts and ComfyUI run in Black Forest Labs' own code.

Each stream of a double block has one layer for queries, keys and values, and a single block has one for these and the
first of its feed-forward. Before the last layer it has shift before scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
IN_BLOCKS = r"transformer\.(single_)?transformer_blocks\."


class Keys(_native.Keys):
    """Black Forest Labs' names for the transformer; T5 is the third text encoder, of which FLUX.1 has no second."""

    NETWORK = "networks.lora_flux"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "double_blocks": ("transformer_blocks", _DOUBLE),
        "single_blocks": ("single_transformer_blocks", _SINGLE),
    }
    SWAPPED: ClassVar[tuple[str, ...]] = ("final_layer.adaLN_modulation.1",)
    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": ("lora_te1", "lora_te"),
        "text_encoder_2": ("lora_te3", "lora_te2"),
    }
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
    READERS: ClassVar[Mapping[str, Reader]] = {
        "sd-scripts": Reader(
            re.compile(rf"{IN_BLOCKS}|transformer\.(x|context|time_text)_embed|{_native.CLIP}|{_native.T5}"),
            "merge, or narrow adapter.targets",
        ),
        "diffusers": Reader(re.compile(rf"{IN_BLOCKS}|text_encoder\..*\.(self_attn|mlp)\."), "use --format diffusers"),
    }

    def described(self, prediction: str | None) -> tuple[str, str]:
        told = getattr(getattr(self.modules.get("transformer"), "config", None), "guidance_embeds", True)
        return f"flux-1-{'dev' if told else 'schnell'}", "flux1"
