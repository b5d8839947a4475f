"""ERNIE-Image, whose layers have diffusers' names in ComfyUI. Kohya's scripts do not train it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Native, Reader, _native


class Keys(_native.Keys):
    """Diffusers' names."""

    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "ministral3_3b"}
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format diffusers")}

    @functools.cached_property
    def own(self) -> dict[str, Native]:
        return self.plain()
