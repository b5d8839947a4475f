"""FLUX.1 (Black Forest Labs, 2024): a transformer of double and single blocks that predicts flow on patches of latents.

A CLIP gives one vector for the prompt and a T5 its tokens; nothing is masked, so that the padding is attended to as in
the stock pipeline. The `dev` models carry guidance inside: the network is told its scale. Denoising is trained at scale
1, where what it predicts is what it was distilled from without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, Embedded, Guidance
from visiontune.models._text import CLIP_AND_T5
from visiontune.models._time import exact_time
from visiontune.models.base import Presets, require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_PATCH = 2
_T5_TOKENS = 512
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Of the double blocks, and of the single ones, whose last layer is attention's too.
_FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", "proj_out")


class Flux(DiffusionModel):
    """`FluxPipeline`; its Condition has `tokens` and `pooled`, and with guidance inside `extra["guidance"]`."""

    family = "flux"
    pipeline_classes = ("FluxPipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "conv": (),
            "all": ("Linear",),
        },
        "text": CLIP_AND_T5,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        channels = self.latent_channels * _PATCH**2
        plain = config.in_channels == pipe.transformer.out_channels == channels
        require_text_to_image(plain, self.source, config.in_channels)
        self.embedded = bool(config.guidance_embeds)
        self.reader = Reader(pipe.tokenizer_2, _T5_TOKENS)
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = int(self.vae.config.sample_size)

    def _few_steps(self) -> str | None:
        shifted = self.pipe.scheduler.config.get("use_dynamic_shifting")
        schnell = not self.pipe.transformer.config.guidance_embeds and not shifted
        return "neither guidance_embeds nor use_dynamic_shifting, as in schnell" if schnell else None

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    def guidance(self, scale: float) -> Guidance:
        return Embedded(scale=scale) if self.embedded else super().guidance(scale)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder.device, max_sequence_length=_T5_TOKENS
        )
        return Condition(tokens=tokens, pooled=pooled)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("FLUX needs the pooled text vector: make the Condition with embed()")
        rows, (height, width) = len(x_t), (side // _PATCH for side in x_t.shape[-2:])
        told = cond.extra.get("guidance", x_t.new_ones(rows, dtype=torch.float32)) if self.embedded else None
        time = t.float() / self.schedule.num_train_timesteps
        with exact_time(self.denoiser.time_text_embed.time_proj, time * 1000):
            packed = self.denoiser(
                hidden_states=self._stock_latents(x_t),
                timestep=time,
                guidance=told,
                pooled_projections=cond.pooled,
                encoder_hidden_states=cond.tokens,
                txt_ids=x_t.new_zeros(cond.tokens.shape[1], 3),
                img_ids=self.pipe._prepare_latent_image_ids(rows, height, width, x_t.device, x_t.dtype),
                return_dict=False,
            )[0]
        sides = (side * self.downsample for side in x_t.shape[-2:])
        return self.pipe._unpack_latents(packed, *sides, self.downsample)

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_sequence_length": _T5_TOKENS, "guidance_scale": 1.0}
        if isinstance(guidance, CFG):
            return {
                **options,
                "true_cfg_scale": guidance.scale,
                "negative_prompt": [request.negative for request in requests],
            }
        return options | super()._stock(guidance, requests)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)
