"""Rollouts: from noise to latents along the reverse chain, with guidance, on our own `predict` and `transition`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import DDIM, Dynamics, transition


class Sampled(Protocol):
    """What a rollout needs of a model; see `models.base.DiffusionModel`."""

    schedule: Schedule
    latent_channels: int
    downsample: int
    resolution: int

    @property
    def device(self) -> torch.device: ...
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...
    def unconditional(self, count: int) -> Condition: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A finished rollout.

    Attributes:
        final: [b, c, h, w] the latents at the end of the chain, ready for `decode`.
        timesteps: [T] where each step started.
        latents: [b, T + 1, c, h, w] from the noise to `final`, or None if the history was not asked for.
    """

    final: Tensor
    timesteps: Tensor
    latents: Tensor | None = None


def guided(
    model: Sampled, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None, cfg_scale: float
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): u + cfg_scale (c - u) in one call of the denoiser.

    A scale of 1 is the plain conditional prediction. `uncond` None means `model.unconditional`; what `uncond` lacks in
    `extra` it takes from `cond`, as the stock pipelines do.
    """
    if cfg_scale == 1.0:
        return model.predict(x_t, t, cond)
    uncond = model.unconditional(len(cond)) if uncond is None else uncond
    uncond = replace(uncond, extra={**cond.extra, **uncond.extra})
    both = Condition.cat([uncond, cond])
    without, given = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return without + cfg_scale * (given - without)


def rollout(
    model: Sampled,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    cfg_scale: float = 1.0,
    steps: int = 25,
    dynamics: Dynamics | None = None,
    latents: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    size: tuple[int, int] | None = None,
    history: bool = False,
    grad_steps: int = 0,
) -> Trajectory:
    """Sample latents for `b` conditions.

    Args:
        model: a DiffusionModel.
        cond: `b` conditions.
        uncond: `b` conditions to guide away from; None takes the family's own.
        cfg_scale: guidance scale; 1 calls the denoiser once per step, without guidance.
        steps: number of steps, placed by `model.schedule.timesteps`.
        dynamics: default DDIM(eta=0).
        latents: [b, c, h, w] standard normal noise to start from; drawn from `generator` if None.
        generator: one generator, or one per row, for the start and for the noise of the steps.
        size: height and width in pixels of the drawn start; default the model's resolution.
        history: keep every latent.
        grad_steps: differentiate through this many last steps; the earlier ones run without gradients.

    Returns:
        The trajectory, at least float32.
    """
    dynamics = dynamics or DDIM()
    height, width = size or (model.resolution, model.resolution)
    shape = (len(cond), model.latent_channels, height // model.downsample, width // model.downsample)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=model.device, dtype=torch.float32)
    x = latents.to(model.device, torch.promote_types(latents.dtype, torch.float32))
    if x.shape[0] != len(cond):
        raise ValueError(f"{x.shape[0]} latents for {len(cond)} conditions")
    if cfg_scale != 1.0 and uncond is None:
        uncond = model.unconditional(len(cond))
    start, end = model.schedule.timesteps(steps)
    visited = [x]
    for step in range(steps):
        t, t_next = (value[step].to(x.device).expand(len(cond)) for value in (start, end))
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= steps - grad_steps):
            pred = guided(model, x, t, cond, uncond, cfg_scale)
            x, std = transition(model.schedule, pred, x, t, t_next, dynamics)
            if dynamics.stochastic:
                x = x + std * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if history:
            visited.append(x)
    return Trajectory(final=x, timesteps=start, latents=torch.stack(visited, dim=1) if history else None)
