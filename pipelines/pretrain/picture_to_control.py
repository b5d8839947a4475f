"""Train the pocket controls: a T2I-Adapter for each map of `visiontune.pocket.controls`, with pocket-sd frozen.

    python pipelines/pretrain/picture_to_control.py --out runs/pretrain/control

Three captions of four are empty, so that a map has to say what the words do not. A quarter of the maps are black on one
side of a line, where the adapter shall learn to say nothing. Times are drawn towards noise, where places are decided
(Mou et al., 2023, arXiv 2302.08453, section 3.3).

Run it again to go on after an interruption. Each adapter lands in ``<out>/<map>/model``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionPipeline, T2IAdapter
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from text_to_image import KINDS, latents_of, training_caption, training_scenes
from torch import nn

from visiontune.models.pocket import folder
from visiontune.ops.pixels import to_tensor
from visiontune.pocket.controls import MAPS, followed
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import Scene, render
from visiontune.training.pretrain import fit

SEEDS = {"sketch": 51, "colors": 52}
UNTOLD = 0.75
PARTLY = 0.25
LEAST_SNR = 0.05
PROBED = 24


def build(unet: nn.Module) -> T2IAdapter:
    """An adapter of half a million parameters, with features where the UNet's two levels have theirs."""
    return T2IAdapter(in_channels=3, channels=list(unet.config.block_out_channels), downscale_factor=4)


def partly(maps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Maps ``[b, 3, h, w]`` of which a share is black on one side of a line through the picture."""
    side = torch.linspace(-1, 1, maps.shape[-1])
    angle = 2 * torch.pi * torch.rand(len(maps), 1, 1, generator=generator)
    offset = torch.rand(len(maps), 1, 1, generator=generator) - 0.5
    kept = angle.cos() * side + angle.sin() * side[:, None] > offset
    whole = torch.rand(len(maps), 1, 1, generator=generator) >= PARTLY
    return maps * (kept | whole)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/control"))
    parser.add_argument("--only", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--probe-every", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder("pocket/sd"), dtype=torch.float32)
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        network.requires_grad_(False)
    # On a CPU the fused attention's backward is the slower one for sequences as short as these.
    pipe.unet.set_attn_processor(AttnProcessor())
    scenes = training_scenes(args.scenes, KINDS, seed=50)
    file = args.out / "latents.pt"
    if not file.exists():
        torch.save(latents_of(scenes, pipe.vae), file)
    latents = torch.load(file, weights_only=True)
    for name in args.only:
        train(name, pipe, scenes, latents, args)


def train(
    name: str, pipe: StableDiffusionPipeline, scenes: list[Scene], latents: torch.Tensor, args: argparse.Namespace
) -> None:
    """Train the adapter of one map."""
    torch.manual_seed(SEEDS[name])
    adapter, out = build(pipe.unet), args.out / name
    maps = torch.from_numpy(np.stack([MAPS[name](render(scene)) for scene in scenes]))

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        seed = [SEEDS[name], step]
        draw, generator = np.random.default_rng(seed), torch.Generator().manual_seed(1000 * step + SEEDS[name])
        rows = draw.integers(len(scenes), size=args.batch)
        told = draw.random(args.batch) >= UNTOLD
        words = [training_caption(scenes[i], draw) if tell else "" for i, tell in zip(rows, told, strict=True)]
        x_0 = latents[rows].float()
        eps = torch.randn(x_0.shape, generator=generator)
        t = (1000 * torch.rand(args.batch, generator=generator).sqrt()).long()
        shown = partly(to_tensor(maps[rows].numpy()), generator)
        hidden, x_t = pipe.encode_prompt(words, "cpu", 1, False)[0], pipe.scheduler.add_noise(x_0, eps, t)
        found = pipe.unet(x_t, t, hidden, down_intrablock_additional_residuals=adapter(shown)).sample
        error = (found - eps).pow(2).mean((1, 2, 3))
        # As errors of clean latents, of which those at high noise would hardly count among errors of the noise.
        return {"loss": (error / (compute_snr(pipe.scheduler, t) + LEAST_SNR)).mean()}

    def probe(averaged: nn.Module, step: int) -> None:
        if step % args.probe_every and step != args.steps:
            return
        averaged.save_pretrained(out / "model")
        print(f"step {step}: followed {probed(name, pipe, averaged)}", flush=True)

    fit(adapter, loss_at, steps=args.steps, lr=args.lr, folder=out, warmup=100, ema=0.998, probe=probe)


def probed(name: str, pipe: StableDiffusionPipeline, adapter: nn.Module) -> dict[str, float]:
    """How far drawings without a prompt follow maps of scenes that were not trained on."""
    drawer = StableDiffusionAdapterPipeline(
        **{k: v for k, v in pipe.components.items() if k != "image_encoder"},
        adapter=adapter,
        requires_safety_checker=False,
    )
    drawer.set_progress_bar_config(disable=True)
    pairs = stream(53, holdout=True)
    scenes = [next(pairs)[0] for _ in range(PROBED)]
    maps = to_tensor(np.stack([MAPS[name](render(scene)) for scene in scenes]))
    options = {"num_inference_steps": 12, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "np"}
    found = drawer([""] * PROBED, image=maps, generator=torch.Generator().manual_seed(0), **options).images
    pictures = (found * 255).round().astype(np.uint8)
    hits = [followed(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {key: round(float(np.mean([hit[key] for hit in hits])), 3) for key in hits[0]}


if __name__ == "__main__":
    main()
