"""Chroma, whose blocks are FLUX.1's without modulations, which a network of its own makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native, flux


class Keys(flux.Keys):
    """Its only text encoder is the third of FLUX.1's names."""

    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("lora_te3", "lora_te1", "lora_te")}
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "t5xxl"}
    READERS: ClassVar[Mapping[str, Reader]] = {
        "sd-scripts": Reader(
            re.compile(rf"{flux.IN_BLOCKS}|transformer\.(x|context)_embedder|{_native.T5}"),
            "merge, or narrow adapter.targets",
        ),
        "ComfyUI": Reader(re.compile(r"transformer\."), "use --format diff"),
        "diffusers": Reader(re.compile(flux.IN_BLOCKS), "use --format diffusers"),
    }
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        "final_layer.linear": "proj_out",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        **flux.Keys.BLOCKS,
        "distilled_guidance_layer.layers": (
            "distilled_guidance_layer.layers",
            {"in_layer": "linear_1", "out_layer": "linear_2"},
        ),
    }
    SWAPPED = ()

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "chroma", "chroma"
