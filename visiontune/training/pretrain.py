"""The loop that trains the pocket models from nothing: resumable, averaged, and nothing else."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from visiontune.ops.pixels import to_tensor
from visiontune.training.ema import warm_average


def warm_cosine(step: int, total: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 % at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1)))


def fit(
    model: nn.Module,
    loss_at: Callable[[int], dict[str, torch.Tensor]],
    *,
    steps: int,
    folder: Path,
    lr: float = 1e-3,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    warmup: int = 100,
    ema: float = 0.998,
    weight_decay: float = 1e-2,
    log_every: int = 50,
    save_every: int = 250,
    probe: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Minimise ``loss_at(step)["loss"]`` and return the averaged model.

    ``loss_at`` draws its batch from a generator seeded by the step number, so a run that is killed goes on from its
    last checkpoint in ``folder`` with the very batches it would have seen.

    Args:
        model: holds every trained parameter.
        loss_at: step number -> named scalar losses, of which ``loss`` is minimised.
        steps: number of optimiser steps in the whole run.
        folder: receives ``state.pt`` (written atomically) and ``metrics.jsonl``.
        lr: peak learning rate (AdamW, betas 0.9 and 0.99).
        optimizers: those that step, each with its own peak rate, in the place of that AdamW.
        warmup: steps of linear warm-up.
        ema: greatest decay of the weight average.
        weight_decay: decoupled weight decay.
        log_every: steps between two lines of the log.
        save_every: steps between two checkpoints.
        probe: called with the averaged model after each checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = optimizers or [
        torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    average = AveragedModel(model, multi_avg_fn=warm_average(ema))
    state_file, start = folder / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    clock, sums, seen = time.monotonic(), dict[str, float](), 0
    for step in range(start, steps):
        losses = loss_at(step)
        model.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * warm_cosine(step, steps, warmup)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        seen += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % log_every == 0:
            row = {"step": step + 1, **{k: round(v / seen, 5) for k, v in sums.items()}}
            row["seconds_per_step"] = round((time.monotonic() - clock) / seen, 3)
            print(json.dumps(row), flush=True)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            clock, seen = time.monotonic(), 0
            sums.clear()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(state_file, step + 1, model, average, optimizers)
            if probe:
                probe(average.module, step + 1)
    return average.module


def _save(
    file: Path, step: int, model: nn.Module, average: AveragedModel, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    state = {"step": step, "model": model.state_dict(), "average": average.state_dict()}
    partial = file.with_suffix(".partial")
    torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, partial)
    os.replace(partial, file)


def images_to_tensor(images: Sequence) -> torch.Tensor:
    """``uint8 [h, w, 3]`` arrays -> ``float32 [b, 3, h, w]`` in [-1, 1]."""
    import numpy as np

    return to_tensor(np.stack(images)) * 2 - 1
