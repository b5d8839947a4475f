"""A Stable Diffusion XL pipeline, with an Euler scheduler as the published one has."""

from __future__ import annotations

from typing import Any

from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from families.sd import CHANNELS, unet
from tiny import autoencoder, clip_config, tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

VARIANTS = ({"edits": "inpaint"}, {"edits": "instruct"})
CLASSES = {
    None: StableDiffusionXLPipeline,
    "inpaint": StableDiffusionXLInpaintPipeline,
    "instruct": StableDiffusionXLInstructPix2PixPipeline,
}


def pipeline(edits: str | None = None) -> Any:
    words = tokenizer()
    return CLASSES[edits](
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(clip_config(words)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words)).eval(),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet(
            cross_attention_dim=64,
            in_channels=CHANNELS[edits],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
