"""What families have in common that read prompts by a language model or by T5."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.models.base import Presets

_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_T5_ATTENTION = tuple(f"SelfAttention.{name}" for name in "qkvo")
# Some decoders are part of a model that reads pictures too, whose tower no prompt passes through.
_DECODER = r"(?!.*(?:vision|visual)).*layers\.\d+\."
_DECODER_ATTENTION = (_DECODER + r"self_attn\.[qkvo]_proj",)
_DECODER_FF = (_DECODER + r"mlp\.(?:gate|up|down)_proj",)
# Target presets of text encoders: CLIP and T5, and decoders such as Qwen, Gemma and Mistral.
CLIP_AND_T5: Presets = {
    "attention": (*_CLIP_ATTENTION, *_T5_ATTENTION),
    "attention+ff": (*_CLIP_ATTENTION, "mlp.fc1", "mlp.fc2", *_T5_ATTENTION, "wi", "wi_0", "wi_1", "wo"),
    "conv": (),
    "all": ("Linear",),
}
DECODER: Presets = {
    "attention": _DECODER_ATTENTION,
    "attention+ff": (*_DECODER_ATTENTION, *_DECODER_FF),
    "conv": (),
    "all": (*_DECODER_ATTENTION, *_DECODER_FF),
}


def default_of(pipeline: type, option: str) -> Any:
    """What the call of a class of pipelines takes for an option of which nothing is said."""
    return inspect.signature(pipeline.__call__).parameters[option].default


def chat_overhead(tokenizer: Any, system: str | None = None, **options: Any) -> int:
    """How many tokens a chat template puts around a prompt.

    Args:
        system: what the pipeline says before it, and then has no opening of an answer after it.
        options: those that the pipeline gives the template.
    """
    said = {"user": ""} if system is None else {"system": system, "user": ""}
    talk = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    if system is None:
        talk = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=system is None, **options)
    plain = getattr(tokenizer, "tokenizer", tokenizer)
    return len(plain(text)["input_ids"])


def ragged(prompts: Iterable[Tensor]) -> Condition:
    """The Condition of prompts of any lengths, [n, d] each; its `mask` leaves out what the shorter ones lack."""
    return Condition.cat(
        [Condition(tokens=one[None], mask=one.new_ones(1, len(one), dtype=torch.bool)) for one in prompts]
    )
