"""LLaVA (Liu et al., 2023, arXiv 2304.08485): a language model that reads a vision tower through a projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.models.base import Presets
from visiontune.models.language import LanguageModel

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_VISION_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Llava(LanguageModel):
    """`LlavaForConditionalGeneration`, with Llama or another language model whose layers are named as Llama's."""

    family = "llava"
    architectures = ("LlavaForConditionalGeneration",)
    ROLES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "language": ("language_model",),
        "vision": ("vision_tower",),
        "projector": ("multi_modal_projector",),
    }
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "language": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            "all": ("Linear",),
        },
        "vision": {
            "attention": _VISION_ATTENTION,
            "attention+ff": (*_VISION_ATTENTION, "mlp.fc1", "mlp.fc2"),
            "all": ("Linear", "Conv2d"),
        },
        "projector": dict.fromkeys(("attention", "attention+ff", "all"), ("linear_1", "linear_2")),
    }
