"""ERNIE-Image (Baidu): one stream of picture and prompt, read by a Mistral, in a transformer that predicts flow.

Its latents are patches of those of FLUX.2's VAE. A prompt is read alone and as long as it is; where the picture stands
in the stream depends on that length. The network is told t itself and gives flow as it is meant here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import Guidance
from visiontune.models._patches import PatchModel
from visiontune.models._text import DECODER, ragged
from visiontune.models.base import Presets
from visiontune.models.diffusion import require_fixed_shift

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class ErnieImage(PatchModel):
    """`ErnieImagePipeline`; its Condition has `tokens` and `mask`."""

    family = "ernie_image"
    pipeline_classes = ("ErnieImagePipeline",)
    # A second language model would write every prompt anew, at random: pictures must be of the prompt that was given.
    load_options: ClassVar[dict[str, Any]] = {"pe": None, "pe_tokenizer": None}
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "gate_proj", "up_proj", "linear_fc2"),
            "conv": ("Conv2d",),
            "all": ("Linear", "Conv2d"),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        require_fixed_shift(pipe.scheduler, self.source)

    def _least_variance(self) -> float:
        """What the model was trained with, and its pipeline has in its code: the VAE's config says another."""
        return 1e-5

    def _embed(self, prompts: list[str]) -> Condition:
        return ragged(self._read(prompt) for prompt in prompts)

    def _read(self, prompt: str) -> Tensor:
        """[n, d] of one prompt: what its pipeline's `encode_prompt` gives, which lets no gradients through."""
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(prompt, truncation=True)["input_ids"] or [tokenizer.bos_token_id or 0]
        found = encoder(input_ids=torch.tensor([ids], device=encoder.device), output_hidden_states=True)
        return found.hidden_states[-2][0]

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("ERNIE-Image needs the lengths of its prompts: make the Condition with embed()")
        return self.denoiser(x_t, t, text_bth=cond.tokens, text_lens=cond.mask.sum(1), return_dict=False)[0]

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        return {"use_pe": False, **super()._stock(guidance, requests)}
