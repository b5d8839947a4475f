"""Stable Diffusion 3 and 3.5 (Esser et al., 2024, arXiv 2403.03206): a multimodal transformer that predicts flow.

Two CLIPs and a T5, which may be absent, read the prompt. What CLIP gives stands before what T5 gives, along the tokens;
nothing is masked, so that the padding of a prompt is attended to as in the stock pipeline. Zeros stand for an absent
T5, but not where the transformer is too narrow to have ever had one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import Guidance
from visiontune.models._structure import Structure, pooled
from visiontune.models._text import CLIP_AND_T5
from visiontune.models.base import Presets, require, require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_T5_TOKENS = 256
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("net.0.proj", "net.2")  # of `ff` and of `ff_context`


class StableDiffusion3(DiffusionModel):
    """`StableDiffusion3Pipeline`; its Condition has `tokens` and `pooled`."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    STRUCTURE = Structure(
        sides="negative first",
        blocks={r"transformer_blocks\.\d+": ("encoder_hidden_states", "hidden_states")},
        attention={r"transformer_blocks\.\d+\.attn": "after", r"transformer_blocks\.\d+\.attn2": "none"},
        tokenizers=("tokenizer", "tokenizer_3"),
        condition=pooled,
    )
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "conv": ("Conv2d",),
            "all": ("Linear", "Conv2d"),
        },
        "text": CLIP_AND_T5,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        plain = config.in_channels == pipe.transformer.out_channels == self.latent_channels
        require_text_to_image(plain, self.source, config.in_channels)
        complete = pipe.text_encoder is not None and pipe.text_encoder_2 is not None
        require(complete, self.source, "it lacks one of its two CLIP text encoders; only T5 may be left out")
        widths = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
        self._t5_tokens = 0 if pipe.text_encoder_3 is None and config.joint_attention_dim == widths else _T5_TOKENS
        if pipe.text_encoder_3 is not None:
            self.reader = Reader(pipe.tokenizer_3, _T5_TOKENS)
        self._patch = int(config.patch_size)
        self.unit = max(self.unit, self.downsample * self._patch)
        self.resolution = self.downsample * int(config.sample_size)
        self.longest = self.downsample * self._patch * int(config.pos_embed_max_size)

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        # The stock pipeline's own default differs from that of others.
        return self._mu_of_patches(shape, self._patch, max_shift=1.16)

    def idle(self) -> tuple[str, ...]:
        return (f"transformer.transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}.attn.add_q_proj",)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        return Condition(tokens=tokens, pooled=pooled)

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        return {**super()._stock(guidance, requests), "max_sequence_length": self._t5_tokens}

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("Stable Diffusion 3 needs the pooled text vector: make the Condition with embed()")
        return self.denoiser(
            x_t,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            timestep=t,
            return_dict=False,
        )[0]
