"""A Qwen-Image pipeline of two blocks, on a VAE of clips."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny import SIZE, chat_tokenizer, small_default
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

small_default(QwenImagePipeline, SIZE)


def pipeline() -> QwenImagePipeline:
    words = chat_tokenizer()
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, shift_terminal=0.02
        ),
        vae=autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(qwen_vl_config(words)).eval(),
        tokenizer=words,
    )


def autoencoder(width: int = 24) -> AutoencoderKLQwenImage:
    """A VAE of clips of two levels: 2 pixels per latent along a side."""
    return AutoencoderKLQwenImage(
        base_dim=width,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    ).eval()


def qwen_vl_config(words) -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(words),
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)
