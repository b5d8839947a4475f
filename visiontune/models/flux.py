"""FLUX.1 (Black Forest Labs, 2024): a transformer of double and single blocks that predicts flow on patches of latents.

A CLIP gives one vector for the prompt and a T5 its tokens; nothing is masked, so that the padding is attended to as in
the stock pipeline. The `dev` models carry guidance inside: the network is told its scale. Denoising is trained at scale
1, where what it predicts is what it was distilled from without guidance.

Kontext reads a picture as further patches, which stand behind the noisy ones and have places of their own; Fill paints
into one, whose latents and mask are further channels of every patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, Guidance
from visiontune.models._reading import Reads, stacked
from visiontune.models._structure import Arguments, Structure, pooled, thousandths
from visiontune.models._text import CLIP_AND_T5, default_of
from visiontune.models._time import exact_time
from visiontune.models.base import Presets, require, require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.words import Reader

if TYPE_CHECKING:
    from PIL.Image import Image

_PATCH = 2
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# Of the double blocks, and of the single ones, whose last layer is attention's too.
_FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", "proj_out")
_READS = {
    "FluxKontextPipeline": Reads(most=1),
    "FluxFillPipeline": Reads(least=1, most=1, mask=True, channels=True),
}


def _grid(arguments: Arguments, noisy: str) -> tuple[int, int]:
    """Height and width in patches, whose places [n, 3] the network is told."""
    height, width = (int(side) + 1 for side in arguments["img_ids"][:, 1:].amax(0))
    return height, width


def _unpacked(x: Tensor, arguments: Arguments) -> Tensor:
    """Latents [b, c, h, w] of the tokens [b, n, 4 c] of 2 x 2 of them."""
    return pixel_shuffle(x.mT.unflatten(2, _grid(arguments, "")), 2)


def _tokens(x: Tensor, arguments: Arguments) -> Tensor:
    """Latents as tokens: `_unpacked` undone."""
    return pixel_unshuffle(x, 2).flatten(2).mT


def _told(arguments: Arguments) -> Condition:
    """The words, and the scale that a distilled network is told."""
    guidance = arguments.get("guidance")
    return replace(pooled(arguments), extra={} if guidance is None else {"guidance": guidance})


class Flux(DiffusionModel):
    """`FluxPipeline`, and with pictures `FluxKontextPipeline` and `FluxFillPipeline`.

    Its Condition has `tokens` and `pooled`, with guidance inside `extra["guidance"]`, of Kontext `references`, and of
    Fill `extra["channels"]`.
    """

    family = "flux"
    pipeline_classes = ("FluxPipeline", *_READS)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    STRUCTURE = Structure(
        sides="apart",
        time=thousandths,
        blocks={r"(single_)?transformer_blocks\.\d+": ("encoder_hidden_states", "hidden_states")},
        attention={r"(single_)?transformer_blocks\.\d+\.attn": "before"},
        tokenizers=("tokenizer_2",),
        grid=_grid,
        canonical=_unpacked,
        native=_tokens,
        condition=_told,
        pipelines=("FluxPipeline",),
    )
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
        self.reads = _READS.get(type(pipe).__name__, self.reads)
        config = pipe.transformer.config
        self.embedded = bool(config.guidance_embeds)
        given = self.latent_channels * _PATCH**2
        # Fill: the latents of the picture, and a channel for each pixel of the mask.
        more = given + (self.downsample * _PATCH) ** 2 if self.reads.mask else 0
        plain = (config.in_channels, pipe.transformer.out_channels) == (given + more, given)
        require_text_to_image(plain, self.source, config.in_channels)
        require(self.embedded or not self.reads.mask, self.source, "Fill carries its guidance inside, and it has none")
        self._t5_tokens = int(default_of(type(pipe), "max_sequence_length"))
        self.reader = Reader(pipe.tokenizer_2, self._t5_tokens)
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = int(self.vae.config.sample_size)

    def _few_steps(self) -> str | None:
        shifted = self.pipe.scheduler.config.get("use_dynamic_shifting")
        schnell = not self.pipe.transformer.config.guidance_embeds and not shifted
        return "neither guidance_embeds nor use_dynamic_shifting, as in schnell" if schnell else None

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder.device, max_sequence_length=self._t5_tokens
        )
        return Condition(tokens=tokens, pooled=pooled)

    # -- pictures -----------------------------------------------------------------------------------------------

    def _fitted(self, picture: Image) -> Tensor:
        """Of Kontext's sizes the one whose sides have the nearest ratio."""
        processor = self.pipe.image_processor
        height, width = processor.get_default_height_width(picture)
        sizes = kontext.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(width / height - w / h), w, h) for w, h in sizes)
        unit = self.downsample * _PATCH
        height, width = (side // unit * unit for side in (height, width))
        return processor.preprocess(picture, height, width)

    def channels(self, hidden: Tensor, masks: Tensor) -> Tensor:
        return torch.cat([hidden, pixel_unshuffle(masks.to(hidden), self.downsample)], dim=1)

    # -- a scale of guidance that the network is told -----------------------------------------------------------

    def _embed_guidance(self) -> dict[str, nn.Module]:
        """The embedding of FLUX.1 dev, whose last layer is zero."""
        was = self.denoiser.time_text_embed
        width, pooled = was.timestep_embedder.linear_2.out_features, was.text_embedder.linear_1.in_features
        with torch.random.fork_rng(devices=[]):
            # A file holds what was added to the first layer alone.
            torch.manual_seed(0)
            made = CombinedTimestepGuidanceTextProjEmbeddings(width, pooled)
        for name, part in was.named_children():
            setattr(made, name, part)
        for parameter in made.guidance_embedder.linear_2.parameters():
            nn.init.zeros_(parameter)
        self.denoiser.time_text_embed = made
        self.denoiser.register_to_config(guidance_embeds=True)
        place = f"{self.DENOISERS[0]}.time_text_embed.guidance_embedder"
        return {f"{place}.{name}": layer for name, layer in made.guidance_embedder.named_children() if name != "act"}

    def _drop_guidance(self) -> None:
        had = self.denoiser.time_text_embed
        made = CombinedTimestepTextProjEmbeddings(1, 1)
        for name, _ in made.named_children():
            setattr(made, name, getattr(had, name))
        self.denoiser.time_text_embed = made
        self.denoiser.register_to_config(guidance_embeds=False)

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("FLUX needs the pooled text vector: make the Condition with embed()")
        seen, places = self._patches(x_t, cond)
        told = cond.extra.get("guidance", x_t.new_ones(len(x_t), dtype=torch.float32)) if self.embedded else None
        time = t.float() / self.schedule.num_train_timesteps
        with exact_time(self.denoiser.time_text_embed.time_proj, time * 1000):
            packed = self.denoiser(
                hidden_states=seen,
                timestep=time,
                guidance=told,
                pooled_projections=cond.pooled,
                encoder_hidden_states=cond.tokens,
                txt_ids=x_t.new_zeros(cond.tokens.shape[1], 3),
                img_ids=places,
                return_dict=False,
            )[0]
        height, width = x_t.shape[-2:]
        noisy = packed[:, : height * width // _PATCH**2]
        return self.pipe._unpack_latents(noisy, height * self.downsample, width * self.downsample, self.downsample)

    def _patches(self, x_t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Patches [b, n, d] of the noisy latents, then of the references, and their places [n, 3]."""
        seen = [self._widened(x_t, cond) if self.reads.channels else x_t, *stacked(cond)]
        places = []
        for number, latents in enumerate(seen):
            height, width = (side // _PATCH for side in latents.shape[-2:])
            place = self.pipe._prepare_latent_image_ids(len(x_t), height, width, x_t.device, x_t.dtype)
            place[..., 0] = number
            places.append(place)
        return torch.cat([self._stock_latents(latents) for latents in seen], dim=1), torch.cat(places)

    # -- the stock pipeline -------------------------------------------------------------------------------------

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_sequence_length": self._t5_tokens, "guidance_scale": 1.0}
        if isinstance(guidance, CFG):
            return {
                **options,
                "true_cfg_scale": guidance.scale,
                "negative_prompt": [request.negative for request in requests],
            }
        return options | super()._stock(guidance, requests)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)

    def _stock_reading(self, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Any]:
        if not self.reads.pictures:
            return {}
        shown = {"image": [picture.convert("RGB") for request in requests for picture in request.pictures] or None}
        if self.reads.mask:
            return {**shown, "mask_image": [request.mask for request in requests]}
        # Without it Kontext's pipeline brings every size to a megapixel.
        return {**shown, "max_area": size[0] * size[1]}
