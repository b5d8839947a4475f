"""FLUX.2 (Black Forest Labs, 2025): `dev`, read by a Mistral, and `klein`, read by a Qwen3.

What the transformer sees are patches of 2 x 2 of the VAE's latents, each channel brought to mean 0 and deviation 1 by
the statistics that the VAE keeps; that is the order of its pipelines, and of no other family. Padding is attended to,
as the models were trained. `dev` carries guidance inside and trains at scale 1; `klein` is guided in a second call.
Both read pictures, any number of them, as further patches behind the noisy ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, Embedded, Guidance
from visiontune.errors import UserError
from visiontune.models._patches import PatchModel
from visiontune.models._reading import Reads, stacked
from visiontune.models._text import DECODER, chat_overhead
from visiontune.models._time import exact_time
from visiontune.models.base import Presets
from visiontune.models.words import Reader

if TYPE_CHECKING:
    from PIL.Image import Image

_TOKENS = 512
_MOST_PIXELS = 1024 * 1024  # of a picture that is read; larger ones are shrunk
# The number of steps at which its pipeline's shift is FLUX.1's, that of training.
_MANY_STEPS = 200
# Single blocks have one layer for queries, keys, values and the feed-forward, and one out of both.
_SINGLE = ("to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *_SINGLE)


class Flux2(PatchModel):
    """`Flux2Pipeline` and `Flux2KleinPipeline`; its Condition has `tokens`, of `dev` `extra["guidance"]`, and
    `references` where pictures are read."""

    family = "flux2"
    pipeline_classes = ("Flux2Pipeline", "Flux2KleinPipeline")
    reads = Reads(most=None)
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "linear_in", "linear_out"),
            "conv": (),
            "all": ("Linear",),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        self.embedded = bool(pipe.transformer.config.guidance_embeds)
        own = {"system": pipe.system_message} if self.embedded else {"enable_thinking": False}
        self.reader = Reader(self.reader.tokenizer, _TOKENS - chat_overhead(pipe.tokenizer, **own))

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return compute_empirical_mu(shape[-2] * shape[-1], _MANY_STEPS if steps is None else steps)

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def guidance(self, scale: float) -> Guidance:
        if self.pipe.config.get("is_distilled"):
            # Its pipeline guides away from nothing, whatever the scale.
            return Embedded(scale=1.0)
        return super().guidance(scale)

    def _embed(self, prompts: list[str]) -> Condition:
        device = self.pipe.text_encoder.device
        return Condition(tokens=self.pipe.encode_prompt(prompts, device, max_sequence_length=_TOKENS)[0])

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options = {"max_sequence_length": _TOKENS, **super()._stock(guidance, requests)}
        negatives = options.pop("negative_prompt", None)
        if isinstance(guidance, CFG) and negatives:
            # Its pipeline takes no words to guide away from.
            options["negative_prompt_embeds"] = self.embed(negatives).tokens
        return options

    # -- pictures -----------------------------------------------------------------------------------------------

    def _fitted(self, picture: Image) -> Tensor:
        """Shrunk to a megapixel where it has more, and cut out of the middle to whole patches."""
        processor = self.pipe.image_processor
        try:
            processor.check_image_input(picture)
        except ValueError as error:
            raise UserError(f"'{self.source}' does not read the picture ({error}): give another") from error
        if picture.width * picture.height > _MOST_PIXELS:
            picture = processor._resize_to_target_area(picture, _MOST_PIXELS)
        height, width = (side // self.downsample * self.downsample for side in (picture.height, picture.width))
        return processor.preprocess(picture, height=height, width=width, resize_mode="crop")

    def _stock_reading(self, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Any]:
        return {"image": [picture.convert("RGB") for request in requests for picture in request.pictures] or None}

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, _, height, width = x_t.shape
        shown = stacked(cond)
        places = [self.pipe._prepare_latent_ids(x_t)]
        if shown:
            places.append(self.pipe._prepare_image_ids([one[:1] for one in shown]).expand(rows, -1, -1))
        told = cond.extra.get("guidance", x_t.new_ones(rows, dtype=torch.float32)) if self.embedded else None
        time = t.float() / self.schedule.num_train_timesteps
        with exact_time(self.denoiser.time_guidance_embed.time_proj, time * 1000):
            packed = self.denoiser(
                hidden_states=torch.cat([self.pipe._pack_latents(one) for one in (x_t, *shown)], dim=1),
                timestep=time,
                guidance=told,
                encoder_hidden_states=cond.tokens,
                txt_ids=self.pipe._prepare_text_ids(cond.tokens).to(x_t.device),
                img_ids=torch.cat(places, dim=1).to(x_t.device),
                return_dict=False,
            )[0]
        return packed[:, : height * width].mT.reshape(rows, -1, height, width)
