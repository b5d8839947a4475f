"""A Qwen-Image pipeline of two blocks, on a VAE of clips, and those that edit, the second as of 2511.

They bring pictures to about a megapixel, which is in their code; here to some hundred times less.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tiny import SIZE, chat_tokenizer, small_default
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

VARIANTS = ({"edits": "one"}, {"edits": "several"})
CLASSES = {None: QwenImagePipeline, "one": QwenImageEditPipeline, "several": QwenImageEditPlusPipeline}
# Marks of pictures, as processor and text encoder call them.
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
AREA = 48 * 48
for made in CLASSES.values():
    small_default(made, SIZE)
pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = AREA
_dimensions = pipeline_qwenimage_edit_plus.calculate_dimensions
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (*_dimensions(area * AREA / 2**20, ratio), None)


def pipeline(edits: str | None = None) -> Any:
    words = chat_tokenizer()
    more = {"processor": processor(words)} if edits else {}
    return CLASSES[edits](
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            zero_cond_t=edits == "several",
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, shift_terminal=0.02
        ),
        vae=autoencoder(8 if edits else 24),
        text_encoder=Qwen2_5_VLForConditionalGeneration(qwen_vl_config(words)).eval(),
        tokenizer=words,
        **more,
    )


def processor(words: Any) -> Qwen2VLProcessor:
    """Of pictures and words, to which it adds the marks of pictures; a picture is at most four tokens."""
    words.add_special_tokens({"additional_special_tokens": [*MARKS.values()]})
    for name, mark in MARKS.items():
        setattr(words, name, mark)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(mark))
    sides = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sides),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**sides),
        chat_template=words.chat_template,
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
    marks = {
        f"{name}_id": words.convert_tokens_to_ids(mark) for name, mark in MARKS.items() if mark in words.get_vocab()
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
