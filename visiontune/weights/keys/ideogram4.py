"""Ideogram 4, which musubi-tuner and ComfyUI run in its makers' code: q, k and v are one layer.

Its second network, which sees no words, has no names there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.o": "attention.to_out.0",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
    "adaln_modulation": "adaln_modulation",
}
_SAME = (
    "input_proj",
    "llm_cond_proj",
    "t_embedding.mlp_in",
    "t_embedding.mlp_out",
    "adaln_proj",
    "final_layer.linear",
    "final_layer.adaln_modulation",
)


class Keys(_native.Keys):
    """Its makers' names for the transformer; kohya's scripts train no text encoder."""

    NETWORK = "networks.lora_ideogram4"
    OUTSIDE: ClassVar[Mapping[str, str]] = {name: name for name in _SAME}
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {"layers": ("layers", _BLOCK)}
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "qwen3vl_8b"}
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format diffusers")}

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "Ideogram-4", "ideogram4"
