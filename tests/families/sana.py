"""A Sana pipeline of two blocks, as that of 1.5 with normalised queries and keys, on an autoencoder of three levels."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from families.lumina2 import gemma2_config, gemma_tokenizer
from transformers import Gemma2Model

from visiontune.models._text import default_of

VARIANTS = ({"qk_norm": "rms_norm_across_heads", "interpolation_scale": 2},)


def pipeline(**options: Any) -> SanaPipeline:
    words = gemma_tokenizer(" ".join(default_of(SanaPipeline, "complex_human_instruction")))
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            **options,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=autoencoder(),
        text_encoder=Gemma2Model(gemma2_config(words)).eval(),
        tokenizer=words,
    )


def autoencoder() -> AutoencoderDC:
    """4 pixels per latent along a side; the inner level is one of linear attention."""
    widths, layers = (4, 8, 8), (1, 1, 1)
    blocks, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), ((), (), (5,))
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    ).eval()
