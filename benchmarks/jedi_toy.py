"""Whether a colour goes from a reference to a new picture: JeDi on sets of one colour each, from random weights.

    python benchmarks/jedi_toy.py

Latents of a set are one random colour and a tenth of noise; a tiny UNet of the real class that predicts v learns them,
eight sets of three a step. Printed are squared errors of the mean colour that it predicts of a new picture at timestep
900, where it is nearly all noise, in 32 held-out sets: with a clean reference, and without.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import tiny_model

from visiontune.core import Batch, Condition
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.jedi import Config, JeDi, build

STEPS, EVERY, SETS, SIZE, HELD_OUT, LEVEL, LR = 300, 100, 8, 3, 32, 900, 3e-3


def batch(model: Any, empty: Condition, key: int | str, sets: int, size: int) -> Batch:
    """Sets of one colour each, [sets size, 4, h, w]."""
    rng, rows = generator("toy", key), sets * size
    colour = torch.randn(sets, 4, 1, 1, generator=rng).repeat_interleave(size, 0)
    latents = colour + 0.1 * torch.randn(rows, *model.latent_shape(), generator=rng)
    return Batch(
        prompts=[""] * rows,
        data={"image": latents, "set": torch.arange(sets).repeat_interleave(size)},
        cond=Condition.cat([empty] * rows),
        weight=torch.ones(rows),
        prior=torch.zeros(rows, dtype=torch.bool),
        ids=[str(i) for i in range(rows)],
    )


@torch.no_grad()
def error(model: Any, objective: JeDi, held: Batch, sizes: tuple[int, ...]) -> float:
    """Of the colours of the first pictures, in sets of these sizes."""
    x_0, given = held.data["image"], torch.arange(len(held)) % 2 == 1
    t, eps = torch.full((len(held),), LEVEL), torch.randn(x_0.shape, generator=generator("eps"))
    x_t = model.schedule.add_noise(x_0, eps, t)
    with model.couple().of(sizes):
        pred = model.predict(x_t, t, objective.shown(model, held, given))
    return float((model.schedule.to_x_0(pred, x_t, t) - x_0)[::2].mean((2, 3)).square().mean())


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_model("sd", edits="inpaint", prediction_type="v_prediction")
    model.couple()
    model.denoiser.requires_grad_(True).train()
    objective, empty = build(Config()), model.embed([""])
    held = batch(model, empty, "held out", HELD_OUT, 2)
    optimiser = torch.optim.AdamW(model.denoiser.parameters(), lr=LR)
    schedule = CosineAnnealingLR(optimiser, STEPS)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            found = [error(model, objective, held, sizes) for sizes in ((2,), (1,))]
            print(f"step {step}: {found[0]:.3f} with a reference, {found[1]:.3f} without", flush=True)
        tools = Tools(rng=generator("step", step))
        objective.loss(model, batch(model, empty, step, SETS, SIZE), tools).total.backward()
        torch.nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


if __name__ == "__main__":
    main()
