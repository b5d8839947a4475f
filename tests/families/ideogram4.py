"""An Ideogram 4 pipeline of two thin networks, whose Qwen3-VL is read after three of four layers, not 13 of 36."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4 import pipeline_ideogram4
from families.flux2 import autoencoder
from tiny import chat_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLModel

WIDTH = 8  # of the text encoder
READ = (0, 2, 3)
pipeline_ideogram4.QWEN3_VL_ACTIVATION_LAYERS = READ


def pipeline() -> Ideogram4Pipeline:
    words = chat_tokenizer()
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(),
        text_encoder=Qwen3VLModel(qwen3_vl_config(words)).eval(),
        tokenizer=words,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )


def transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=24,
        llm_features_dim=WIDTH * len(READ),
        mrope_section=(4, 2, 2),
    ).eval()


def qwen3_vl_config(words) -> Qwen3VLConfig:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 12,
        "num_hidden_layers": max(READ) + 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "max_position_embeddings": 4096,
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
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision)
