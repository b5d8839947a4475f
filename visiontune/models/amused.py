"""aMUSEd (Patil et al., 2024, arXiv 2401.01808): a picture is a grid of tokens of a VQ-GAN, which a U-ViT fills in.

Muse (Chang et al., 2023, arXiv 2301.00704) made small: a transformer between convolutions sees a grid of tokens, of
which some are masked, and gives the distribution of each; sampling starts from nothing but masks and keeps what it is
most sure of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.models._structure import Structure
from visiontune.models.base import dtype_of, require
from visiontune.models.masked import MaskedModel
from visiontune.models.sd import StableDiffusion

_AESTHETIC_SCORE = 6.0


class Amused(MaskedModel):
    """`AmusedPipeline`; its Condition has `tokens` and `pooled`.

    `extra["micro_conds"]` [b, 5] may give each row's width and height in pixels, the crop's corner and an aesthetic
    score; without it a row counts as uncropped, in the grid's size, with the stock pipeline's score of 6.
    """

    family = "amused"
    pipeline_classes = ("AmusedPipeline",)
    DENOISERS = ("transformer",)
    CODEC = "vqvae"
    STRUCTURE = Structure(
        sides="negative first",
        noisy="input_ids",
        time=None,
        blocks={r"transformer_layers\.\d+": ("hidden_states",)},
        attention={r"transformer_layers\.\d+\.attn1": "none"},
    )
    # The U-ViT names its layers as Stable Diffusion's UNet does, and the text encoder is a CLIP too.
    TARGETS = StableDiffusion.TARGETS

    def __init__(self, pipe: Any, source: str = "") -> None:
        super().__init__(pipe, source)
        config = pipe.transformer.config
        self.vocabulary, self.mask_token = int(config.codebook_size), int(pipe.scheduler.config.mask_token_id)
        self.resolution = self.downsample * int(config.sample_size)
        codes = int(self.vae.config.num_vq_embeddings)
        fits = self.vocabulary <= min(codes, self.mask_token) and self.mask_token < int(config.vocab_size)
        require(fits, self.source, "the vocabularies of its transformer, VQ model and scheduler do not fit each other")
        # diffusers 0.42 says that it has, and then calls its layers in a way that they do not take.
        pipe.transformer._supports_gradient_checkpointing = False

    def _embed(self, prompts: list[str]) -> Condition:
        encoder = self.pipe.text_encoder
        ids = self.pipe.tokenizer(
            prompts, return_tensors="pt", padding="max_length", truncation=True, max_length=self.reader.limit
        ).input_ids
        found = encoder(ids.to(encoder.device), return_dict=True, output_hidden_states=True)
        return Condition(tokens=found.hidden_states[-2], pooled=found.text_embeds)

    def _logits(self, tokens: Tensor, cond: Condition) -> Tensor:
        if cond.pooled is None:
            raise ValueError("aMUSEd needs the pooled text vector: make the Condition with embed()")
        micro = cond.extra.get("micro_conds")
        if micro is None:
            height, width = (side * self.downsample for side in tokens.shape[-2:])
            micro = torch.tensor([width, height, 0, 0, _AESTHETIC_SCORE]).expand(len(tokens), -1)
        found = self.denoiser(
            tokens,
            encoder_hidden_states=cond.tokens,
            pooled_text_emb=cond.pooled,
            micro_conds=micro.to(tokens.device, self.dtype),
        )
        return found.permute(0, 2, 3, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        vae = self._codec()
        shape = (*tokens.shape, int(vae.config.latent_channels))
        with self.autocast():
            shown = vae.decode(tokens.to(self.device), force_not_quantize=True, shape=shape).sample
        return shown.to(torch.promote_types(dtype_of(vae), torch.float32)) * 2 - 1

    def stepper(self, steps: int, temperature: tuple[float, float]) -> Any:
        stock = self.sampler("model")
        stock.set_timesteps(steps, temperature, self.device)
        return stock
