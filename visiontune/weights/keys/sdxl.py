"""Stable Diffusion XL, which kohya's scripts train in Stability's own code; its two text encoders are numbered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import sd


class Keys(sd.Keys):
    """Stability's names for the UNet."""

    PREFIXES: ClassVar[dict[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    @property
    def encoders(self) -> Mapping[str, str]:
        return {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"

    def unet_names(self) -> Mapping[str, str]:
        return sd.ldm_names(self.modules["unet"])
