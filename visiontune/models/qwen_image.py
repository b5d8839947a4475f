"""Qwen-Image (Wu et al., 2025, arXiv 2508.02324): double blocks on packed latents, read by a Qwen2.5-VL.

The VAE is one of clips, of which a picture is the first frame. Its pipeline guides in a second call and then gives
every patch the length that it had before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, Guidance, PatchLengthCFG
from visiontune.models._frames import OneFrame
from visiontune.models._text import DECODER
from visiontune.models._time import exact_time
from visiontune.models.base import Presets, require_text_to_image
from visiontune.models.words import Reader

_PATCH = 2
_TOKENS = 512
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class QwenImage(OneFrame):
    """`QwenImagePipeline`; its Condition has `tokens` and `mask`."""

    family = "qwen_image"
    pipeline_classes = ("QwenImagePipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "net.0.proj", "net.2"),
            "conv": (),
            "all": ("Linear",),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        plain = config.in_channels == self.latent_channels * _PATCH**2 and not config.guidance_embeds
        require_text_to_image(plain, self.source, config.in_channels)
        # What stands after the prompt in the template counts, what stands before it is dropped.
        after = pipe.tokenizer(pipe.prompt_template_encode.partition("{}")[2])["input_ids"]
        self.reader = Reader(pipe.tokenizer, _TOKENS - len(after))
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = self.downsample * int(pipe.default_sample_size)

    def idle(self) -> tuple[str, ...]:
        last = f"transformer.transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        return tuple(
            f"{last}.{own}" for own in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        )

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def guidance(self, scale: float) -> Guidance:
        return NO_GUIDANCE if scale == 1.0 else PatchLengthCFG(scale=scale, patch=_PATCH)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, mask = self.pipe.encode_prompt(prompts, self.pipe.text_encoder.device, max_sequence_length=_TOKENS)
        # The pipeline leaves out a mask that masks nothing.
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return Condition(tokens=tokens, mask=mask)

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_sequence_length": _TOKENS, "true_cfg_scale": 1.0}
        if isinstance(guidance, CFG):
            negatives = [request.negative for request in requests]
            return {**options, "true_cfg_scale": guidance.scale, "negative_prompt": negatives}
        return options

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, channels, height, width = x_t.shape
        time = t.float() / self.schedule.num_train_timesteps
        with exact_time(self.denoiser.time_text_embed.time_proj, time):  # which multiplies by 1000 itself
            packed = self.denoiser(
                hidden_states=self._stock_latents(x_t),
                timestep=time,
                encoder_hidden_states=cond.tokens,
                encoder_hidden_states_mask=None if cond.mask is None or cond.mask.all() else cond.mask,
                img_shapes=[[(1, height // _PATCH, width // _PATCH)]] * rows,
                return_dict=False,
            )[0]
        sides = (side * self.downsample for side in (height, width))
        return self.pipe._unpack_latents(packed, *sides, self.downsample).view(rows, channels, height, width)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)
