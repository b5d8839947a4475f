"""Train pocket-edit: pocket-sd with the channels of InstructPix2Pix, on edits of the pocket world.

    python pipelines/pretrain/instruction_to_edit.py --out runs/pretrain/edit

The words of instructions are new to pocket-sd, so its text encoder is trained too. One row in twenty has no words, one
no source, one neither (Brooks et al., 2022, arXiv 2211.09800, section 3.2.1). Errors count as those of the clean
latents, of which those at high noise would hardly count among errors of the noise, and there the source says most.

Run it again to go on after an interruption. The model lands in ``<out>/model``; ``benchmarks/evidence/edits.py`` judges
it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from text_to_image import latents_of
from torch import nn

from visiontune.diffusion.guidance import EditCFG
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.models import load
from visiontune.models.expand import expand_input
from visiontune.ops.pixels import shown, to_uint8
from visiontune.pocket.edits import Edit, judge, stream
from visiontune.training.pretrain import fit

SEED, DROPPED = 62, 0.05
LEAST_SNR = 0.05
PROBED = 25


def as_clean(error: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Errors of the noise as those of the clean latents, but where hardly anything is left of these; all ``[b]``."""
    return error / (snr + LEAST_SNR)


@contextmanager
def holding(trained: nn.Module, averaged: nn.Module) -> Iterator[None]:
    """In the block the trained network has the values of its average."""
    own = copy.deepcopy(trained.state_dict())
    trained.load_state_dict(averaged.state_dict())
    yield
    trained.load_state_dict(own)


def latents(edits: list[Edit], vae: Any, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sources and results, kept in a file."""
    if not file.exists():
        both = [latents_of([getattr(edit, name) for edit in edits], vae) for name in ("before", "after")]
        torch.save(both, file)
    before, after = torch.load(file, weights_only=True)
    return before, after


def conditions(model: Any, words: list[str], source: torch.Tensor, kept: torch.Tensor) -> Any:
    """What rows are told: words, and scaled latents of sources, which are 0 where they are not `kept`."""
    cond, beside = model.embed(words), model.edited(source) * kept.view(-1, 1, 1, 1)
    return replace(cond, extra={"channels": beside})


@torch.no_grad()
def probed(model: Any, edits: list[Edit], before: torch.Tensor) -> dict[str, float]:
    """Shares of held-out edits that are made, and that leave all else alone."""
    source, seen = before.float(), torch.ones(len(edits))
    cond = conditions(model, [edit.instruction for edit in edits], source, seen)
    away = conditions(model, [""] * len(edits), source, seen)
    start = Start(generator=torch.Generator().manual_seed(0))
    final = rollout(model, cond, uncond=away, guidance=EditCFG(scale=3.0), chain=12, start=start).final
    pictures = to_uint8(shown(model.decode(final)))
    verdicts = [judge(picture, edit) for picture, edit in zip(pictures, edits, strict=True)]
    return {name: float(np.mean([getattr(one, name) for one in verdicts])) for name in ("changed", "kept")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain/edit"))
    parser.add_argument("--edits", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--probe-every", type=int, default=1000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model: Any = expand_input(load("pocket/sd"), "edit")
    # On a CPU the fused attention's backward is the slower one for sequences as short as these.
    model.denoiser.set_attn_processor(AttnProcessor())
    trained = nn.ModuleDict({"unet": model.pipe.unet, "text_encoder": model.pipe.text_encoder}).requires_grad_(True)
    edits = list(islice(stream(SEED), args.edits))
    held = list(islice(stream(SEED, holdout=True), PROBED))
    before, after = latents(edits, model.vae, args.out / "latents.pt")
    seen, _ = latents(held, model.vae, args.out / "held.pt")
    schedule = model.schedule

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        draw, generator = np.random.default_rng([SEED, step]), torch.Generator().manual_seed(1000 * step + SEED)
        rows, chance = draw.integers(len(edits), size=args.batch), draw.random(args.batch)
        words = ["" if c < 2 * DROPPED else edits[i].instruction for i, c in zip(rows, chance, strict=True)]
        kept = torch.from_numpy((chance < DROPPED) | (chance >= 3 * DROPPED))
        x_0 = after[rows].float()
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(schedule.num_train_timesteps, (args.batch,), generator=generator)
        cond = conditions(model, words, before[rows].float(), kept)
        found = model.predict(schedule.add_noise(x_0, eps, t), t, cond)
        error = (found - schedule.target(x_0, eps, t)).square().mean((1, 2, 3))
        return {"loss": as_clean(error, schedule.snr(t)).mean()}

    def probe(averaged: nn.Module, step: int) -> None:
        if step % args.probe_every and step != args.steps:
            return
        with holding(trained, averaged):
            model.save(args.out / "model")
            print(f"step {step}: {probed(model, held, seen)}", flush=True)

    fit(trained, loss_at, steps=args.steps, lr=args.lr, folder=args.out, warmup=100, ema=0.998, probe=probe)


if __name__ == "__main__":
    main()
