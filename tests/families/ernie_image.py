"""An ERNIE-Image pipeline of three blocks."""

from __future__ import annotations

from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from families.flux2 import autoencoder, mistral_config
from tiny import chat_tokenizer
from torch import nn
from transformers import Mistral3Model


def pipeline() -> ErnieImagePipeline:
    words = chat_tokenizer()
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    for layer in (transformer.adaLN_modulation[-1], transformer.final_linear):
        nn.init.normal_(layer.weight, std=0.2)
    return ErnieImagePipeline(
        transformer=transformer,
        vae=autoencoder(),
        text_encoder=Mistral3Model(mistral_config(words, layers=3)).eval(),
        tokenizer=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
