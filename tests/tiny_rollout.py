"""A float64 denoiser of a few parameters that a rollout takes for a model, with a text encoder of one matrix."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from visiontune.core import Condition
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, Window, rollout

SD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class TinyModel(nn.Module):
    """Two convolutions that see the timestep and the condition; `calls` counts them."""

    source = family = "tiny"
    device = torch.device("cpu")

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or Schedule.from_scheduler(DDIMScheduler(**SD))
        self.calls = 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 6, 3, padding=1).double()
            self.tokens = nn.Linear(3, 6).double()
            self.pooled = nn.Linear(4, 6).double()
            self.last = nn.Conv2d(6, 2, 3, padding=1).double()
            self.text = nn.Linear(5, 7, bias=False).double()

    def latent_shape(self, height: int = 32, width: int = 32) -> tuple[int, ...]:
        return 2, height // 8, width // 8

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

    def guidance(self, scale):
        return classifier_free(scale)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.calls += 1
        where = torch.sin(t.double() / 300)[:, None, None, None]
        told = self.tokens(cond.tokens).mean(1) + self.pooled(cond.pooled)
        return self.last(torch.tanh(self.first(x_t.double()) + told[:, :, None, None] + where)).to(x_t.dtype)

    def unconditional(self, count: int) -> Condition:
        return self.embed(torch.zeros(count, 5, dtype=torch.float64))

    def embed(self, prompts: Tensor) -> Condition:
        """Stands in for a text encoder: [b, 5] -> a condition."""
        made = self.text(prompts)
        return Condition(tokens=made[:, None, :3].expand(-1, 2, -1), pooled=made[:, 3:])

    def denoiser(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("text")]


def prompts(count: int = 3) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def start(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def noises(steps: int, count: int = 3) -> Tensor:
    return torch.randn(count, steps, 2, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


_STARTS, _KEEPS = ("latents", "noise", "generator", "size"), ("history", "log_probs", "reduce", "dtype")


def rolled(model, cond, *, steps=25, grad_steps=0, checkpoint=False, deferred=False, cfg_scale=1.0, **options):
    """`rollout` with all that its values hold as one flat list of options, which cases can change one by one."""
    chain = options.pop("chain", steps)
    start = Start(**{name: options.pop(name) for name in _STARTS if name in options})
    keep = Keep(**{name: options.pop(name) for name in _KEEPS if name in options})
    window = Window(steps=grad_steps, checkpoint=checkpoint, deferred=deferred)
    guidance = classifier_free(cfg_scale)
    return rollout(model, cond, guidance=guidance, chain=chain, start=start, keep=keep, window=window, **options)
