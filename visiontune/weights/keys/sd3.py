"""Stable Diffusion 3 and 3.5, which kohya's scripts and ComfyUI run in Stability's own code.

Its joint blocks have a half for the picture and one for the prompt; each has one layer for queries, keys and values.
Where diffusers has scale before shift, before the last layer and for the prompt in the last block, it has the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_BLOCK = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}


class Keys(_native.Keys):
    """Stability's names for the transformer; the text encoders are numbered."""

    NETWORK = "networks.lora_sd3"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {"joint_blocks": ("transformer_blocks", _BLOCK)}
    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": ("lora_te1", "lora_te"),
        "text_encoder_2": ("lora_te2",),
        "text_encoder_3": ("lora_te3",),
    }
    COMFY: ClassVar[Mapping[str, str]] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        "text_encoder_3": "t5xxl",
    }
    READERS: ClassVar[Mapping[str, Reader]] = {
        "sd-scripts": Reader(
            re.compile(rf"transformer\.|{_native.CLIP}|{_native.T5}"), "merge, or narrow adapter.targets"
        ),
        "diffusers": Reader(_native.NOTHING, "use --format diffusers"),
    }

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "stable-diffusion-3", "sd3"

    def swapped(self) -> tuple[str, ...]:
        last = self.blocks("transformer_blocks") - 1
        return "final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"
