"""Train pocket-inpaint: pocket-sd with the channels of an inpainting model, on holes in scenes of the pocket world.

    python pipelines/pretrain/box_to_object.py --out runs/pretrain/inpaint

The UNet is trained alone, so that words mean what they mean to pocket-sd. Holes are boxes around an object, boxes
anywhere and, as pocket-sd has it, everything; the words tell the whole scene or the object in the box alone, and one
row in ten has none. Errors count as those of the clean latents (`instruction_to_edit.py`), those in the hole once more.

Run it again to go on after an interruption. The model lands in ``<out>/model``; ``benchmarks/pocket.py`` measures it
once it is shipped.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from instruction_to_edit import as_clean, holding
from PIL import Image
from text_to_image import latents_of
from torch import nn

from visiontune.core import Request
from visiontune.models import load
from visiontune.models.expand import expand_input
from visiontune.objectives.base import per_row
from visiontune.pocket.holes import Hole, filled, mask_of, stream
from visiontune.pocket.world import render
from visiontune.training.pretrain import fit

SEED, DROPPED = 91, 0.1
NEW_RATE = 5
PROBED = 40


def masks_of(holes: list[Hole]) -> torch.Tensor:
    """bool ``[n, 1, 64, 64]``."""
    return torch.from_numpy(np.stack([mask_of(hole.box) for hole in holes]))[:, None]


def latents(holes: list[Hole], vae: Any, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of whole pictures, and of what is left of them, kept in a file."""
    if not file.exists():
        scenes = [hole.scene for hole in holes]
        torch.save([latents_of(scenes, vae), latents_of(scenes, vae, masks_of(holes))], file)
    whole, left = torch.load(file, weights_only=True)
    return whole, left


@torch.no_grad()
def conditions(model: Any, prompts: list[str]) -> torch.Tensor:
    """Of all prompts, ``[n, tokens, width]``."""
    return torch.cat([model.embed(prompts[i : i + 256]).tokens for i in range(0, len(prompts), 256)])


def shown(hole: Hole) -> Request:
    """A hole as the stock pipeline is shown it."""
    picture, mask = Image.fromarray(render(hole.scene)), Image.fromarray(mask_of(hole.box))
    return Request(prompt=hole.prompt, pictures=(picture,), mask=mask.convert("L"))


def probed(model: Any, holes: list[Hole]) -> tuple[float, np.ndarray]:
    """The share of held-out holes that are filled as they were, and a sheet: holes above what was painted."""
    drawn = model.draw([shown(hole) for hole in holes], steps=12, guidance=model.guidance(3.0))
    found = list((drawn * 255).round().astype(np.uint8))
    right = [filled(picture, hole) for picture, hole in zip(found, holes, strict=True)]
    given = [render(hole.scene) * ~mask_of(hole.box)[..., None] for hole in holes]
    rows = [np.concatenate(part[i : i + 10], 1) for i in (0, 10) for part in (given, found)]
    return float(np.mean(right)), np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/inpaint"))
    parser.add_argument("--holes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--probe-every", type=int, default=1000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model: Any = expand_input(load("pocket/sd"), "paint")
    unet = model.pipe.unet.requires_grad_(True)
    # On a CPU the fused attention's backward is the slower one for sequences as short as these.
    unet.set_attn_processor(AttnProcessor())
    # What is new begins with weights of zero, and has further to go than what was trained.
    new = [*unet.conv_in.parameters()]
    rest = [p for p in unet.parameters() if all(p is not one for one in new)]
    groups = [{"params": new, "lr": NEW_RATE * args.lr}, {"params": rest, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=1e-2)
    holes = list(islice(stream(SEED), args.holes))
    held = list(islice(stream(SEED, ["thing"], holdout=True), PROBED))
    whole, left = latents(holes, model.vae, args.out / "latents.pt")
    tokens, empty = conditions(model, [hole.prompt for hole in holes]), conditions(model, [""])
    schedule = model.schedule

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([SEED, step]), torch.Generator().manual_seed(1000 * step + SEED)
        rows = draw.integers(len(holes), size=args.batch)
        told = torch.from_numpy(draw.random(args.batch) >= DROPPED)
        x_0, beside = whole[rows].float(), model.channels(left[rows].float(), masks_of([holes[i] for i in rows]))
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(schedule.num_train_timesteps, (args.batch,), generator=generator)
        words = tokens[rows].where(told[:, None, None], empty)
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(torch.cat([schedule.add_noise(x_0, eps, t), beside], 1), t, words).sample
        error = (found.float() - schedule.target(x_0, eps, t)).square()
        snr = schedule.snr(t)
        hole = as_clean(per_row(error, beside[:, :1]), snr).mean()
        return {"loss": as_clean(per_row(error), snr).mean() + hole, "hole": hole}

    def probe(averaged: nn.Module, step: int) -> None:
        if step % args.probe_every and step != args.steps:
            return
        with holding(unet, averaged):
            model.save(args.out / "model")
            right, sheet = probed(model, held)
        print(f"step {step}: {right:.3f} of the holes filled", flush=True)
        Image.fromarray(sheet).save(args.out / f"samples-{step:05d}.png")

    fit(
        unet,
        loss_at,
        steps=args.steps,
        folder=args.out,
        optimizers=[optimizer],
        warmup=30,
        ema=0.99,
        save_every=50,
        probe=probe,
    )


if __name__ == "__main__":
    main()
