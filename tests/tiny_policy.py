"""A flow model of known velocity and a model with a tiny denoiser, for objectives that learn from what they draw."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tiny_training import TinyModel
from torch import nn

from visiontune.core import Condition
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.schedule import Schedule
from visiontune.objectives._online import Tools
from visiontune.rewards.base import FunctionReward
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

SPREAD = 0.5


class Gaussian(nn.Module):
    """Flow to a normal distribution whose mean is the one parameter: the exact velocity E[noise - x_0 | x_t].

    Latents are [1, 2, 2] and pictures are the latents, squeezed into [0, 1].
    """

    latent_channels, downsample, resolution = 1, 8, 16
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.schedule = Schedule.flow()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls: list[int] = []

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


class Drawing(TinyModel):
    """`TinyModel` with what a rollout asks for."""

    latent_channels, downsample, resolution = 4, 8, 64
    device = torch.device("cpu")

    def embed(self, prompts) -> Condition:
        cond = super().embed(prompts)
        return replace(cond, tokens=cond.tokens.to(next(self.denoiser.parameters())))

    def unconditional(self, count: int) -> Condition:
        return self.embed([""] * count)

    def decode(self, latents):
        return torch.tanh(latents[:, :3] / 2)


def brightness(images, prompts, meta):
    return images.mean((1, 2, 3))


def batch_of(group: int, count: int, prompts=("a", "b", "c", "d", "e"), **cut):
    return PromptBatches(list(prompts), group * count, group, **cut).batch(0)


def tools_of(reward=brightness, **options) -> Tools:
    if reward is not None and not hasattr(reward, "terms"):
        reward = FunctionReward(reward, getattr(reward, "__name__", "reward"))
    return Tools(reward=reward, **{"reference": no_reference, **options})


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
    model = model or Drawing()
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
        reward=reward if hasattr(reward, "terms") else FunctionReward(reward, "toy"),
    )
