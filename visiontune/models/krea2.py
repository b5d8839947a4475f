"""Krea 2 (Krea, 2026): one stream of prompt and packed latents, in a transformer that predicts flow.

The prompt is read by a Qwen3-VL, of which several layers are kept for every token; the transformer joins them itself.
Its pipeline pads a prompt before it closes the template. Tokens of the prompt have no place, so that those that count
are taken without the padding between them, and read the same. It adds g (c - u) to the prompt's own prediction: what it
calls g is a scale of 1 + g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from visiontune.core import Condition
from visiontune.models._frames import OneFrame
from visiontune.models._text import DECODER, ragged
from visiontune.models.base import Presets, require
from visiontune.models.words import Reader

_TOKENS = 512
_DISTILLED_MU = 1.15
_ATTENTION = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")


class Krea2(OneFrame):
    """`Krea2Pipeline`; its Condition has `mask` and `tokens` [b, n, layers * d], the layers' features side by side."""

    family = "krea2"
    pipeline_classes = ("Krea2Pipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    GUIDANCE_OFFSET = 1.0
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "ff.gate", "ff.up", "ff.down"),
            "conv": (),
            "all": ("Linear",),
        },
        "text": DECODER,
    }
    resolution = 1024  # no part of the pipeline says it

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        channels = pipe.transformer.config.in_channels
        fits = channels == self.latent_channels * pipe.patch_size**2
        require(fits, self.source, f"its transformer takes {channels} channels")
        # The template's beginning is cut off as so many tokens, whatever it has.
        before = len(pipe.tokenizer(pipe.prompt_template_encode_prefix)["input_ids"])
        room = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        self.reader = Reader(pipe.tokenizer, _TOKENS + room - before)
        self.unit = max(self.unit, self.downsample * pipe.patch_size)

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        if self.pipe.config.is_distilled:
            return _DISTILLED_MU
        # The stock pipeline's own default differs from that of others.
        return self._mu_of_patches(shape, self.pipe.patch_size, max_image_seq_len=6400)

    def _embed(self, prompts: list[str]) -> Condition:
        device = self.pipe.text_encoder.device
        tokens, mask = self.pipe.encode_prompt(prompts, device, max_sequence_length=_TOKENS)
        return ragged(row[kept] for row, kept in zip(tokens.flatten(2), mask, strict=True))

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, channels, height, width = x_t.shape
        grid = (side // self.pipe.patch_size for side in (height, width))
        packed = self.denoiser(
            hidden_states=self._stock_latents(x_t),
            encoder_hidden_states=cond.tokens.unflatten(2, (self.denoiser.config.num_text_layers, -1)),
            timestep=t / self.schedule.num_train_timesteps,
            position_ids=self.pipe.prepare_position_ids(cond.tokens.shape[1], *grid, x_t.device),
            encoder_attention_mask=None if cond.mask is None or cond.mask.all() else cond.mask,
            return_dict=False,
        )[0]
        sides = (side * self.downsample for side in (height, width))
        return self.pipe._unpack_latents(packed, *sides).view(rows, channels, height, width)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)
