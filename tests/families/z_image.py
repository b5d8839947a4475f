"""A Z-Image pipeline of two blocks behind one refiner of each kind."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import autoencoder, chat_tokenizer
from transformers import Qwen3Config, Qwen3Model

VARIANTS = ({"dynamic": True},)


def pipeline(dynamic: bool = False, turbo: bool = False) -> ZImagePipeline:
    words = chat_tokenizer()
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[640, 32, 32],
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0, **(shifting if dynamic else {})),
        vae=autoencoder(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Qwen3Model(qwen3_config(words)).eval(),
        tokenizer=words,
    )


def qwen3_config(words, layers: int = 2) -> Qwen3Config:
    """Of a Qwen3, 16 wide."""
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=len(words),
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
