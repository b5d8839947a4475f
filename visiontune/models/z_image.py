"""Z-Image (Alibaba, 2025): one stream of picture and prompt, read by a Qwen3, in a transformer that predicts flow.

Its network is told how clean its input is, predicts from noise to picture, and takes a list of pictures and a list of
prompts of any lengths, so that padding never reaches it. Its pipeline adds g (c - u) to the prompt's own prediction:
what it calls g is a scale of 1 + g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.models._structure import Arguments, Structure
from visiontune.models._text import DECODER, chat_overhead, ragged
from visiontune.models.base import Presets, require
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_PATCH = 2
_TOKENS = 512
_TURBO_SHIFT = 3.0
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _from_clean(told: Tensor) -> Tensor:
    """Timesteps of a network that is told how clean its input is."""
    return (1 - told) * 1000


def _without_frame(x: Tensor, arguments: Arguments) -> Tensor:
    """[b, c, h, w], also of the one frame [b, c, 1, h, w] that the network sees."""
    return x.squeeze(2) if x.ndim == 5 else x


def _with_frame(x: Tensor, arguments: Arguments) -> Tensor:
    return x.unsqueeze(2)


class ZImage(DiffusionModel):
    """`ZImagePipeline`; its Condition has `tokens` and `mask`."""

    family = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    GUIDANCE_OFFSET = 1.0
    STRUCTURE = Structure(
        sides="prompt first",
        noisy="x",
        told="t",
        time=_from_clean,
        sign=-1,
        canonical=_without_frame,
        native=_with_frame,
        condition=lambda arguments: ragged(arguments["cap_feats"]),
        blocks={r"layers\.\d+": ("x",)},
        # The tokens of picture and prompt lie in one stream, padded to no fixed length.
        attention={},
    )
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            "conv": (),
            "all": ("Linear",),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        channels = pipe.transformer.config.in_channels
        require(channels == self.latent_channels, source, f"its transformer takes {channels} channels")
        self.reader = Reader(pipe.tokenizer, _TOKENS - chat_overhead(pipe.tokenizer, enable_thinking=True))
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = int(self.vae.config.sample_size)

    def _few_steps(self) -> str | None:
        config = self.pipe.scheduler.config
        turbo = config.get("shift") == _TURBO_SHIFT and not config.get("use_dynamic_shifting")
        return f"a shift of {_TURBO_SHIFT:g}, as in Turbo, where the base has 6" if turbo else None

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    def _embed(self, prompts: list[str]) -> Condition:
        found, _ = self.pipe.encode_prompt(
            prompts, self.pipe.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=_TOKENS
        )
        return ragged(found)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("Z-Image needs the lengths of its prompts: make the Condition with embed()")
        prompts = [tokens[mask] for tokens, mask in zip(cond.tokens, cond.mask, strict=True)]
        clean = 1 - t.float() / self.schedule.num_train_timesteps
        found = self.denoiser([row[:, None] for row in x_t], clean, prompts, return_dict=False)[0]
        return -torch.stack(found).squeeze(2)
