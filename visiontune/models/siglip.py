"""SigLIP (Zhai et al., 2023, arXiv 2303.15343), and SigLIP 2 (Tschannen et al., 2025, arXiv 2502.14786) of one size.

Two traps of its texts: they are padded to the full length, and padding is read like words, so that a shorter row or a
mask gives other features; and pictures are squashed to a square, not cropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from visiontune.models.base import dtype_of
from visiontune.models.clip import Clip, TransformersClip
from visiontune.models.contrastive import Features
from visiontune.models.sources import pretrained
from visiontune.ops.pixels import Framing, Preprocess

_HALF = (0.5, 0.5, 0.5)
_BILINEAR = 2  # of PIL


class SiglipEncoder(TransformersClip):
    """A ``SiglipModel`` folder or Hub id with its tokenizer."""

    def patches(self, images: Tensor) -> Features:
        found = self.model.get_image_features(pixel_values=self.preprocess(images).to(dtype_of(self.model)))
        return Features(pooled=found.pooler_output, dense=self._alone(found.last_hidden_state))

    def words(self, prompts: Sequence[str]) -> Features:
        tokens, found = self._read(list(prompts))
        dense = self.model.text_model.head(found.last_hidden_state)
        mask = tokens["input_ids"] != self.tokenizer.pad_token_id
        return Features(pooled=found.pooler_output, dense=dense, mask=mask)

    def save(self, folder: Path) -> None:
        from transformers import SiglipImageProcessor

        side, preprocess = self.preprocess.framing.crop, self.preprocess
        mean, std = preprocess.mean.flatten().tolist(), preprocess.std.flatten().tolist()
        resample: dict[str, Any] = {"resample": _BILINEAR} if preprocess.framing.filter == "bilinear" else {}
        shown = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=mean, image_std=std, **resample)
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        shown.save_pretrained(folder)

    def _alone(self, states: Tensor) -> Tensor:
        """What the pooling head would give of each patch if it were the only one: attention passes its value on."""
        head = self.model.vision_model.head
        width = states.shape[-1]
        weight, bias = head.attention.in_proj_weight[2 * width :], head.attention.in_proj_bias[2 * width :]
        passed = head.attention.out_proj(torch.nn.functional.linear(states, weight, bias))
        return passed + head.mlp(head.layernorm(passed))

    def _read(self, prompts: list[str]) -> tuple[Any, Any]:
        padded = {"padding": "max_length", "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(prompts, return_tensors="pt", **padded).to(self.mean.device)
        return tokens, self.model.get_text_features(input_ids=tokens["input_ids"])


class Siglip(Clip):
    """`SiglipModel`, whose pairs are each a question of yes or no: a cosine times a scale, and a bias."""

    family = "siglip"
    architectures = ("SiglipModel",)

    @classmethod
    def open(
        cls, name: str, place: str, source: str, dtype: torch.dtype, index: Mapping[str, Any], **fetching: Any
    ) -> Self:
        """The SigLIP at `place`, a folder or a Hub id."""
        from transformers import AutoTokenizer, SiglipModel
        from transformers.utils import cached_file

        model: Any = pretrained(
            SiglipModel, place, use_safetensors=True, variant=fetching.pop("variant", None), **fetching
        )
        words = AutoTokenizer.from_pretrained(place, **fetching)
        file = cached_file(place, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **fetching)
        settings = json.loads(Path(file).read_text()) if file else {}
        bilinear = settings.get("resample") == _BILINEAR
        side = model.config.vision_config.image_size
        framing = Framing(size=side, crop=side, fit="squash", filter="bilinear" if bilinear else "bicubic")
        normal = settings.get("image_mean", _HALF), settings.get("image_std", _HALF)
        encoder = SiglipEncoder(model, words, Preprocess(framing, *normal))
        encoder.model.to(dtype)
        return cls(encoder, source)

    @property
    def logit_bias(self) -> Tensor:
        bias: Tensor = self.encoder.model.logit_bias
        return bias.reshape(())
