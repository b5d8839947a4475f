"""A DreamBooth run as diffusers' examples make it, of diffusers' and PEFT's public pieces in the examples' order.

    python benchmarks/speed/dreambooth.py FAMILY MODEL PICTURES OUT STEPS LAYERS.json

What the examples do once is done once: prompts and pictures are encoded before the first step, as by their options
``--cache_latents`` and a single instance prompt. Left out is what serves several processes, logging and validation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from torch import Tensor

PROMPT = "a photo of a red circle"
RANK, BATCH, RATE = 8, 2, 1e-4
Predict = Callable[[Tensor, Tensor], Tensor]


def lora(layers: list[str]) -> LoraConfig:
    """The configuration of the examples."""
    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers)


def read(folder: Path) -> Tensor:
    """All pictures of a folder, [n, 3, h, w] in [-1, 1]."""
    pictures = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def sd3(pipe: Any) -> Predict:
    """The prediction of `train_dreambooth_lora_sd3.py` for noisy latents and times of 0 to 1000."""
    tokens, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    tokens, pooled = tokens.expand(BATCH, -1, -1), pooled.expand(BATCH, -1)
    return lambda x, t: pipe.transformer(x, tokens, pooled, t, return_dict=False)[0]


@torch.no_grad()
def flux(pipe: Any) -> Predict:
    """That of `train_dreambooth_lora_flux.py`."""
    tokens, pooled, text_ids = pipe.encode_prompt(PROMPT, max_sequence_length=77)
    tokens, pooled = tokens.expand(BATCH, -1, -1), pooled.expand(BATCH, -1)
    scale = pipe.vae_scale_factor

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        places = pipe._prepare_latent_image_ids(rows, height // 2, width // 2, x.device, x.dtype)
        packed = pipe.transformer(
            pipe._pack_latents(x, *x.shape),
            tokens,
            pooled,
            t / 1000,
            places,
            text_ids,
            guidance=torch.ones(rows) if pipe.transformer.config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)

    return predict


@torch.no_grad()
def qwen_image(pipe: Any) -> Predict:
    """That of `train_dreambooth_lora_qwen_image.py`."""
    tokens, mask = pipe.encode_prompt(PROMPT)
    tokens, mask = tokens.expand(BATCH, -1, -1), None if mask is None else mask.expand(BATCH, -1)
    scale = pipe.vae_scale_factor

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        packed = pipe.transformer(
            pipe._pack_latents(x, *x.shape),
            tokens,
            mask,
            t / 1000,
            [[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)[:, :, 0]

    return predict


def encoded(pipe: Any, pictures: Tensor) -> list[Any]:
    """The posterior of each picture's latents."""
    clips = pictures if getattr(pipe.vae.config, "latents_mean", None) is None else pictures[:, :, None]
    with torch.no_grad():
        return [pipe.vae.encode(picture[None]).latent_dist for picture in clips]


def scaled(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as the transformer sees them."""
    config = pipe.vae.config
    if getattr(config, "latents_mean", None) is None:
        return (latents - config.shift_factor) * config.scaling_factor
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return ((latents - mean) / std)[:, :, 0]


def stepper(family: str, pipe: Any, pictures: Path, config: Any) -> Callable[[int], Tensor]:
    """One training step, of a number; the loss it gives."""
    transformer = pipe.transformer.requires_grad_(False).train()
    predict: Predict = globals()[family](pipe)
    inject_adapter_in_model(config, transformer)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    cached = encoded(pipe, read(pictures))
    times = torch.linspace(1, 1000, 1000).flip(0)

    def step(number: int) -> Tensor:
        rows = [cached[(number * BATCH + i) % len(cached)] for i in range(BATCH)]
        x_0 = scaled(pipe, torch.cat([row.sample() for row in rows]))
        noise = torch.randn_like(x_0)
        u = compute_density_for_timestep_sampling("logit_normal", BATCH, logit_mean=0.0, logit_std=1.0)
        t = times[(u * 1000).long()]
        sigma = (t / 1000).view(-1, 1, 1, 1)
        predicted = predict((1 - sigma) * x_0 + sigma * noise, t)
        weight = compute_loss_weighting_for_sd3("logit_normal", sigma)
        loss = (weight * (predicted - (noise - x_0)) ** 2).reshape(BATCH, -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main() -> None:
    """A whole run: load, encode, train, save."""
    family, model, pictures, out, steps, layers = sys.argv[1:]
    pipe = DiffusionPipeline.from_pretrained(model)
    step = stepper(family, pipe, Path(pictures), lora(json.loads(Path(layers).read_text())))
    for number in range(int(steps)):
        step(number)
    type(pipe).save_lora_weights(out, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))


if __name__ == "__main__":
    main()
