"""HiDream-I1, whose layers have diffusers' names in ComfyUI. Kohya's scripts do not train it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Native, Reader, _native


class Keys(_native.Keys):
    """Diffusers' names; of the four text encoders the Llama has none in kohya's files."""

    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": ("lora_te1",),
        "text_encoder_2": ("lora_te2",),
        "text_encoder_3": ("lora_te3",),
    }
    COMFY: ClassVar[Mapping[str, str]] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        "text_encoder_3": "t5xxl",
        "text_encoder_4": "llama",
    }
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format diffusers")}

    @functools.cached_property
    def own(self) -> dict[str, Native]:
        return self.plain()
