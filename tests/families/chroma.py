"""A Chroma pipeline of a double and two single blocks, whose T5 reads 64 tokens where its code says 512."""

from __future__ import annotations

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from families.sd3 import WIDTH, t5_config, t5_tokenizer
from tiny import SIZE, autoencoder, set_default, small_default
from transformers import T5EncoderModel

VARIANTS = ({"dynamic": True},)

small_default(ChromaPipeline, SIZE)
set_default(ChromaPipeline.__call__, "max_sequence_length", 64)


def pipeline(dynamic: bool = False) -> ChromaPipeline:
    pieces = t5_tokenizer()
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=64,
            approximator_hidden_dim=24,
            approximator_layers=2,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **(shifting if dynamic else {})),
        vae=autoencoder(
            latent_channels=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=T5EncoderModel(t5_config(pieces)).eval(),
        tokenizer=pieces,
    )
