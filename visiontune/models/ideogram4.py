"""Ideogram 4 (Ideogram, 2026): one stream of picture and prompt, read by a Qwen3-VL, beside a network without words.

Its pipeline guides away from what `unconditional_transformer` predicts of the picture alone: a row whose mask leaves
out every token passes that network here. What it takes are patches of latents of FLUX.2's VAE, whose channels stand in
an order of its own. Both networks are told how clean their input is, and predict from noise to picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import NO_GUIDANCE, Guidance, WordlessCFG
from visiontune.errors import UserError
from visiontune.models._patches import PatchModel
from visiontune.models._text import DECODER
from visiontune.models.base import Presets
from visiontune.models.diffusion import require_fixed_shift
from visiontune.outside import shown

_TOKENS = 2048
_MEAN = 0.0  # of the logit-normal that sampling steps follow, at 512 x 512 pixels
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_DENOISER: Presets = {
    "attention": _ATTENTION,
    "attention+ff": (*_ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "conv": (),
    "all": ("Linear",),
}


class Ideogram4(PatchModel):
    """`Ideogram4Pipeline`; its Condition has `tokens` and `mask`."""

    family = "ideogram4"
    pipeline_classes = ("Ideogram4Pipeline",)
    WORDLESS = "unconditional_transformer"
    EVENLY = False
    LOGIT_STD = 1.5
    # With it, and when asked to, its pipeline would write prompts anew.
    load_options: ClassVar[dict[str, Any]] = {"prompt_enhancer_head": None}
    TARGETS: ClassVar[Mapping[str, Presets]] = {"denoiser": _DENOISER, "text": DECODER, "unconditional": _DENOISER}

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        require_fixed_shift(pipe.scheduler, self.source)
        for network in (self.denoiser, getattr(pipe, self.WORDLESS)):
            network.t_embedding.mlp_in.register_forward_pre_hook(_in_its_type)

    def roles(self) -> dict[str, tuple[str, ...]]:
        return {**super().roles(), "unconditional": (self.WORDLESS,)}

    # -- order and grid -----------------------------------------------------------------------------------------

    def _patched(self, z: Tensor) -> Tensor:
        return z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def _unpatched(self, patches: Tensor) -> Tensor:
        return patches.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)

    def _mean(self, shape: Sequence[int]) -> float:
        """Of the logit-normal that sampling steps follow at latents of a shape."""
        height, width = (side * self.downsample for side in shape[-2:])
        return _resolution_aware_mu(height, width, _MEAN)

    def chain(self, steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        sigmas = _logit_normal_sigmas(steps, self._mean(shape), std=self.LOGIT_STD)
        return self.schedule.timesteps(steps, sigmas=sigmas.tolist())

    def sampling_shift(self, shape: Sequence[int]) -> float:
        return super().sampling_shift(shape) * math.exp(self._mean(shape))

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def guidance(self, scale: float) -> Guidance:
        return NO_GUIDANCE if scale == 1.0 else WordlessCFG(scale=scale)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, _, _, roles = self.pipe.encode_prompt(prompts, 0, 0, self._longest(prompts), self.device)
        return Condition(tokens=tokens, mask=roles == LLM_TOKEN_INDICATOR)

    def unconditional(self, count: int) -> Condition:
        tokens = torch.zeros(count, 1, self.denoiser.config.llm_features_dim, device=self.device)
        return Condition(tokens=tokens, mask=tokens.new_zeros(count, 1, dtype=torch.bool))

    def _longest(self, prompts: Sequence[str]) -> int:
        """Tokens of the longest prompt, with what the chat template puts around it.

        Its pipeline would fill every prompt up to 2048, which changes nothing but the time.
        """
        talks = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        words = self.pipe.tokenizer
        texts = words.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
        lengths = [len(ids) for ids in words(texts, add_special_tokens=False)["input_ids"]]
        longest = max(lengths)
        if longest > _TOKENS:
            prompt = shown(prompts[lengths.index(longest)])[:80]
            raise UserError(f"prompt '{prompt}' has {longest} tokens, and '{self.source}' reads {_TOKENS}: shorten it")
        return longest

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options = super()._stock(guidance, requests)
        if options.pop("negative_prompt", None):
            raise UserError(f"'{self.source}' guides away from pictures without words: leave the negative prompt out")
        longest = self._longest([request.prompt for request in requests])
        return {**options, "guidance_schedule": None, "max_sequence_length": longest}

    # -- the denoisers ------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("Ideogram 4 needs the lengths of its prompts: make the Condition with embed()")
        found, worded = torch.empty_like(x_t), cond.mask.any(1)
        for network, rows in ((self.denoiser, worded), (getattr(self.pipe, self.WORDLESS), ~worded)):
            if rows.any():
                found[rows] = self._flow(network, x_t[rows], t[rows], cond[rows]).to(found)
        return found

    def _flow(self, network: Any, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What a network predicts of rows that all have words, or all have none."""
        assert cond.mask is not None
        height, width = x_t.shape[-2:]
        prompts = [tokens[mask] for tokens, mask in zip(cond.tokens, cond.mask, strict=True)]
        text = pad_sequence(prompts, batch_first=True, padding_side="left")
        lengths, longest = [len(prompt) for prompt in prompts], text.shape[1]
        places, segments, roles = self.pipe._prepare_ids(lengths, height, width, longest, x_t.device)
        flow = network(
            hidden_states=pad(self._stock_latents(x_t), (0, 0, longest, 0)),
            timestep=1 - t.float() / self.schedule.num_train_timesteps,
            encoder_hidden_states=pad(text, (0, 0, 0, height * width)),
            position_ids=places,
            segment_ids=segments,
            indicator=roles,
            return_dict=False,
        )[0]
        return -flow[:, longest:].mT.reshape(x_t.shape)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return noise.flatten(2).mT


def _in_its_type(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a layer is given, in its own type.

    The embedding of time has the type of the time, which its pipeline rounds: in bfloat16 all below 2 of 1000 is then
    clean. The time is given in float32 here, and rounded as sines and cosines.
    """
    return (args[0].to(layer.bias.dtype),)
