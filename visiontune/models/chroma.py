"""Chroma (lodestones, 2025): FLUX.1's blocks on packed latents without its CLIP and without guidance inside.

A T5 reads the prompt, and of its padding one token counts; what is behind it is cut off, since tokens of the prompt
have no place. Three faults of diffusers are made good: its pipeline's mask is one of numbers, which attention adds to
its scores instead of leaving anything out; under gradient checkpointing single blocks get no mask at all; and the time
is rounded to the type of the weights, of which bfloat16 makes 876 of 875.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from visiontune.core import Condition
from visiontune.models._text import default_of, ragged
from visiontune.models._time import exact_time
from visiontune.models.base import require_text_to_image
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.flux import Flux
from visiontune.models.words import Reader

_PATCH = 2


class Chroma(DiffusionModel):
    """`ChromaPipeline`; its Condition has `tokens` and `mask`."""

    family = "chroma"
    pipeline_classes = ("ChromaPipeline",)
    DENOISERS = ("transformer",)
    FLOW = True
    EVENLY = True
    TARGETS = Flux.TARGETS

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        channels = self.latent_channels * _PATCH**2
        plain = config.in_channels == pipe.transformer.out_channels == channels
        require_text_to_image(plain, self.source, config.in_channels)
        self._tokens = int(default_of(type(pipe), "max_sequence_length"))
        self.reader = Reader(pipe.tokenizer, self._tokens)
        self.unit = max(self.unit, self.downsample * _PATCH)
        self.resolution = self.downsample * int(pipe.default_sample_size)
        pipe.transformer.set_attn_processor(_MaskedKeys())
        # It says that it loads adapters of its text encoder too, and then looks for the layers of a CLIP.
        pipe._lora_loadable_modules = ["transformer"]

    def mu(self, shape: Sequence[int], steps: int | None = None) -> float:
        return self._mu_of_patches(shape, _PATCH)

    def _embed(self, prompts: list[str]) -> Condition:
        tokens, _, mask, *_ = self.pipe.encode_prompt(
            prompts,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
        )
        return ragged(row[kept] for row, kept in zip(tokens, mask.bool(), strict=True))

    def _predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        rows, (height, width) = len(x_t), (side // _PATCH for side in x_t.shape[-2:])
        text = None if cond.mask is None or cond.mask.all() else cond.mask
        mask = self.pipe._prepare_attention_mask(rows, height * width, x_t.dtype, text)
        level = t.float() / self.schedule.num_train_timesteps
        with (
            _mask_in_single_blocks(self.denoiser, mask),
            exact_time(self.denoiser.time_text_embed.time_proj, level * 1000),
        ):
            packed = self.denoiser(
                hidden_states=self._stock_latents(x_t),
                timestep=level,
                encoder_hidden_states=cond.tokens,
                txt_ids=x_t.new_zeros(cond.tokens.shape[1], 3),
                img_ids=self.pipe._prepare_latent_image_ids(rows, height, width, x_t.device, x_t.dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        sides = (side * self.downsample for side in x_t.shape[-2:])
        return self.pipe._unpack_latents(packed, *sides, self.downsample)

    def _stock_latents(self, noise: Tensor) -> Tensor:
        return self.pipe._pack_latents(noise, *noise.shape)


class _MaskedKeys(FluxAttnProcessor):
    """Attention to the keys that count. Blocks give it [b, 1, n, n], 1 or True between two tokens that both count."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        # The last token is one of the picture, which all count; a row that attends to nothing may give NaN.
        keys = None if attention_mask is None else attention_mask[:, :, -1:].bool()
        return super().__call__(attn, hidden_states, encoder_hidden_states, keys, image_rotary_emb)


@contextmanager
def _mask_in_single_blocks(denoiser: Any, mask: Tensor | None) -> Iterator[None]:
    """In the block, gradient checkpointing hands single blocks the mask [b, n] too."""
    plain = denoiser._gradient_checkpointing_func

    def masked(block: nn.Module, *given: Any) -> Any:
        single = isinstance(block, ChromaSingleTransformerBlock)
        return plain(block, *((*given[:3], mask) if single else given))

    denoiser._gradient_checkpointing_func = masked
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = plain
