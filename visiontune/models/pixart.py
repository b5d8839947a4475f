"""PixArt-alpha (Chen et al., 2023, arXiv 2310.00426) and -sigma (2024, arXiv 2403.04692): a DiT that predicts eps.

A T5 reads the prompt, in lower case, and padding is masked. Beside eps the network gives the variance of its step,
which no sampler here reads. Alpha of 1024 pixels is told the size and the aspect ratio of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import Guidance
from visiontune.models._structure import Arguments, Structure
from visiontune.models._text import CLIP_AND_T5, default_of
from visiontune.models.base import Presets, require
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The only size at which the pipeline of alpha tells the network any.
_SIZED = 128


def _masked(arguments: Arguments) -> Condition:
    return Condition(tokens=arguments["encoder_hidden_states"], mask=arguments["encoder_attention_mask"].bool())


class PixArt(DiffusionModel):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`; its Condition has `tokens` and `mask`."""

    family = "pixart"
    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    DENOISERS = ("transformer",)
    STRUCTURE = Structure(
        sides="negative first",
        blocks={r"transformer_blocks\.\d+": ("hidden_states",)},
        attention={r"transformer_blocks\.\d+\.attn1": "none"},
        cross=r"transformer_blocks\.\d+\.attn2",
        condition=_masked,
    )
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
            "conv": ("Conv2d",),
            "all": ("Linear", "Conv2d"),
        },
        "text": CLIP_AND_T5,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        complete = pipe.text_encoder is not None and pipe.tokenizer is not None
        require(complete, source, "it lacks its T5; give a folder with text_encoder and tokenizer")
        super().__init__(pipe, source)
        config = pipe.transformer.config
        outputs = pipe.transformer.out_channels
        plain = config.in_channels == self.latent_channels and outputs in (config.in_channels, 2 * config.in_channels)
        got = f"its transformer takes {config.in_channels} channels and gives {outputs}"
        require(plain, self.source, f"{got}; give a text-to-image one")
        require(self.schedule.prediction != "flow", self.source, "its scheduler is one of flow; give one of noise")
        self.sized = bool(pipe.transformer.use_additional_conditions)
        told = type(pipe).__name__ == "PixArtAlphaPipeline" and config.sample_size == _SIZED
        require(
            told or not self.sized,
            self.source,
            "its transformer is to be told sizes (use_additional_conditions), which only PixArtAlphaPipeline does, at "
            f"sample_size {_SIZED}",
        )
        self._tokens = int(default_of(type(pipe), "max_sequence_length"))
        self.reader = Reader(lambda prompts: pipe.tokenizer(pipe._text_preprocessing(prompts)), self._tokens)
        self.unit = max(self.unit, self.downsample * int(config.patch_size))
        self.resolution = self.downsample * int(config.sample_size)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, mask, _, _ = self.pipe.encode_prompt(
            prompts, False, device=self.pipe.text_encoder.device, max_sequence_length=self._tokens
        )
        return Condition(tokens=tokens, mask=mask.bool())

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.mask is None:
            raise ValueError("PixArt needs the mask of its prompts: make the Condition with embed()")
        found = self.denoiser(
            x_t,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.mask,
            timestep=t,
            added_cond_kwargs=self._added(x_t),
            return_dict=False,
        )[0]
        return found[:, : self.latent_channels]

    def _added(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """The network's conditioning beside the tokens: height and width in pixels, and height by width."""
        if not self.sized:
            return {"resolution": None, "aspect_ratio": None}
        size = x_t.new_tensor([side * self.downsample for side in x_t.shape[-2:]])
        rows = len(x_t)
        return {"resolution": size.repeat(rows, 1), "aspect_ratio": (size[:1] / size[1:]).repeat(rows, 1)}

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options = super()._stock(guidance, requests)
        # Cleaning rewrites prompts, and only where two further packages are installed.
        fixed = {"clean_caption": False, "use_resolution_binning": False}
        return {**options, **fixed, "negative_prompt": options.get("negative_prompt") or ""}
