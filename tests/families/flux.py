"""A FLUX.1 pipeline of a double and two single blocks, which carries guidance inside unless it is a `schnell`.

Kontext brings pictures to about a megapixel, and all of them prompts to 512 tokens, which is in their pipelines' code;
here pictures to some thousand times less, and prompts to 64 tokens.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from families.sd3 import WIDTH, t5_config, t5_tokenizer
from tiny import autoencoder, clip_config, set_default, tokenizer
from transformers import CLIPTextModel, T5EncoderModel

VARIANTS = ({"schnell": True}, {"edits": "kontext"}, {"edits": "fill"})
CLASSES = {None: FluxPipeline, "kontext": FluxKontextPipeline, "fill": FluxFillPipeline}
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(12, 20), (16, 16), (20, 12)]

for kind in CLASSES.values():
    set_default(kind.__call__, "max_sequence_length", 64)


def pipeline(schnell: bool = False, edits: str | None = None) -> Any:
    words, pieces = tokenizer(), t5_tokenizer()
    shifting = {"shift": 1.0} if schnell else {"use_dynamic_shifting": True, "shift": 3.0, "max_image_seq_len": 64}
    return CLASSES[edits](
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64 + (64 + 16) * (edits == "fill"),
            out_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=clip_config(words).hidden_size,
            guidance_embeds=not schnell,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(base_image_seq_len=4, **shifting),
        vae=autoencoder(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip_config(words)).eval(),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(t5_config(pieces)).eval(),
        tokenizer_2=pieces,
    )
