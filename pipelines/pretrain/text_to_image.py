"""Train the text encoder and the UNet of pocket-sd together, from nothing, on latents of the pocket world.

    python pipelines/pretrain/text_to_image.py --vae runs/pretrain/vae/model --out runs/pretrain/sd

The latents of ``--scenes`` scenes are computed once; captions are drawn afresh each time a scene is used and never
from the held-out tenth. Run it again to go on after an interruption. The finished pipeline lands in ``<out>/model``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from PIL import Image
from pocket_tokenizer import MAX_LENGTH, build_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from visiontune.data.oracle import matches
from visiontune.data.pocket_world import Scene, caption, held_out, render, sample_scene, stream
from visiontune.training.pretrain import fit, images_to_tensor

KINDS = {"one": 0.25, "two": 0.55, "many": 0.12, "three": 0.08}
DROPOUT = 0.1
SNR_GAMMA = 5.0


def build(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, UNet2DConditionModel, DDIMScheduler]:
    """A 0.9 M parameter CLIP text encoder, a 6.6 M parameter UNet, and Stable Diffusion's noise schedule."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return text, unet, scheduler


@torch.no_grad()
def latents_of(scenes: list[Scene], vae: AutoencoderKL) -> torch.Tensor:
    """Scaled posterior means ``[n, 4, 16, 16]`` in bf16."""
    parts = []
    for i in tqdm(range(0, len(scenes), 64), desc="latents", mininterval=10):
        pixels = images_to_tensor([render(s) for s in scenes[i : i + 64]])
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean
        parts.append((mean.float() * vae.config.scaling_factor).bfloat16())
    return torch.cat(parts)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption outside the held-out tenth, or the empty one for classifier-free guidance."""
    if rng.random() < DROPOUT:
        return ""
    while held_out(text := caption(scene, rng)):
        pass
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("runs/pretrain/vae/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/sd"))
    parser.add_argument("--scenes", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--probe-every", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    text, unet, scheduler = build(tokenizer)
    # On a CPU the fused attention's backward is the slower one for sequences as short as these (1.4 x a step).
    text.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    rng = np.random.default_rng(31)
    scenes = [sample_scene(rng, str(rng.choice(list(KINDS), p=list(KINDS.values())))) for _ in range(args.scenes)]
    file = args.out / "latents.pt"
    if not file.exists():
        torch.save(latents_of(scenes, vae), file)
    latents = torch.load(file, weights_only=True)
    model = nn.ModuleDict({"text": text, "unet": unet})

    def tokens(prompts: list[str]) -> torch.Tensor:
        return tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([32, step]), torch.Generator().manual_seed(step)
        rows = draw.integers(len(scenes), size=args.batch)
        x_0 = latents[rows].float()
        ids = tokens([training_caption(scenes[i], draw) for i in rows])
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(1000, (args.batch,), generator=generator)
        x_t = scheduler.add_noise(x_0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = text(ids).last_hidden_state
            prediction = unet(x_t, t, hidden).sample
        error = (prediction.float() - eps).pow(2).mean((1, 2, 3))
        snr = compute_snr(scheduler, t)
        return {"loss": (error * snr.clamp(max=SNR_GAMMA) / snr).mean(), "mse": error.mean()}

    def pipeline(averaged: nn.Module) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae, text_encoder=averaged["text"], tokenizer=tokenizer, unet=averaged["unet"], scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def probe(averaged: nn.Module, step: int) -> None:
        pipe = pipeline(averaged)
        if step % args.probe_every and step != args.steps:
            return
        pipe.save_pretrained(args.out / "model")
        pipe.set_progress_bar_config(disable=True)
        pictures, verdict = [], {}
        for kind in ("one", "two"):
            pairs = stream(77, kind, holdout=True)
            prompts = [next(pairs)[1] for _ in range(40)]
            generator = torch.Generator().manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                images = pipe(prompts, num_inference_steps=25, guidance_scale=4.0, height=64, width=64,
                              generator=generator, output_type="np").images  # fmt: skip
            arrays = (images * 255).round().astype(np.uint8)
            verdict[kind] = float(np.mean([matches(a, p) for a, p in zip(arrays, prompts, strict=True)]))
            pictures.append(np.concatenate([np.concatenate(arrays[i : i + 10], 1) for i in range(0, 40, 10)]))
        print(f"step {step}: prompt accuracy {verdict}", flush=True)
        Image.fromarray(np.concatenate(pictures)).save(args.out / f"samples-{step:05d}.png")

    fit(model, loss_at, steps=args.steps, lr=args.lr, folder=args.out, warmup=300, ema=0.999, probe=probe)
    tokenizer.backend_tokenizer.model.save(str(args.out / "model" / "tokenizer"))


if __name__ == "__main__":
    main()
