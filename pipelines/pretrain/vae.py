"""Train the VAE of pocket-sd: 64x64 RGB to 16x16 latents of 4 channels.

    python pipelines/pretrain/vae.py --out runs/pretrain/vae

Run it again to go on after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from visiontune.pocket.scenes import codec_scene
from visiontune.pocket.world import render
from visiontune.training.pretrain import fit, images_to_tensor


def build() -> AutoencoderKL:
    """A 1.5 M parameter AutoencoderKL without attention, so that it also codes other sizes well."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def batch(seed: int, size: int) -> torch.Tensor:
    """Fresh codec scenes, ``[size, 3, 64, 64]`` in [-1, 1]."""
    rng = np.random.default_rng([20, seed])
    return images_to_tensor([render(codec_scene(rng)) for _ in range(size)])


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite differences along both axes."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def emphasis(x: torch.Tensor) -> torch.Tensor:
    """Weight ``[b, 1, h, w]`` of each pixel: 4 on and within 2 pixels of saturated objects, 1 on the grey ground.

    Small objects cover a few per cent of a scene but are all that anybody looks at.
    """
    chroma = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    return 1 + 3 * nn.functional.max_pool2d((chroma > 0.3).float(), 5, stride=1, padding=2)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over the batch."""
    return float((10 * torch.log10(4 / (a - b).pow(2).mean((1, 2, 3)))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/vae"))
    parser.add_argument("--init", type=Path, help="start from the weights of this VAE folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = build()
    if args.init:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.init).state_dict())
    held = batch(10**9, 64)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        x = batch(step, args.batch)
        noise = torch.randn(args.batch, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        y, mean, logvar = y.float(), posterior.mean.float(), posterior.logvar.float()
        weight, error = emphasis(x), y - x
        pixel = (weight * (error.abs() + 4 * error.pow(2))).mean()
        edge = sum(
            (w * e.abs()).mean() for w, e in zip((weight[..., 1:, :], weight[..., 1:]), edges(error), strict=True)
        )
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
        return {"loss": pixel + 0.5 * edge + 5e-5 * kl, "pixel": pixel, "edge": edge, "kl": kl}

    @torch.no_grad()
    def probe(model: torch.nn.Module, step: int) -> None:
        z = model.encode(held).latent_dist.mean
        y = model.decode(z).sample.clamp(-1, 1)
        print(f"step {step}: held-out PSNR {psnr(y, held):.2f} dB, latent std {float(z.std()):.3f}", flush=True)
        pairs = torch.cat([held[:8], y[:8], held[8:16], y[8:16]])
        grid = pairs.view(4, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(256, 512, 3)
        Image.fromarray(((grid + 1) * 127.5).round().byte().numpy()).save(args.out / "pairs.png")
        vae_copy = build()
        vae_copy.load_state_dict(model.state_dict())
        vae_copy.register_to_config(scaling_factor=1 / float(z.std()))
        vae_copy.save_pretrained(args.out / "model")

    fit(vae, loss_at, steps=args.steps, lr=args.lr, folder=args.out, ema=0.995, probe=probe)


if __name__ == "__main__":
    main()
