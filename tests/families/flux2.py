"""A FLUX.2 klein of a double and two single blocks, and a dev, whose Mistral has as many layers as are read.

Their pipelines show pictures of 64 pixels a side or more, and read layers up to the 27th and the 30th, which is in
their code; here pictures of 16, and layers up to the third and the fourth.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from families.z_image import qwen3_config
from tiny import SIZE, chat_tokenizer, set_default
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

VARIANTS = ({"dev": True}, {"distilled": True})
Flux2ImageProcessor.check_image_input = staticmethod(
    functools.partial(Flux2ImageProcessor.check_image_input, min_side_length=SIZE)
)
READ = {Flux2Pipeline: (1, 2, 4), Flux2KleinPipeline: (1, 2, 3)}
for kind, layers in READ.items():
    for function in (kind.__call__, kind.encode_prompt):
        set_default(function, "text_encoder_out_layers", layers)


def pipeline(dev: bool = False, distilled: bool = False) -> Flux2Pipeline | Flux2KleinPipeline:
    words = chat_tokenizer()
    parts: dict[str, Any] = {
        "transformer": Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=dev,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": autoencoder(),
        "tokenizer": words,
    }
    if dev:
        encoder = Mistral3ForConditionalGeneration(mistral_config(words, layers_of(Flux2Pipeline))).eval()
        return Flux2Pipeline(**parts, text_encoder=encoder)
    encoder = Qwen3ForCausalLM(qwen3_config(words, layers_of(Flux2KleinPipeline))).eval()
    return Flux2KleinPipeline(**parts, text_encoder=encoder, is_distilled=distilled)


def autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).eval()
    vae.bn.running_mean.copy_(torch.randn(16) * 0.2)
    vae.bn.running_var.copy_(torch.rand(16) + 0.5)
    return vae


def layers_of(kind: type) -> int:
    """Those of a text encoder: what is read is what comes before one of them."""
    return READ[kind][-1] + 1


def mistral_config(words, layers: int) -> Mistral3Config:
    text = {
        "model_type": "mistral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": len(words),
        "max_position_embeddings": 1024,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "image_size": 30,
        "patch_size": 6,
        "num_channels": 3,
    }
    return Mistral3Config(text_config=text, vision_config=vision, vision_feature_layer=-1, image_token_index=8)
