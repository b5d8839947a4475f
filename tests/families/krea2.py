"""A Krea 2 pipeline of two blocks behind a text fusion, which joins three of a Qwen3-VL's four layers."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from families.qwen_image import autoencoder
from tiny import SIZE, chat_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

from visiontune.models.krea2 import Krea2

VARIANTS = ({"distilled": True},)
WIDTH = 16  # of the text encoder

Krea2.resolution = SIZE


def pipeline(distilled: bool = False) -> Krea2Pipeline:
    words = chat_tokenizer()
    return Krea2Pipeline(
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=autoencoder(width=6),
        text_encoder=Qwen3VLModel(qwen3_vl_config(words)).eval(),
        tokenizer=words,
        text_encoder_select_layers=(1, 2, 3),
        is_distilled=distilled,
    )


def transformer() -> Krea2Transformer2DModel:
    made = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=20,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=40,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return made


def qwen3_vl_config(words) -> Qwen3VLConfig:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1]},
        "max_position_embeddings": 1024,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision)
