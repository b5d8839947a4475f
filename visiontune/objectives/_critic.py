"""What watches a student: a second network, which learns the student's own pictures, and a judge between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import silu

from visiontune.objectives._old import swapped
from visiontune.objectives.base import Tools, seed_of
from visiontune.ops.shards import is_sharded

WIDTH = 64  # of the judge's layers


class Judge(nn.Module):
    """The logarithm of how much likelier noisy latents are of one model than of another.

    A small network that sees, beside the latents and the noise level, what either model takes for clean in them, so it
    serves every family. Untrained it finds both alike.

    Args:
        channels: of the latents. seed: of its first weights.
    """

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3 * channels + 1, WIDTH, 3, padding=1)
            self.deeper = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1) for _ in range(2))
            self.last = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_t: Tensor, ones: Tensor, others: Tensor, level: Tensor) -> Tensor:
        """``[b]`` from latents ``[b, c, (f), h, w]``, clean ones by either model, and the noise ``[b]`` in [0, 1]."""
        stack = torch.cat([x_t, ones, others], 1).float()
        frames = stack.shape[2] if stack.ndim > 4 else 1
        if stack.ndim > 4:
            stack = stack.transpose(1, 2).flatten(0, 1)
        noise = level.float().repeat_interleave(frames).view(-1, 1, 1, 1).expand(-1, 1, *stack.shape[2:])
        hidden = silu(self.first(torch.cat([stack, noise], 1)))
        for layer in self.deeper:
            hidden = silu(layer(hidden))
        return self.last(hidden.mean((2, 3))).view(-1, frames).mean(1)


class Critic:
    """Other values of what is trained, and a judge, with an optimiser (AdamW) of their own.

    It begins with the values that are trained now, and is the model itself for a while (:meth:`as_model`): adapters or
    all weights, whatever the run trains.

    Args:
        parameters: what is trained, by name. lr: learning rate. judge: trained with it; None for none.
    """

    def __init__(self, parameters: Mapping[str, Parameter], lr: float, judge: Judge | None = None) -> None:
        self.values = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
        self.judge = judge
        trained = [*self.values.values(), *([] if judge is None else judge.parameters())]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def as_model(self, tools: Tools) -> AbstractContextManager[None]:
        """Inside the block the model has the critic's values."""
        return swapped(tools.parameters, {name: value.data for name, value in self.values.items()}, tools.refresh)

    def learn(self, tools: Tools, losses: Iterable[Callable[[], Tensor]]) -> float:
        """One step down the sum of losses, each of which is computed, and differentiated, as the critic; their sum.

        Gradients that the student has are left as they are. A step whose gradient is not finite is not made.
        """
        held = {name: p.grad for name, p in tools.parameters.items()}
        self.optimizer.zero_grad()
        total = 0.0
        try:
            _clear(tools.parameters)
            with self.as_model(tools), torch.enable_grad():
                for loss in losses:
                    found = loss()
                    (tools.scale * found).backward()
                    total += float(found.detach())
            for name, parameter in tools.parameters.items():
                self.values[name].grad = parameter.grad
        finally:
            for name, parameter in tools.parameters.items():
                parameter.grad = held[name]
        if self._averaged(tools):
            self.optimizer.step()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Values, judge and optimiser."""
        judge = {} if self.judge is None else self.judge.state_dict()
        values = {name: value.detach() for name, value in self.values.items()}
        return {"values": values, "judge": judge, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them up again."""
        for name, value in self.values.items():
            value.copy_(saved["values"][name])
        if self.judge is not None:
            self.judge.load_state_dict(saved["judge"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _averaged(self, tools: Tools) -> bool:
        """Make gradients those of all processes, unscaled; whether they are finite."""
        finite = True
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if tools.world > 1 and not is_sharded(parameter):
                gradient = tools.gather(gradient[None]).mean(0)
            parameter.grad = gradient / tools.scale
            finite = finite and bool(parameter.grad.isfinite().all())
        return finite


def critic_of(tools: Tools, lr: float, channels: int | None, device: torch.device) -> Critic:
    """A new one; with a judge of latents of so many channels, or without."""
    judge = None if channels is None else Judge(channels, seed_of(tools.seed, "judge")).to(device)
    return Critic(tools.parameters, lr, judge)


def _clear(parameters: Mapping[str, Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None
