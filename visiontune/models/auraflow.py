"""AuraFlow (fal, 2024): a few double blocks and many single ones that predict flow on patches, read by a UMT5.

What the encoder gives of the padding is put to zero and then attended to like words: nothing is masked. Each patch has
a learned place, of which a picture takes those in the middle of a square table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from visiontune.core import Condition
from visiontune.models._text import CLIP_AND_T5
from visiontune.models.base import Presets, require_text_to_image
from visiontune.models.diffusion import DiffusionModel, require_fixed_shift
from visiontune.models.words import Reader

_TOKENS = 256
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# The embedding of time has layers of some of these names too.
_FEED_FORWARD = (r".*\.ff(?:_context)?\.(?:linear_1|linear_2|out_projection)",)


class AuraFlow(DiffusionModel):
    """`AuraFlowPipeline`; its Condition has `tokens`."""

    family = "auraflow"
    pipeline_classes = ("AuraFlowPipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
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
        plain = config.in_channels == pipe.transformer.out_channels == self.latent_channels
        require_text_to_image(plain, self.source, config.in_channels)
        require_fixed_shift(pipe.scheduler, self.source)
        self.reader = Reader(pipe.tokenizer, _TOKENS)
        patch = self.downsample * int(config.patch_size)
        self.unit = max(self.unit, patch)
        # The published transformers have half the size that they draw in their config.
        self.resolution = int(self.vae.config.sample_size)
        self.longest = patch * math.isqrt(config.pos_embed_max_size)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, *_ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.pipe.text_encoder.device,
            max_sequence_length=_TOKENS,
        )
        return Condition(tokens=tokens)

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        # Past an edge of its table the network takes places from the opposite one, and says nothing.
        self.check_area(*(side * self.downsample for side in x_t.shape[-2:]))
        return self.denoiser(
            x_t,
            encoder_hidden_states=cond.tokens,
            timestep=t / self.schedule.num_train_timesteps,
            return_dict=False,
        )[0]
