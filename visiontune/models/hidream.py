"""HiDream-I1 (HiDream.ai, 2025, arXiv 2505.22705): double and single blocks with routed experts, read by four encoders.

Two CLIPs give a vector of the prompt, a T5 and every layer of a Llama its tokens; nothing is masked. The network
predicts from noise to picture. Its pipeline draws pictures of one area, whatever size it is asked for.

In diffusers' blocks no gradient passes the experts in evaluation mode, which is how adapters are trained here, and in
training mode the network gives patches in place of a picture. Both are mended in the network that is opened: it
computes the same numbers, in both modes, and they can be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.schedule import calculate_mu
from visiontune.errors import UserError
from visiontune.models._text import CLIP_AND_T5, DECODER
from visiontune.models.base import Presets, require, require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_PATCH = 2
_TOKENS = 128
_ATTENTION = tuple(f"to_{name}{stream}" for name in ("q", "k", "v", "out") for stream in ("", "_t"))
# Of the text, and of the expert that sees every patch; a block without experts has `ff_i` alone.
_FEED_FORWARD = tuple(f"{part}.w{i}" for part in ("ff_t", "ff_i", "shared_experts") for i in (1, 2, 3))
_TEXT_FF = (*CLIP_AND_T5["attention+ff"], *DECODER["attention+ff"])


class HiDream(DiffusionModel):
    """`HiDreamImagePipeline`; its Condition has T5's `tokens`, `pooled`, and `extra["llama"]` [b, layers, n, d]."""

    family = "hidream"
    pipeline_classes = ("HiDreamImagePipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "conv": (),
            "all": ("Linear",),
        },
        "text": {
            "attention": (*CLIP_AND_T5["attention"], *DECODER["attention"]),
            "attention+ff": _TEXT_FF,
            "conv": (),
            "all": (*_TEXT_FF, "text_projection"),
        },
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        plain = config.in_channels == pipe.transformer.out_channels == self.latent_channels
        require_text_to_image(plain, self.source, config.in_channels)
        whole = all(getattr(pipe, f"{kind}_4") is not None for kind in ("text_encoder", "tokenizer"))
        why = "it lacks its Llama: open the pipeline by diffusers with tokenizer_4 and text_encoder_4, and save it"
        require(whole, self.source, why)
        _let_gradients_through(pipe.transformer)
        self.reader = Reader(pipe.tokenizer_4, _TOKENS)
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = self._side() // self.unit * self.unit

    # -- sizes and steps ----------------------------------------------------------------------------------------

    def _side(self) -> int:
        """Of a square of as many pixels as the pipeline draws."""
        return self.downsample * int(self.pipe.default_sample_size)

    def _drawn(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the picture that the pipeline draws when it is asked for one."""
        scale, division = math.sqrt(self._side() ** 2 / math.prod(size)), self.downsample * _PATCH
        height, width = (int(side * scale // division * division) for side in size)
        return height, width

    def size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        asked = fits = super().size(height, width)
        while (drawn := self._drawn(fits)) != fits:
            fits = drawn
        if asked != fits:
            raise UserError(
                f"the pipeline of '{self.source}' draws {self._side()}x{self._side()} pixels in any shape, and "
                f"{asked[0]}x{asked[1]} would become another size: take {fits[0]}x{fits[1]}"
            )
        return asked

    def check_area(self, height: int, width: int) -> None:
        patch, most = self.downsample * _PATCH, int(self.denoiser.max_seq)
        count = height // patch * (width // patch)
        if count > most:
            raise UserError(
                f"{height}x{width} pixels are {count} patches of {patch}x{patch}, and the model reads {most}: take less"
            )

    def mu(self, shape: Sequence[int] = (), steps: int | None = None) -> float:
        # Its pipeline has that of the largest picture for all.
        return calculate_mu(self.denoiser.max_seq, {})

    def sampler(self, name: str) -> Any:
        made = super().sampler(name)
        untold = isinstance(made, UniPCMultistepScheduler)
        if untold and made.config.get("use_dynamic_shifting"):
            # Its pipeline tells every scheduler the shift but this one.
            made.set_timesteps = partial(made.set_timesteps, mu=self.mu())
        return made

    # -- prompts and the denoiser -------------------------------------------------------------------------------

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, _, layers, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
        )
        return Condition(tokens=tokens, pooled=pooled, extra={"llama": layers.movedim(1, 0)})

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return -self.denoiser(
            hidden_states=x_t,
            timesteps=t,
            encoder_hidden_states_t5=cond.tokens,
            encoder_hidden_states_llama3=cond.extra["llama"].movedim(1, 0),
            pooled_embeds=cond.pooled,
            return_dict=False,
        )[0]


def _let_gradients_through(transformer: Any) -> None:
    """Let a network with routed experts compute in training and in evaluation mode alike, and differentiably."""
    transformer.unpatchify = MethodType(_unpatchify, transformer)
    routed: list[Any] = [module for module in transformer.modules() if isinstance(module, MOEFeedForwardSwiGLU)]
    for module in routed:
        module._force_inference_output = False
        module.forward = MethodType(_route, module)


def _unpatchify(self: Any, x: Tensor, img_sizes: Tensor, is_training: bool) -> Tensor:
    return type(self).unpatchify(self, x, img_sizes, False)


def _route(self: Any, x: Tensor) -> Tensor:
    """What experts make of patches: as they train where gradients are wanted, since their inference takes none."""
    mode, self.training = self.training, torch.is_grad_enabled()
    try:
        return type(self).forward(self, x)
    finally:
        self.training = mode
