"""FLUX.2, which musubi-tuner and ComfyUI run in Black Forest Labs' own code.

Each stream of a double block has one layer for queries, keys and values; single blocks are in diffusers as they are
there. Before the last layer it has shift before scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from visiontune.weights.keys import Reader, _native, flux

_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
# klein by the width of its transformer and of its Qwen3.
_SIZES = {3072: "4b", 4096: "9b"}
_READERS = {2560: "qwen3_4b", 4096: "qwen3_8b"}


class Keys(_native.Keys):
    """Black Forest Labs' names for the transformer; kohya's scripts train no text encoder."""

    NETWORK = "networks.lora_flux_2"
    OUTSIDE: ClassVar[Mapping[str, str]] = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    BLOCKS: ClassVar[Mapping[str, tuple[str, Mapping[str, str]]]] = {
        "double_blocks": ("transformer_blocks", _DOUBLE),
        "single_blocks": ("single_transformer_blocks", _SINGLE),
    }
    SWAPPED = ("final_layer.adaLN_modulation.1",)
    READERS: ClassVar[Mapping[str, Reader]] = {
        "diffusers": Reader(
            re.compile(rf"{flux.IN_BLOCKS}|.*_embedder$|.*\.timestep_embedder\.|transformer\.proj_out"),
            "use --format diffusers",
        ),
    }

    def described(self, prediction: str | None) -> tuple[str, str]:
        config = self._config("transformer")
        if config.get("guidance_embeds", True):
            return "Flux.2-dev", "flux_2_dev"
        size = _SIZES.get(config["num_attention_heads"] * config["attention_head_dim"])
        return ("Flux.2-klein", "flux_2_klein") if size is None else (f"Flux.2-klein-{size}", f"flux_2_klein_{size}")

    def comfys_encoders(self) -> Mapping[str, str]:
        if self._config("transformer").get("guidance_embeds", True):
            return {"text_encoder": "mistral3_24b"}
        return {"text_encoder": _READERS.get(getattr(self._config("text_encoder"), "hidden_size", 0), "qwen3_4b")}

    def _config(self, component: str) -> Any:
        return getattr(self.modules.get(component), "config", {})
