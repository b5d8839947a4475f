"""A file of another family is told by the names of its layers."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from visiontune.weights.keys import keys_of
from visiontune.weights.keys._likely import likely
from visiontune.weights.keys._native import Keys as Native


@pytest.mark.parametrize(
    ("name", "families"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", ["sd", "sdxl"]),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", ["sd", "sdxl"]),
        ("diffusion_model.joint_blocks.3.context_block.attn.qkv.lora_A.weight", ["sd3"]),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", ["chroma", "flux", "flux2"]),
        ("transformer.single_transformer_blocks.7.proj_mlp.lora_A.weight", ["chroma", "flux"]),
        ("transformer.layers.3.attention.to_q.lora_A.weight", ["ideogram4", "z_image"]),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", []),
        ("something.else.weight", []),
    ],
)
def test_the_families_that_have_such_blocks(name, families):
    assert likely([name]) == families


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "flux2", "z_image", "krea2", "chroma", "pixart"])
def test_a_file_of_a_family_is_of_it(family):
    model = tiny_model(family)
    keys = keys_of(family, model.networks())
    layers = [f"transformer.{name}" for name, _ in model.denoiser.named_modules()]
    assert family in likely(layers)
    if isinstance(keys, Native):
        assert family in likely(f"diffusion_model.{name}" for name in keys.own)
