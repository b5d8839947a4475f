"""An aMUSEd pipeline of 16 tokens; a picture is 4x4 of them."""

from __future__ import annotations

from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from tiny import SIZE, clip_config, tokenizer
from torch import nn
from transformers import CLIPTextModelWithProjection

SEED = 2  # of the weights: with 0, what the transformer says of tokens hardly moves a reward


def pipeline() -> AmusedPipeline:
    words = tokenizer()
    transformer = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=32,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=5 * 4,
        encoder_hidden_size=32,
        vocab_size=18,
        codebook_size=16,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=4,
    ).eval()
    # As they are made, blocks leave no trace of what goes round them.
    for name, parameter in transformer.named_parameters():
        if name.endswith((".gamma", ".beta")):
            nn.init.normal_(parameter, std=0.5)
    return AmusedPipeline(
        vqvae=VQModel(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            num_vq_embeddings=16,
            norm_num_groups=4,
            sample_size=SIZE,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        ).eval(),
        tokenizer=words,
        text_encoder=CLIPTextModelWithProjection(clip_config(words)).eval(),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=17),
    )
