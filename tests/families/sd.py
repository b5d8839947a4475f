"""A Stable Diffusion pipeline, with a DDIM scheduler configured as that of SD 1.5."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny import autoencoder, clip_config, tokenizer
from transformers import CLIPTextModel

VARIANTS = ({"prediction_type": "v_prediction"}, {"edits": "inpaint"}, {"edits": "instruct"})
CLASSES = {
    None: StableDiffusionPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
    "instruct": StableDiffusionInstructPix2PixPipeline,
}
CHANNELS = {None: 4, "inpaint": 9, "instruct": 8}


def pipeline(prediction_type: str = "epsilon", edits: str | None = None) -> Any:
    words = tokenizer()
    return CLASSES[edits](
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(clip_config(words)).eval(),
        tokenizer=words,
        unet=unet(cross_attention_dim=32, in_channels=CHANNELS[edits]),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet(**options: Any) -> UNet2DConditionModel:
    """Two levels, of which the outer one attends to the text."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **options,
    ).eval()
