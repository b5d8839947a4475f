"""What families have in common that read prompts by a language model or by T5."""

from __future__ import annotations

from typing import Any

from visiontune.models.base import Presets

_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_T5_ATTENTION = tuple(f"SelfAttention.{name}" for name in "qkvo")
_DECODER_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Target presets of text encoders: CLIP and T5, and decoders such as Qwen, Gemma and Mistral.
CLIP_AND_T5: Presets = {
    "attention": (*_CLIP_ATTENTION, *_T5_ATTENTION),
    "attention+ff": (*_CLIP_ATTENTION, "mlp.fc1", "mlp.fc2", *_T5_ATTENTION, "wi", "wi_0", "wi_1", "wo"),
    "conv": (),
    "all": ("Linear",),
}
DECODER: Presets = {
    "attention": _DECODER_ATTENTION,
    "attention+ff": (*_DECODER_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "conv": (),
    "all": ("Linear",),
}


def chat_overhead(tokenizer: Any, **options: Any) -> int:
    """How many tokens a chat template puts around a prompt; `options` are those that the pipeline gives it."""
    empty = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True, **options)
    return len(tokenizer(text)["input_ids"])
