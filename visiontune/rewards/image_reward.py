"""ImageReward: BLIP reads image and prompt together, a linear head scores them.

Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", NeurIPS 2023. The
published checkpoint is loaded into transformers' BLIP:

| checkpoint | transformers |
|---|---|
| ``blip.visual_encoder.cls_token``, ``pos_embed`` | ``embeddings.class_embedding``, ``position_embedding`` |
| ``blip.visual_encoder.patch_embed.proj`` | ``embeddings.patch_embedding`` |
| ``blip.visual_encoder.blocks.<i>.norm<k>``, ``mlp`` | ``encoder.layers.<i>.layer_norm<k>``, ``mlp`` |
| ``blip.visual_encoder.blocks.<i>.attn.qkv``, ``proj`` | ``encoder.layers.<i>.self_attn.qkv``, ``projection`` |
| ``blip.visual_encoder.norm`` | ``post_layernorm`` |
| ``blip.text_encoder.*`` | the same names in ``BlipTextModel`` |
| ``mlp.layers.<i>`` | the head |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.models.clip import MEAN, STD
from visiontune.models.sources import find_file, load_exactly, read_tensors, weights_of
from visiontune.ops.pixels import Framing, Preprocess
from visiontune.rewards._heads import linear_head
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_log = logging.getLogger(__name__)
_FILE = "ImageReward.pt"
_TOKENS = 35
_HEAD_WIDTH = 64
# Mean and standard deviation of the raw score over the authors' data.
_CENTRE, _SPREAD = 0.16717363, 1.0333395
_RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of ImageReward."""

    model: str = option("THUDM/ImageReward", help=f"file {_FILE}, its folder, or a Hub id")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    tokenizer: str = option(
        "google-bert/bert-base-uncased", help="folder or Hub id of BERT's tokenizer; one beside the model wins"
    )


def build(config: Config) -> ImageReward:
    """The reward of a config; loads the weights."""
    from transformers import AutoTokenizer

    path = find_file(config.model, _FILE, config.revision)
    beside = (path.parent / "tokenizer_config.json").is_file()
    words = str(path.parent) if beside else config.tokenizer
    with weights_of(f"the tokenizer '{words}' of ImageReward", "transformers", words, option="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(words)
    vision, text, head = models(read_tensors(path), path)
    return ImageReward(vision, text, head, tokenizer)


class ImageReward(Reward):
    """-2.3 to 2 is usual, unbounded in principle. Differentiable; images may have any size, prompts 35 tokens."""

    name = "image_reward"
    differentiable: bool = True

    def __init__(self, vision: Any, text: Any, head: nn.Sequential, tokenizer: Any) -> None:
        size = vision.config.image_size
        framing = Framing(size=size, crop=size, rounds_half_crops=True)
        self.tokenizer = tokenizer
        self.model = nn.ModuleDict(
            {"preprocess": Preprocess(framing, MEAN, STD), "vision": vision, "text": text, "head": head}
        )
        self.model.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        model: Any = self.model.to(images.device)
        seen = model.vision(pixel_values=model.preprocess(images)).last_hidden_state
        words = self._tokens(list(prompts)).to(images.device)
        both = model.text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        return (model.head(both.last_hidden_state[:, 0]).squeeze(-1) - _CENTRE) / _SPREAD

    def _tokens(self, prompts: list[str]) -> Any:
        cut = sum(len(ids) > _TOKENS for ids in self.tokenizer(prompts)["input_ids"])
        if cut:
            _log.warning("%d of %d prompts exceed ImageReward's %d tokens and are cut", cut, len(prompts), _TOKENS)
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")


def models(tensors: dict[str, Tensor], path: Path) -> tuple[Any, Any, nn.Sequential]:
    """BLIP's image encoder, its text encoder and the head, with the weights of a checkpoint in its own names."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seen = {_rename(key): v for key, v in _below(tensors, "blip.visual_encoder.").items()}
    read = _below(tensors, "blip.text_encoder.")
    # Old checkpoints hold this buffer, which counts 0, 1, 2, ...
    read.pop("embeddings.position_ids", None)
    try:
        patches, width = seen["embeddings.position_embedding"].shape[1:]
        patch = seen["embeddings.patch_embedding.weight"].shape[-1]
        vocabulary, text_width = read["embeddings.word_embeddings.weight"].shape
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=len(seen["encoder.layers.0.mlp.fc1.bias"]),
                num_hidden_layers=_count(seen, r"encoder\.layers\.(\d+)\."),
                num_attention_heads=width // _HEAD_WIDTH,
                image_size=patch * round((patches - 1) ** 0.5),
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=len(read["encoder.layer.0.intermediate.dense.bias"]),
                num_hidden_layers=_count(read, r"encoder\.layer\.(\d+)\."),
                num_attention_heads=text_width // _HEAD_WIDTH,
                max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
                # With this, layers get the cross-attention that reads the image.
                is_decoder=True,
                bos_token_id=None,
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
    except KeyError as error:
        raise UserError(f"{path} is not ImageReward's checkpoint: {error.args[0]} is missing") from error
    load_exactly(vision, seen, path)
    load_exactly(text, read, path)
    return vision, text, linear_head(_below(tensors, "mlp."), path)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _rename(key: str) -> str:
    for pattern, name in _RENAMED:
        key, found = re.subn(pattern, name, key)
        if found:
            return key
    return key


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for key in tensors if (found := re.match(pattern, key)))
