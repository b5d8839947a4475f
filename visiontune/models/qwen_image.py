"""Qwen-Image (Wu et al., 2025, arXiv 2508.02324): double blocks on packed latents, read by a Qwen2.5-VL.

The VAE is one of clips, of which a picture is the first frame. Its pipeline guides in a second call and then gives
every patch the length that it had before.

The pipelines that edit show pictures twice: the Qwen2.5-VL reads them with the prompt, and their latents are further
patches behind the noisy ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL.Image import new as new_picture
from torch import Tensor

from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, Guidance, PatchLengthCFG
from visiontune.errors import UserError
from visiontune.models._frames import OneFrame
from visiontune.models._reading import Reads, stacked
from visiontune.models._text import DECODER
from visiontune.models._time import exact_time
from visiontune.models.base import Presets, require_text_to_image
from visiontune.models.words import Reader, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

_PATCH = 2
_TOKENS = 512
_EDITED = 1024 * 1024  # pixels to which the pipeline that reads one picture brings it
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_READS = {"QwenImageEditPipeline": Reads(least=1, most=1), "QwenImageEditPlusPipeline": Reads(least=1, most=None)}


class QwenImage(OneFrame):
    """`QwenImagePipeline`, and with pictures `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`.

    Its Condition has `tokens` and `mask`, and `references` where it edits.
    """

    family = "qwen_image"
    pipeline_classes = ("QwenImagePipeline", *_READS)
    WORDS_SEE = True
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    TARGETS: ClassVar[Mapping[str, Presets]] = {
        "denoiser": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, "net.0.proj", "net.2"),
            "conv": (),
            "all": ("Linear",),
        },
        "text": DECODER,
    }

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        plain = config.in_channels == self.latent_channels * _PATCH**2 and not config.guidance_embeds
        require_text_to_image(plain, self.source, config.in_channels)
        self.reads = _READS.get(type(pipe).__name__, self.reads)
        self.several = self.reads.most is None
        if not self.reads.pictures:  # beside pictures a prompt of any length is read
            # What stands after the prompt in the template counts, what stands before it is dropped.
            after = pipe.tokenizer(pipe.prompt_template_encode.partition("{}")[2])["input_ids"]
            self.reader = Reader(pipe.tokenizer, _TOKENS - len(after))
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = self.downsample * int(pipe.default_sample_size)

    def idle(self) -> tuple[str, ...]:
        last = f"transformer.transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        return tuple(
            f"{last}.{own}" for own in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        )

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    # -- prompts and guidance -----------------------------------------------------------------------------------

    def guidance(self, scale: float) -> Guidance:
        return NO_GUIDANCE if scale == 1.0 else PatchLengthCFG(scale=scale, patch=_PATCH)

    def _embed(self, prompts: list[str]) -> Condition:
        if self.reads.pictures:
            raise UserError(f"'{self.source}' reads a prompt beside its picture: make its conditions by read()")
        return self._told(prompts)

    def look_up(self, prompt: str) -> None:
        blank = (new_picture("RGB", (32, 32)),) * self.reads.least
        self.words([Request(prompt=prompt, pictures=blank)], negative=False)

    def _told(self, prompts: list[str], **shown: Any) -> Condition:
        device = self.pipe.text_encoder.device
        tokens, mask = self.pipe.encode_prompt(prompts, device=device, max_sequence_length=_TOKENS, **shown)
        # The pipeline leaves out a mask that masks nothing.
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return Condition(tokens=tokens, mask=mask)

    def _stock(self, guidance: Guidance, requests: Sequence[Request]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_sequence_length": _TOKENS, "true_cfg_scale": 1.0}
        if isinstance(guidance, CFG):
            negatives = [request.negative for request in requests]
            return {**options, "true_cfg_scale": guidance.scale, "negative_prompt": negatives}
        return options

    # -- pictures -----------------------------------------------------------------------------------------------

    def words(self, requests: Sequence[Request], negative: bool = False) -> Condition:
        if not self.reads.pictures:
            return super().words(requests, negative)
        texts = [request.negative if negative else request.prompt for request in requests]
        self.reader.say(texts)
        parts = []
        with self.autocast(), quiet():
            for text, request in zip(texts, requests, strict=True):
                seen = [self._seen(picture.convert("RGB")) for picture in request.pictures]
                parts.append(self._told([text], image=seen))
        return Condition.cat(parts).to(self.device)

    def _seen(self, picture: Image) -> Any:
        """A picture of the size at which the text encoder gets it."""
        if self.several:
            width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, _ratio(picture))
        else:
            height, width = self._sides(picture)
        return self.pipe.image_processor.resize(picture, height, width)

    def _sides(self, picture: Image) -> tuple[int, int]:
        """Height and width to which the VAE's pictures are brought."""
        if self.several:
            width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, _ratio(picture))
        else:
            width, height, _ = edit.calculate_dimensions(_EDITED, _ratio(picture))
        return height, width

    def _fitted(self, picture: Image) -> Tensor:
        return self.pipe.image_processor.preprocess(picture, *self._sides(picture))

    def _stock_reading(self, requests: Sequence[Request], size: tuple[int, int]) -> dict[str, Any]:
        if not self.reads.pictures:
            return {}
        shown = [picture.convert("RGB") for request in requests for picture in request.pictures]
        return {"image": shown if self.several else shown[0]}

    # -- the denoiser -------------------------------------------------------------------------------------------

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, channels, height, width = x_t.shape
        time = t.float() / self.schedule.num_train_timesteps
        # Checkpoints of 2511 tell references that they are clean.
        told = torch.cat([time, torch.zeros_like(time)]) if self.denoiser.config.zero_cond_t else time
        seen = [x_t, *stacked(cond)]
        with exact_time(self.denoiser.time_text_embed.time_proj, told):  # which multiplies by 1000 itself
            packed = self.denoiser(
                hidden_states=torch.cat([self._stock_latents(one) for one in seen], dim=1),
                timestep=time,
                encoder_hidden_states=cond.tokens,
                encoder_hidden_states_mask=None if cond.mask is None or cond.mask.all() else cond.mask,
                img_shapes=[[(1, *(side // _PATCH for side in one.shape[-2:])) for one in seen]] * rows,
                return_dict=False,
            )[0]
        sides = (side * self.downsample for side in (height, width))
        noisy = packed[:, : height * width // _PATCH**2]
        return self.pipe._unpack_latents(noisy, *sides, self.downsample).view(rows, channels, height, width)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)


def _ratio(picture: Image) -> float:
    return picture.width / picture.height
