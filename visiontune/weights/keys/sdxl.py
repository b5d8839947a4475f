"""Stable Diffusion XL, which kohya's scripts train in Stability's own code; its two text encoders are numbered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import sd


class Keys(sd.Keys):
    """Stability's names for the UNet."""

    PREFIXES: ClassVar[dict[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

    def unet_names(self) -> Mapping[str, str]:
        return sd.ldm_names(self.modules["unet"])
