"""AuraFlow, which ComfyUI runs in its makers' code: other names, and shift before scale in front of the last layer.

Kohya's scripts do not train it; `kohya` is in ComfyUI's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from visiontune.weights.keys import Reader, _native

_DOUBLE = {
    **{f"attn.w2{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.w2o": "attn.to_out.0",
    **{f"attn.w1{x}": f"attn.add_{x}_proj" for x in "qkv"},
    "attn.w1o": "attn.to_add_out",
    "mlpX.c_fc1": "ff.linear_1",
    "mlpX.c_fc2": "ff.linear_2",
    "mlpX.c_proj": "ff.out_projection",
    "mlpC.c_fc1": "ff_context.linear_1",
    "mlpC.c_fc2": "ff_context.linear_2",
    "mlpC.c_proj": "ff_context.out_projection",
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
}
_SINGLE = {
    **{f"attn.w1{x}": f"attn.to_{x}" for x in "qkv"},
    "attn.w1o": "attn.to_out.0",
    "mlp.c_fc1": "ff.linear_1",
    "mlp.c_fc2": "ff.linear_2",
    "mlp.c_proj": "ff.out_projection",
    "modCX.1": "norm1.linear",
}


class Keys(_native.Keys):
    """Its makers' names for the transformer."""

    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "final_linear": "proj_out",
        "modF.1": "norm_out.linear",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "double_layers": ("joint_transformer_blocks", _DOUBLE),
        "single_layers": ("single_transformer_blocks", _SINGLE),
    }
    SWAPPED = ("modF.1",)
    COMFY: ClassVar[Mapping[str, str]] = {"text_encoder": "pile_t5xl"}
    READERS: ClassVar[Mapping[str, Reader]] = {"diffusers": Reader(_native.NOTHING, "use --format diffusers")}
