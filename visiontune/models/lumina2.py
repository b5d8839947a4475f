"""Lumina-Image 2.0 (Qin et al., 2025, arXiv 2503.21758): one stream of picture and prompt, read by a Gemma 2.

Its network is told how clean its input is and predicts from noise to picture. A prompt is read after a sentence on
what the assistant is for; what the pipeline guides away from is read without it. It guides in a second call and then
gives every row of latents, across the width, the length that it had in the prompt's own prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.guidance import NO_GUIDANCE, Guidance, RowLengthCFG
from visiontune.diffusion.schedule import calculate_mu
from visiontune.models._text import DECODER
from visiontune.models.base import Presets, require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_TOKENS = 256
_MARK = " <Prompt Start> "  # what its pipeline puts between the sentence and the prompt
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")


class Lumina2(DiffusionModel):
    """`Lumina2Pipeline`; its Condition has `tokens` and `mask`."""

    family = "lumina2"
    pipeline_classes = ("Lumina2Pipeline",)
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
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        plain = config.in_channels == pipe.transformer.out_channels == self.latent_channels
        require_text_to_image(plain, self.source, config.in_channels)
        alone, after = (pipe.tokenizer(text)["input_ids"] for text in ("a", f"{pipe.system_prompt}{_MARK}a"))
        self.reader = Reader(pipe.tokenizer, _TOKENS - (len(after) - len(alone)))
        patch = self.downsample * int(config.patch_size)
        self.unit = max(self.unit, patch)
        self.resolution = self.downsample * int(config.sample_size)
        self.longest = patch * min(config.axes_lens[1:])

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        # Its pipeline shifts by the number of channels, whatever the size.
        return calculate_mu(shape[0], self.schedule.spacing.config)

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def guidance(self, scale: float) -> Guidance:
        return NO_GUIDANCE if scale == 1.0 else RowLengthCFG(scale=scale)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, mask, *_ = self.pipe.encode_prompt(
            prompts, False, device=self.pipe.text_encoder.device, max_sequence_length=_TOKENS
        )
        return Condition(tokens=tokens, mask=mask.bool())

    def _embed_negative(self, prompts: list[str]) -> Condition:
        tokens, mask = self.pipe._get_gemma_prompt_embeds(prompts, self.pipe.text_encoder.device, _TOKENS)
        return Condition(tokens=tokens, mask=mask.bool())

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("Lumina 2 needs the mask of its prompts: make the Condition with embed()")
        return -self.denoiser(
            hidden_states=x_t,
            timestep=1 - t / self.schedule.num_train_timesteps,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.mask,
            return_dict=False,
        )[0]
