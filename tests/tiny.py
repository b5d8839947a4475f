"""Tiny random pipelines of the real diffusers classes, for tests.

Every call gives an independent copy of a pipeline that is built once per session from a fixed seed. Images are 16x16
pixels, latents [4, 8, 8], prompts at most 32 tokens.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UVit2DModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

WORDS = "a an of the in on photo picture circle square triangle red green blue small large left right above below"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-_()[]<>"
MAX_TOKENS = 32
SIZE = 16  # pixels per side


def tiny_sd(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline, with a DDIM scheduler configured as that of SD 1.5."""
    return _copy(_sd(prediction_type))


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline, with an Euler scheduler as the published one has."""
    return _copy(_sdxl())


def tiny_amused() -> AmusedPipeline:
    """An aMUSEd pipeline of 16 tokens; a picture is 4x4 of them."""
    return _copy(_amused())


def tiny_model(family: str = "sd", **options: Any) -> Any:
    """The DiffusionModel of a tiny pipeline: `tiny_model("sd", prediction_type="v_prediction")`."""
    from visiontune.models import families

    pipe = {"sd": tiny_sd, "sdxl": tiny_sdxl, "amused": tiny_amused}[family](**options)
    return families()[family](pipe, source=f"tiny-{family}")


def save_tiny_sd(folder: str | Path, prediction_type: str = "epsilon") -> Path:
    """Write `tiny_sd` in the diffusers layout, for whatever opens a model by its folder."""
    _sd(prediction_type).save_pretrained(folder)
    return Path(folder)


def save_tiny_llava(folder: str | Path, **changes: Any) -> Path:
    """Write a LLaVA with a Llama of two layers, whose pictures are four tokens, in transformers' layout."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<|endoftext|>"})
    mark = words.convert_tokens_to_ids("<image>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **ends, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=SIZE, patch_size=8, projection_dim=16),
        text_config={**text, "vocab_size": len(words)},
        image_token_index=mark,
        image_seq_length=4,
        **changes,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def remade(module: Any, **changes: Any) -> Any:
    """A module of the same class with some options of its config changed, randomly initialised from seed 0."""
    options = {key: value for key, value in module.config.items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(module)(**{**options, **changes}).eval()


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of each of WORDS and one of each character elsewhere."""
    merges, pieces = [], [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    for word in WORDS.split():
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
            pieces.append("".join(letters[: end + 1]))
    tokens = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=MAX_TOKENS)


def _copy(pipe: Any) -> Any:
    parts = {k: copy.deepcopy(v) if isinstance(v, torch.nn.Module) else v for k, v in pipe.components.items()}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    options = {"requires_safety_checker": False} if isinstance(pipe, StableDiffusionPipeline) else {}
    made = type(pipe)(**parts, **options)
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def _sd(prediction_type: str) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(words)).eval(),
            tokenizer=words,
            unet=_unet(cross_attention_dim=32),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@functools.cache
def _sdxl() -> StableDiffusionXLPipeline:
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(_text_config(words)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(words)).eval(),
            tokenizer=words,
            tokenizer_2=tokenizer(),
            unet=_unet(
                cross_attention_dim=64,
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


@functools.cache
def _amused() -> AmusedPipeline:
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(2)
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
                torch.nn.init.normal_(parameter, std=0.5)
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
            text_encoder=CLIPTextModelWithProjection(_text_config(words)).eval(),
            transformer=transformer,
            scheduler=AmusedScheduler(mask_token_id=17),
        )


def _text_config(words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=32,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _unet(**options: Any) -> UNet2DConditionModel:
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


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.18215,
    ).eval()
