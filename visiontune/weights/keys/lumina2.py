"""Lumina-Image 2.0, which kohya's scripts and ComfyUI run in Alpha-VLLM's own code: q, k and v are one layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_BLOCK = {
    "attention.qkv": "attn.to_q attn.to_k attn.to_v",
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}


class Keys(_native.Keys):
    """Alpha-VLLM's names for the transformer."""

    NETWORK = "networks.lora_lumina"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "x_embedder": "x_embedder",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        name: (name, _BLOCK) for name in ("layers", "noise_refiner", "context_refiner")
    }
    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("lora_te",)}
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "gemma2_2b"}
    READERS: ClassVar[Mapping[str, Reader]] = {
        "sd-scripts": Reader(re.compile(rf"transformer\.|{_native.CLIP}"), "merge, or narrow adapter.targets"),
        "diffusers": Reader(_native.NOTHING, "use --format diffusers"),
    }

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "lumina-2", "lumina2"
