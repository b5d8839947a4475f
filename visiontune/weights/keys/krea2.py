"""Krea 2, which musubi-tuner and ComfyUI run in Krea's own code, where layers have other names and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}


class Keys(_native.Keys):
    """Krea's names for the transformer; kohya's scripts train no text encoder."""

    NETWORK = "networks.lora_krea2"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "blocks": ("transformer_blocks", _BLOCK),
        "txtfusion.layerwise_blocks": ("text_fusion.layerwise_blocks", _BLOCK),
        "txtfusion.refiner_blocks": ("text_fusion.refiner_blocks", _BLOCK),
    }
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "qwen3vl_4b"}
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format diffusers")}

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "Krea-2", "krea2"
