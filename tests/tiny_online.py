"""Models that draw pictures of prompts, what a run lends an online objective, and runs of one."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tiny_rollout import SD
from tiny_rollout import TinyModel as Rolled
from tiny_training import TinyModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from visiontune.core import Batch, Condition
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.schedule import Schedule
from visiontune.objectives.base import Tools, generator
from visiontune.rewards.base import as_reward
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

PROMPTS = ("a red circle", "a blue square", "a green star", "a grey ring", "a white cross")
SCHEDULES = {
    **{
        name: Schedule.from_scheduler(DDIMScheduler(prediction_type=kind, **SD))
        for name, kind in (("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample"))
    },
    "flow": Schedule.flow(shift=2.0),
}
SPREAD = 0.5


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


class Gaussian(nn.Module):
    """Flow to a normal distribution whose mean is the one parameter: the exact velocity E[noise - x_0 | x_t].

    Latents are [1, 2, 2] and pictures are the latents, squeezed into [0, 1].
    """

    source = family = "gaussian"
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule.flow()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls: list[int] = []

    def latent_shape(self, height: int = 16, width: int = 16):
        return 1, height // 8, width // 8

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

    def guidance(self, scale):
        return classifier_free(scale)

    def embed(self, prompts) -> Condition:
        return Condition(tokens=torch.zeros(len(prompts), 1, 1))

    def unconditional(self, count: int) -> Condition:
        return Condition(tokens=torch.zeros(count, 1, 1))

    def predict(self, x_t, t, cond):
        self.calls.append(len(x_t))
        alpha, sigma = self.schedule.levels(t, x_t.ndim)
        around = (x_t - alpha * self.mean) / (alpha**2 * SPREAD**2 + sigma**2)
        return (sigma * around - self.mean - alpha * SPREAD**2 * around).to(x_t.dtype)

    def decode(self, latents):
        wide = latents.repeat(1, 3, 1, 1)
        return torch.tanh(wide)


def brightness(images, prompts, meta=None):
    return images.mean((1, 2, 3))


def batch_of(group: int, count: int, prompts=PROMPTS, step: int = 0, **cut) -> Batch:
    """`count` groups of pictures to draw."""
    return PromptBatches(list(prompts), group * count, group, **cut).batch(step)


def tools_of(reward=brightness, *, model: Drawing | None = None, **changed) -> Tools:
    """What a run of one process lends; without a `Drawing` there is no base to ask for."""
    own = {"reference": no_reference}
    if model is not None:
        own = {"parameters": {"delta": model.delta}, "reference": model.disable, "refresh": model.refresh}
    return Tools(**{"reward": as_reward(reward, "toy"), **own, **changed})


@contextmanager
def no_reference():
    raise AssertionError("the base was asked for")
    yield


def shifted_reference(parameter, value: float):
    """The model with another value of its parameter."""

    @contextmanager
    def reference():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(value)
        yield
        with torch.no_grad():
            parameter.copy_(before)

    return reference


def policy_trainer(
    out, objective, *, model=None, adapters=None, reward=brightness, rank=0, world=1, **train
) -> Trainer:
    """A run on prompts whose batches may be cut between processes."""
    model = model or TinyModel()
    options = TrainConfig(**{"steps": 4, "batch_size": 8, "trackers": [], "device": "cpu", "log_every": 1, **train})
    rows = PromptBatches(["a b", "c d", "e f"], options.batch_size, objective.group, 5, rank, world)
    return Trainer(
        model=model,
        adapters=adapters,
        objective=objective,
        rows=rows,
        train=options,
        out=Path(out),
        seed=5,
        reward=as_reward(reward, "toy"),
    )


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
