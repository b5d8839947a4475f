"""A float64 model that draws pictures of prompts, one trained tensor on top of it, and rewards of them."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler
from tiny_rollout import SD
from tiny_rollout import TinyModel as Rolled
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from visiontune.core import Batch
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.schedule import Schedule
from visiontune.objectives._online import Tools
from visiontune.objectives.base import generator

PROMPTS = ("a red circle", "a blue square", "a green star")
SCHEDULES = {
    **{
        name: Schedule.from_scheduler(DDIMScheduler(prediction_type=kind, **SD))
        for name, kind in (("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample"))
    },
    "flow": Schedule.flow(shift=2.0),
}


class Drawing(Rolled):
    """`delta` is an adapter of the last layer, which `disable` switches off; `calls` counts predictions."""

    def __init__(self, prediction: str = "eps") -> None:
        super().__init__(SCHEDULES[prediction])
        self.requires_grad_(False)
        self.delta, self.on, self.refreshed = nn.Parameter(torch.zeros_like(self.last.weight)), True, 0

    def predict(self, x_t, t, cond):
        # Rollouts draw in float32; float64 from here on keeps scores and gradients exact.
        base = super().predict(x_t.double(), t, cond)
        if not self.on:
            return base
        return base + nn.functional.conv2d(torch.tanh(self.first(x_t.double())), self.delta, padding=1)

    @contextmanager
    def disable(self):
        self.on = False
        yield
        self.on = True

    def embed(self, prompts):
        rows = [torch.randn(5, generator=generator("words", p), dtype=torch.float64) for p in prompts]
        return super().embed(torch.stack(rows))

    def unconditional(self, count):
        return self.embed([""] * count)

    def decode(self, latents):
        return torch.tanh(torch.cat([latents, latents.mean(1, keepdim=True)], 1))

    def move(self, size: float = 0.05, seed: int = 0) -> None:
        """Let the adapter do something, or something else."""
        with torch.no_grad():
            self.delta.add_(
                size * torch.randn(self.delta.shape, generator=generator("move", seed), dtype=torch.float64)
            )

    def refresh(self) -> None:
        self.refreshed += 1


def brightness(images, prompts, meta=None):
    return images.mean((1, 2, 3)).float()


def tools(model: Drawing, **changed) -> Tools:
    """What a run of one process lends."""
    own = {"parameters": {"delta": model.delta}, "reference": model.disable, "refresh": model.refresh}
    return Tools(**{"reward": brightness, **own, **changed})


def drawn_batch(batch_size: int, group: int, step: int = 0, rank: int = 0, world: int = 1) -> Batch:
    return PromptBatches(PROMPTS, batch_size, group, 0, rank, world).batch(step)


def gradient(model: Drawing) -> torch.Tensor:
    made, model.delta.grad = model.delta.grad, None
    return made


class Holder:
    """What a graph has in the place of a tensor that it saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def most_held(run) -> int:
    """The most values that graphs held at one time while `run()` ran."""
    now = most = 0

    def pack(tensor):
        nonlocal now, most
        holder = Holder(tensor)
        now += tensor.numel()
        most = max(most, now)
        weakref.finalize(holder, drop, tensor.numel())
        return holder

    def drop(size):
        nonlocal now
        now -= size

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        run()
    return most
