"""A Lumina-Image 2.0 pipeline of two blocks behind one refiner of each kind, on a VAE of 8 pixels per latent."""

from __future__ import annotations

import string

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from tiny import WORDS, autoencoder
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

VARIANTS = ({"dynamic": True},)


def pipeline(dynamic: bool = False) -> Lumina2Pipeline:
    words = gemma_tokenizer()
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=16,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=4,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 40),
            cap_feat_dim=16,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0, **(shifting if dynamic else {})),
        # Its pipeline reckons with 8 pixels per latent, whatever the VAE.
        vae=autoencoder(
            (4, 4, 8, 8),
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=Gemma2Model(gemma2_config(words)).eval(),
        tokenizer=words,
    )


def gemma_tokenizer(more: str = "") -> GemmaTokenizer:
    """One token for each of WORDS, and of more words, after a space, and for each printable character."""
    merges, pieces = [], ["▁", *string.printable.strip()]
    for word in (*WORDS.split(), *more.split()):
        for end in range(len(word)):
            merges.append((f"▁{word[:end]}", word[end]))
            pieces.append(f"▁{word[: end + 1]}")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    return GemmaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), add_bos_token=True, model_max_length=1024)


def gemma2_config(words: GemmaTokenizer) -> Gemma2Config:
    """Of a Gemma 2, 16 wide."""
    return Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        vocab_size=len(words),
        max_position_embeddings=1024,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
