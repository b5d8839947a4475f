"""A Stable Diffusion 3.5 pipeline of two blocks, the first of them with the second attention of the medium model."""

from __future__ import annotations

import string

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import WORDS, autoencoder, clip_config, tokenizer
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

VARIANTS = ({"t5": False}, {"t5": False, "width": 64, "dynamic": True})
WIDTH = 72  # of T5, wider than the two CLIPs together, as the published one is


def pipeline(t5: bool = True, width: int = WIDTH, dynamic: bool = False) -> StableDiffusion3Pipeline:
    words, pieces = tokenizer(), t5_tokenizer()
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=width,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **(shifting if dynamic else {})),
        vae=autoencoder(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(clip_config(words)).eval(),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(words)).eval(),
        tokenizer_2=tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(pieces)).eval() if t5 else None,
        tokenizer_3=pieces if t5 else None,
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token for each of WORDS and for each printable character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in WORDS.split() if len(word) > 1] + [("▁", -2.0)]
    characters = [(character, -3.0) for character in string.printable.strip()]
    return T5Tokenizer(vocab=[*special, *pieces, *characters], extra_ids=0, model_max_length=512)


def t5_config(pieces: T5Tokenizer, kind: type = T5Config) -> T5Config:
    """Of a T5 of the first revision, whose feed-forward layers are gated, or of another kind of it."""
    return kind(
        vocab_size=len(pieces),
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=pieces.pad_token_id,
        eos_token_id=pieces.eos_token_id,
    )
