"""A PixArt-sigma pipeline of two blocks; as alpha it is told sizes, which its pipeline does at 128 latents alone."""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from families.sd3 import WIDTH, t5_config, t5_tokenizer
from tiny import autoencoder
from transformers import T5EncoderModel

VARIANTS = ({"alpha": True},)


def pipeline(alpha: bool = False) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    pieces = t5_tokenizer()
    kind = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    return kind(
        transformer=PixArtTransformer2DModel(
            sample_size=128 if alpha else 8,
            patch_size=8 if alpha else 2,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=3,
            cross_attention_dim=24,
            caption_channels=WIDTH,
        ).eval(),
        scheduler=DPMSolverMultistepScheduler(),
        # A picture of alpha has too many latents for attention in the VAE.
        vae=autoencoder(scaling_factor=0.13025, mid_block_add_attention=not alpha),
        text_encoder=T5EncoderModel(t5_config(pieces)).eval(),
        tokenizer=pieces,
    )
