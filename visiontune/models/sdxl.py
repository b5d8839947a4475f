"""Stable Diffusion XL (Podell et al., 2023): two CLIP text encoders, a pooled vector and size conditioning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.models._structure import Arguments
from visiontune.models.base import require
from visiontune.models.diffusion import Box
from visiontune.models.sd import StableDiffusion


def _told(arguments: Arguments) -> Condition:
    added = arguments["added_cond_kwargs"]
    sizes = {"time_ids": added["time_ids"]}
    return Condition(tokens=arguments["encoder_hidden_states"], pooled=added["text_embeds"], extra=sizes)


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`; its Condition has `tokens` and `pooled`.

    `extra["time_ids"]` [b, 6] may give each row's original height and width, top and left of the crop, and target
    height and width in pixels (section 2.2 of the paper); without it a row counts as uncropped, in the latents' size.
    """

    family = "sdxl"
    PAINTING = "StableDiffusionXLInpaintPipeline"
    EDITING = "StableDiffusionXLInstructPix2PixPipeline"
    pipeline_classes = ("StableDiffusionXLPipeline", PAINTING, EDITING)
    load_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    STRUCTURE = replace(StableDiffusion.STRUCTURE, condition=_told, pipelines=("StableDiffusionXLPipeline",))

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        complete = pipe.text_encoder is not None and pipe.text_encoder_2 is not None
        require(complete, self.source, "it lacks one of its two text encoders; give a complete base checkpoint")
        scaled = getattr(pipe, "is_cosxl_edit", False)
        require(not scaled, self.source, "it reads pictures in the scale of CosXL; give one of InstructPix2Pix's")

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return Condition(tokens=tokens, pooled=pooled)

    def unconditional(self, count: int) -> Condition:
        empty = super().unconditional(count)
        if not self.pipe.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.pooled is not None
        return Condition(tokens=torch.zeros_like(empty.tokens), pooled=torch.zeros_like(empty.pooled))

    def placed(self, cond: Condition, box: Box, canvas: tuple[int, int] | None) -> Condition:
        left, top, width, height = box
        sizes = [*(canvas or (height, width)), *((top, left) if canvas else (0, 0)), height, width]
        told = torch.tensor([sizes] * len(cond), dtype=torch.float32, device=cond.tokens.device)
        return replace(cond, extra={**cond.extra, "time_ids": told})

    def _added(self, x_t: Tensor, cond: Condition) -> dict[str, Tensor]:
        if cond.pooled is None:
            raise ValueError("SDXL needs the pooled text vector: make the Condition with embed()")
        time_ids = cond.extra.get("time_ids")
        if time_ids is None:
            height, width = (side * self.downsample for side in x_t.shape[-2:])
            time_ids = x_t.new_tensor([height, width, 0, 0, height, width]).expand(x_t.shape[0], -1)
        return {"text_embeds": cond.pooled, "time_ids": time_ids.to(x_t)}
