"""PixArt, which ComfyUI runs in its makers' code: q, k and v are one layer, and k and v of the prompt.

Kohya's scripts do not train it; `kohya` is in ComfyUI's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_SIZES = {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}


class Keys(_native.Keys):
    """Its makers' names for the transformer."""

    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        **{
            f"{own}.mlp.{i}": f"adaln_single.emb.{name}.linear_{i // 2 + 1}"
            for own, name in {"t_embedder": "timestep_embedder", **_SIZES}.items()
            for i in (0, 2)
        },
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {"blocks": ("transformer_blocks", _BLOCK)}
    ENCODERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("lora_te1", "lora_te")}
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "t5xxl"}
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format peft")}
