"""Z-Image, which ComfyUI runs in its own code and musubi-tuner in diffusers' names.

The own code has one layer for queries, keys and values; ComfyUI knows diffusers' names of layers too, though not with
what kohya's files put before them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Native, Reader, _native

_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
    "adaLN_modulation.0": "adaLN_modulation.0",
}


class Keys(_native.Keys):
    """ComfyUI's names in `diff`, diffusers' in `kohya`."""

    NETWORK = "networks.lora_zimage"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "x_embedder": "all_x_embedder.2-1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        "cap_embedder.1": "cap_embedder.1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        name: (name, _BLOCK) for name in ("layers", "noise_refiner", "context_refiner")
    }
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "qwen3_4b"}
    READERS: ClassVar[Mapping[str, Reader]] = {
        "ComfyUI": Reader(
            re.compile(r"transformer\..*(feed_forward\.|adaLN_modulation\.0|t_embedder\.|cap_embedder\.)"),
            "use --format diffusers",
        )
    }

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "Z-Image", "z_image"

    @functools.cached_property
    def scripts(self) -> dict[str, Native]:
        return self.plain()
