"""Qwen-Image, whose layers have diffusers' names in musubi-tuner and in ComfyUI."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Native, _native


class Keys(_native.Keys):
    """Diffusers' names; kohya's scripts train no text encoder."""

    NETWORK = "networks.lora_qwen_image"
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "qwen25_7b"}

    def described(self, prediction: str | None) -> tuple[str, str]:
        return "Qwen-Image", "qwen_image"

    @functools.cached_property
    def own(self) -> dict[str, Native]:
        return self.plain()
