"""Sana (Xie et al., 2024, arXiv 2410.10629): linear attention on deeply compressed latents, predicting flow.

A Gemma 2 reads the prompt, in lower case, after a long instruction to enhance it; of what it makes the first token and
the last 299 are kept, and padding is masked. What is guided away from is read without the instruction. Its autoencoder
gives one latent for a picture and no distribution of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import Guidance
from visiontune.models._text import DECODER, default_of
from visiontune.models.base import Presets, dtype_of, require
from visiontune.models.diffusion import DiffusionModel, device_of
from visiontune.models.words import Reader

_UNIT = 32  # of the sides that its pipeline takes, whatever the autoencoder
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Between the two stands one of each channel alone, whose 3 x 3 numbers a LoRA would not make fewer, and of which other
# tools read other factors: no preset has it.
_FEED_FORWARD = ("ff.conv_inverted", "ff.conv_point")
_CONVOLUTIONS = (*_FEED_FORWARD, "patch_embed.proj")


class Sana(DiffusionModel):
    """`SanaPipeline`; its Condition has `tokens` and `mask`."""

    family = "sana"
    pipeline_classes = ("SanaPipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "conv": _CONVOLUTIONS,
            "all": ("Linear", *_CONVOLUTIONS),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        outputs = config.out_channels or config.in_channels
        plain = config.in_channels == self.latent_channels and outputs in (config.in_channels, 2 * config.in_channels)
        got = f"its transformer takes {config.in_channels} channels and gives {outputs}"
        require(plain, self.source, f"{got}; give a text-to-image one")
        require(not config.guidance_embeds, self.source, "it is distilled (Sana-Sprint); give the Sana it came from")
        self._tokens = int(default_of(type(pipe), "max_sequence_length"))
        self._instruction: list[str] = default_of(type(pipe), "complex_human_instruction")
        self.reader = Reader(lambda prompts: pipe.tokenizer(pipe._text_preprocessing(prompts)), self._tokens)
        self.unit = max(self.unit, self.downsample * int(config.patch_size), _UNIT)
        self.resolution = self.downsample * int(config.sample_size)

    # -- pixels -------------------------------------------------------------------------------------------------

    def moments(self, pixels: Tensor) -> Tensor:
        vae = self._codec()
        latent = vae.encode(pixels.to(device_of(vae), dtype_of(vae))).latent.to(self.device, pixels.dtype)
        return torch.cat([latent, torch.zeros_like(latent)], dim=1)

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def _embed(self, prompts: list[str]) -> Condition:
        return self._told(prompts, self._instruction)

    def _embed_negative(self, prompts: list[str]) -> Condition:
        return self._told(prompts, None)

    def _told(self, prompts: list[str], instruction: list[str] | None) -> Condition:
        tokens, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            False,
            device=self.pipe.text_encoder.device,
            max_sequence_length=self._tokens,
            complex_human_instruction=instruction,
        )
        return Condition(tokens=tokens, mask=mask.bool())

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options = super()._stock(guidance, requests)
        return {**options, "use_resolution_binning": False, "negative_prompt": options.get("negative_prompt") or ""}

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("Sana needs the mask of its prompts: make the Condition with embed()")
        found = self.denoiser(
            x_t,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.mask,
            timestep=t * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return found[:, : self.latent_channels]
