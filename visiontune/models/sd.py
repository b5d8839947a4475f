"""Stable Diffusion 1.x and 2.x: one CLIP text encoder and a UNet that predicts eps or v."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import interpolate

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import EditCFG, Guidance
from visiontune.errors import UserError
from visiontune.models import _sets
from visiontune.models._confined import confined
from visiontune.models._coupled import Coupling
from visiontune.models._reading import Reads
from visiontune.models._structure import Structure
from visiontune.models.base import Presets, require
from visiontune.models.diffusion import DiffusionModel, Generators

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_FEW_TOKENS = 1024
# Of a scale of guidance, as many as of the published UNets that are told one.
_SINES = 256


def sines(unet: Any, scale: Tensor) -> Tensor:
    """What a UNet is told of scales of guidance [b], in float32: sines [b, d] of 1000 (scale - 1)."""
    width = unet.config.time_cond_proj_dim
    # A function of its arguments alone.
    found: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale.float().cpu() - 1, width)
    return found


def _telling(unet: Any, scale: Tensor) -> Mapping[str, Tensor]:
    weight = unet.time_embedding.cond_proj.weight
    return {"timestep_cond": sines(unet, scale).to(weight)}


_PAINTS = Reads(least=1, most=1, mask=True, channels=True)
_EDITS = Reads(least=1, most=1, channels=True)


class StableDiffusion(DiffusionModel):
    """`StableDiffusionPipeline`; its Condition has `tokens`, and of `StableDiffusionInpaintPipeline` and
    `StableDiffusionInstructPix2PixPipeline` `extra["channels"]`.

    Attributes:
        PAINTING: the class whose UNet reads a mask and what is left of the picture beside noisy latents.
        EDITING: the one whose UNet reads a picture there.
    """

    family = "sd"
    PAINTING: ClassVar[str] = "StableDiffusionInpaintPipeline"
    EDITING: ClassVar[str] = "StableDiffusionInstructPix2PixPipeline"
    pipeline_classes = ("StableDiffusionPipeline", PAINTING, EDITING)
    # Previews of a training run must show what the model makes, not the checker's black images.
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    STRUCTURE = Structure(
        sides="negative first",
        noisy="sample",
        blocks={r".+\.transformer_blocks\.\d+": ("hidden_states",)},
        attention={r".+\.attn1": "none"},
        cross=r".+\.attn2",
        mid="mid_block",
        telling=_telling,
        stages=(r"down_blocks\.\d+", "mid_block", r"up_blocks\.\d+"),
        pipelines=("StableDiffusionPipeline",),
    )
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
            "conv": ("Conv2d",),
            "all": ("Linear", "Conv2d"),
        },
        "text": {
            "attention": _TEXT_ATTENTION,
            "attention+ff": (*_TEXT_ATTENTION, "mlp.fc1", "mlp.fc2"),
            "conv": (),
            "all": ("Linear",),
        },
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config, own = pipe.unet.config, self.latent_channels
        name = type(pipe).__name__
        self.coupling: Coupling | None = None
        self.reads = {self.PAINTING: _PAINTS, self.EDITING: _EDITS}.get(name, self.reads)
        self.task = "image-to-image" if self.edits else self.task
        kind = {self.PAINTING: "an inpainting", self.EDITING: "an InstructPix2Pix"}.get(name, "a text-to-image")
        # Of what is painted into or edited, the latents of the picture too, and one channel of the mask.
        taken = own * (1 + self.reads.channels) + self.reads.mask
        fits = (config.in_channels, config.out_channels) == (taken, own)
        require(fits, self.source, f"its UNet takes {config.in_channels} channels; give {kind} checkpoint")
        self.embedded = config.time_cond_proj_dim is not None
        told = self.embedded and self.edits
        require(not told, self.source, "its UNet is told its guidance, which its pipeline never does")
        size = config.sample_size
        self.resolution = self.downsample * int(size if isinstance(size, int) else size[0])

    def _few_steps(self) -> str | None:
        config = self.pipe.scheduler.config
        turbo = type(self.pipe.scheduler) is EulerAncestralDiscreteScheduler and config.timestep_spacing == "trailing"
        return "an ancestral sampler that begins at the last timestep, as in Turbo" if turbo else None

    def _embed(self, prompts: list[str]) -> Condition:
        told = (prompts, self.pipe.text_encoder.device, 1, False)
        # One of the pipelines has no public name for it.
        tokens = self.pipe._encode_prompt(*told) if self.edits else self.pipe.encode_prompt(*told)[0]
        return Condition(tokens=tokens)

    def channels(self, hidden: Tensor, masks: Tensor) -> Tensor:
        return torch.cat([interpolate(masks.to(hidden), hidden.shape[2:]), hidden], dim=1)

    def confine_words(self) -> Callable[[], None]:
        """From now on words act where the model paints, and nowhere else; gives a function that undoes it.

        What each layer adds that attends to words is 0 outside of the mask, whoever calls the network.
        """
        cross = re.compile(str(self.STRUCTURE.cross))
        layers = [module for name, module in self.denoiser.named_modules() if cross.fullmatch(name)]
        return confined(self.denoiser, layers, self.latent_channels)

    def check_sets(self) -> None:
        """Refuse a model that draws no sets.

        Raises:
            UserError: it does not paint into pictures.
        """
        if not self.paints and self.coupling is None:
            raise UserError(_sets.not_painting(self))

    def couple(self) -> Coupling:
        """From now on this model, which paints, draws sets: a picture that is painted whole beside others, its
        references, of which nothing is painted; all read one another in self-attention.

        It :attr:`reads` any number of pictures then, and none is as well. What paints into a picture is what it was
        trained for; `uncouple` undoes it. Errors are those of `check_sets`.
        """
        if self.coupling is None:
            self.check_sets()
            itself = [re.compile(pattern) for pattern in self.STRUCTURE.attention]
            layers = [m for name, m in self.denoiser.named_modules() if any(one.fullmatch(name) for one in itself)]
            self.coupling, self.reads = Coupling(layers), _sets.READS
        return self.coupling

    def uncouple(self) -> None:
        """Paint into single pictures again."""
        if self.coupling is not None:
            self.coupling.undo()
            self.coupling, self.reads = None, _PAINTS

    def painted_whole(self, shape: Sequence[int]) -> Tensor:
        """The channels [1, k, h, w] beside noisy latents [c, h, w] of a picture that is painted whole."""
        height, width = (self.downsample * side for side in shape[-2:])
        hidden = self.encode(torch.zeros(1, 3, height, width, device=self.device), sample=False)
        return self.channels(hidden, torch.ones(1, 1, height, width, device=self.device))

    @property
    def edits(self) -> bool:
        """Whether it reads a picture without a mask."""
        return self.reads == _EDITS

    def guidance(self, scale: float) -> Guidance:
        if not self.edits or scale == 1.0:
            return super().guidance(scale)
        if scale < 1.0:
            raise UserError(f"'{self.source}' is guided by scales above 1, not by {scale:g}: set 1 for none")
        return EditCFG(scale=scale)

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        if not isinstance(guidance, EditCFG):
            return super()._stock(guidance, requests)
        scales = {"guidance_scale": guidance.scale, "image_guidance_scale": guidance.image_scale}
        negatives = [request.negative for request in requests]
        return {**scales, "negative_prompt": negatives if any(negatives) else None}

    def read(
        self,
        requests: Sequence[Request],
        *,
        negative: bool = False,
        size: tuple[int, int] | None = None,
        generator: Generators = None,
    ) -> Condition:
        if self.coupling is not None:
            raise UserError(
                f"'{self.source}' draws sets of pictures, which its stock pipeline does alone: leave out what steps "
                "through its samples by itself (search, guidance)"
            )
        return super().read(requests, negative=negative, size=size, generator=generator)

    def _draw_guided(
        self, requests: Sequence[Request], size: tuple[int, int], steps: int, guidance: Guidance
    ) -> np.ndarray:
        if self.coupling is None:
            return super()._draw_guided(requests, size, steps, guidance)
        members, sizes = _sets.members(requests, size)
        with self.coupling.of(sizes):
            drawn = super()._draw_guided(members, size, steps, guidance)
        return drawn[_sets.firsts(sizes)]

    def _stock_reading(self, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Any]:
        shown = [picture.convert("RGB") for request in requests for picture in request.pictures]
        if self.edits:
            # One of the two pipelines takes no size, and draws in that of the picture.
            return {"image": [self.pipe.image_processor.resize(picture, *size) for picture in shown]}
        if not self.reads.mask and self.coupling is None:
            return {}
        # At another strength, such as the pipeline of SDXL has by default, it would start from the picture itself.
        return {"image": shown, "mask_image": [request.mask for request in requests], "strength": 1.0}

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.denoiser(
            self._widened(x_t, cond) if self.reads.channels else x_t,
            t,
            encoder_hidden_states=cond.tokens,
            timestep_cond=self._told_scale(x_t, cond),
            added_cond_kwargs=self._added(x_t, cond) or None,
            return_dict=False,
        )[0]

    def _told_scale(self, x_t: Tensor, cond: Condition) -> Tensor | None:
        """Sines of the guidance [b, d] that a network with guidance inside is told; 1 unless the condition says."""
        if not self.embedded:
            return None
        told = cond.extra.get("guidance", torch.ones(len(x_t)))
        return sines(self.denoiser, told).to(x_t)

    def _embed_guidance(self) -> dict[str, nn.Module]:
        time = self.denoiser.time_embedding
        time.cond_proj = nn.Linear(_SINES, time.linear_1.in_features, bias=False)
        nn.init.zeros_(time.cond_proj.weight)
        self.denoiser.register_to_config(time_cond_proj_dim=_SINES)
        return {f"{self.DENOISERS[0]}.time_embedding.cond_proj": time.cond_proj}

    def _drop_guidance(self) -> None:
        self.denoiser.time_embedding.cond_proj = None
        self.denoiser.register_to_config(time_cond_proj_dim=None)

    def _added(self, x_t: Tensor, cond: Condition) -> dict[str, Tensor]:
        """The UNet's conditioning beside the tokens."""
        return {}

    def training(self) -> AbstractContextManager[Any]:
        """On a CPU in bfloat16, attention over few tokens as plain products, which fused kernels only match on GPUs.

        With 256 tokens a step of pocket-sd takes 0.7 of the time; memory grows with the square of their number.
        """
        few = (self.resolution // self.downsample) ** 2 <= _FEW_TOKENS
        slow = self.device.type == "cpu" and self.precision == torch.bfloat16
        return _plain_attention(self.denoiser) if few and slow else nullcontext()


@contextmanager
def _plain_attention(denoiser: Any) -> Iterator[None]:
    before = dict(denoiser.attn_processors)
    denoiser.set_attn_processor({n: AttnProcessor() if type(p) is AttnProcessor2_0 else p for n, p in before.items()})
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)
