"""A HiDream pipeline of a double and a single block, whose patches see two of three experts."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from families.sd3 import WIDTH, t5_config, t5_tokenizer
from tiny import autoencoder, chat_tokenizer, clip_config, small_default, tokenizer
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM, T5EncoderModel

# Pictures are of 400 pixels at most: 16x16, and 16x24 in both directions.
small_default(HiDreamImagePipeline, 20)


def pipeline() -> HiDreamImagePipeline:
    words, pieces, chat = tokenizer(), t5_tokenizer(), chat_tokenizer()
    return HiDreamImagePipeline(
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=6,
            num_attention_heads=2,
            caption_channels=[WIDTH, 16],
            text_emb_dim=64,
            num_routed_experts=3,
            num_activated_experts=2,
            axes_dims_rope=(2, 2, 2),
            max_resolution=(5, 5),
            llama_layers=(1, 0),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(
            (8, 16, 16),
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip(words),
        tokenizer=words,
        text_encoder_2=clip(words),
        tokenizer_2=tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(pieces)).eval(),
        tokenizer_3=pieces,
        text_encoder_4=LlamaForCausalLM(llama_config(chat)).eval(),
        tokenizer_4=chat,
    )


def clip(words) -> CLIPTextModelWithProjection:
    """One that reads longer prompts than others do."""
    config = clip_config(words)
    config.max_position_embeddings = 128
    return CLIPTextModelWithProjection(config).eval()


def llama_config(words) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(words),
        max_position_embeddings=256,
        pad_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
