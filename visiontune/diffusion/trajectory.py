"""Rollouts: from noise to latents along the reverse chain, with guidance, on our own `predict` and `transition`.

One rollout serves pictures, policy gradients (`replay.py` scores its transitions again) and reward back-propagation
(`pathwise.py` differentiates it without keeping its graph).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from visiontune.core import Condition
from visiontune.diffusion._window import gradient_window, require_effect
from visiontune.diffusion.dynamics import DDIM, Dynamics
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import Reduce, _log_prob, kernel, transition
from visiontune.errors import UserError

Generators = torch.Generator | list[torch.Generator] | None
# Fields of a trajectory that have rows.
_ROWS = ("final", "latents", "noise", "log_probs", "cond", "uncond")


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
    """A finished rollout of `b` rows and T steps, with all that is needed to compute its steps again.

    Attributes:
        final: [b, c, h, w] the latents at the end of the chain, ready for `decode`.
        timesteps, ends: [T] where each step started and where it led, on the CPU.
        dynamics: how it stepped.
        cond, uncond: what it was conditioned on and guided away from, without their graphs; cfg_scale: how strongly.
        scored: [T] bool, the steps that added noise and so have a log-probability, on the CPU.
        window: [T] bool, the steps to differentiate, on the CPU.
        latents: [b, T + 1, c, h, w] from the noise to `final`, or None if the history was not asked for.
        noise: [b, T, c, h, w] standard normal noise of the steps, or None where none was drawn.
        log_probs: [b, T] log-probability of each step when it was taken, 0 where not `scored`, or None.
        reduce: how `log_probs` are reduced over a row; see `log_prob`.
    """

    final: Tensor
    timesteps: Tensor
    ends: Tensor
    dynamics: Dynamics
    cond: Condition
    uncond: Condition | None
    cfg_scale: float
    scored: Tensor
    window: Tensor
    latents: Tensor | None = None
    noise: Tensor | None = None
    log_probs: Tensor | None = None
    reduce: Reduce = "mean"

    def __len__(self) -> int:
        return self.final.shape[0]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    def __getitem__(self, rows: slice | Tensor) -> Trajectory:
        """The given rows."""
        return self._map(lambda value: value[rows if isinstance(rows, slice) else rows.to(_device(value))])

    def to(self, device: torch.device | str) -> Trajectory:
        """A copy with everything that has rows on `device`; "cpu" frees an accelerator between rollout and update."""
        return self._map(lambda value: value.to(device))

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join the rows of trajectories that were sampled in one and the same way."""
        values = {name: [getattr(part, name) for part in parts] for name in _ROWS}
        joined: dict[str, Any] = {
            name: None if items[0] is None else (Condition if isinstance(items[0], Condition) else torch).cat(items)
            for name, items in values.items()
        }
        return replace(parts[0], **joined)

    def _map(self, change: Callable[[Any], Any]) -> Trajectory:
        values: dict[str, Any] = {name: getattr(self, name) for name in _ROWS}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepper:
    """The chain of one rollout: `step(i, x)` is the Gaussian of its i-th step."""

    model: Sampled
    start: Tensor
    end: Tensor
    dynamics: Dynamics
    cond: Condition
    uncond: Condition | None
    cfg_scale: float

    def step(self, i: int | Tensor, x: Tensor, constant: bool = False) -> tuple[Tensor, Tensor]:
        """Mean [b, ...] and std [b, 1, ...]; `constant` takes the prediction for one, which no gradient enters.

        `i` may be [b], each row's own step.
        """
        t, t_next = (value[i].to(x.device).expand(len(x)) for value in (self.start, self.end))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            pred = guided(self.model, x, t, self.cond, self.uncond, self.cfg_scale)
        return transition(self.model.schedule, pred, x, t, t_next, self.dynamics)


def rollout(
    model: Sampled,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    cfg_scale: float = 1.0,
    steps: int = 25,
    chain: tuple[Tensor, Tensor] | None = None,
    dynamics: Dynamics | None = None,
    latents: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generators = None,
    size: tuple[int, int] | None = None,
    history: bool = False,
    log_probs: bool = False,
    reduce: Reduce = "mean",
    dtype: torch.dtype | None = None,
    grad_steps: int | Tensor = 0,
    checkpoint: bool = False,
    deferred: bool = False,
) -> Trajectory:
    """Sample latents for `b` conditions.

    Dropout must be off (adapters in `eval()`) where the steps are computed again: with `log_probs` and `deferred`.

    Args:
        model: a DiffusionModel.
        cond: `b` conditions.
        uncond: `b` conditions to guide away from; None takes the family's own.
        cfg_scale: guidance scale; 1 calls the denoiser once per step, without guidance.
        steps: number of steps, placed by `model.schedule.timesteps`.
        chain: where each step starts and ends, [T] each, instead of `steps`; an end of -1 leads to the clean end.
        dynamics: default DDIM(eta=0).
        latents: [b, c, h, w] standard normal noise to start from; drawn from `generator` if None.
        noise: [b, T, c, h, w] standard normal noise of the steps; drawn from `generator` if None.
        generator: one generator, or one per row, for the start and then for the noise of the steps. With one per row
            a row depends on nothing but its own.
        size: height and width in pixels of the drawn start; default the model's resolution.
        history: keep every latent.
        log_probs: keep the history and score every transition that adds noise.
        reduce: how a log-probability is reduced over a row; see `transition.log_prob`.
        dtype: round every latent to this type, so that the history can be kept in it; each transition is scored as
            rounded. Not with gradients.
        grad_steps: differentiate through this many last steps; the earlier ones run without gradients. Or a mask [T]:
            from its first True on, the denoiser's prediction is a constant at the steps that are False.
        checkpoint: keep the inputs of the differentiated steps alone and compute each again in the backward pass.
        deferred: build no graph; keep the history, and `pathwise.backpropagate` walks back through `grad_steps`.

    Returns:
        The trajectory, at least float32.

    Raises:
        UserError: the dynamics does not suit the model; log-probabilities are asked of a chain without noise; or the
            steps to differentiate are such that the denoiser has no influence on the result.
    """
    dynamics = dynamics or DDIM()
    dynamics.check(model.schedule.prediction)
    start, end = (v.cpu() for v in (chain or model.schedule.timesteps(steps)))
    window = gradient_window(grad_steps, len(start))
    tracked = bool(window.any()) and (deferred or torch.is_grad_enabled())
    of_x, of_pred, std = kernel(model.schedule, start, end, dynamics)
    scored = std > 0
    if log_probs:
        dynamics.require_noise()
        if not scored.any():
            raise UserError("none of the steps adds noise, so none has a log-probability: sample with more steps")
    if tracked:
        require_effect(window, start, of_x, of_pred)
        if dtype is not None:
            raise ValueError("latents are rounded only where nothing is differentiated: give no dtype, or grad_steps=0")
    x, noise = _draw(model, cond, len(start), dynamics, latents, noise, generator, size)
    compute, stored = x.dtype, dtype or x.dtype
    if cfg_scale == 1.0:
        uncond = None
    elif uncond is None:
        uncond = model.unconditional(len(cond))
    stepper = Stepper(
        model=model, start=start, end=end, dynamics=dynamics, cond=cond, uncond=uncond, cfg_scale=cfg_scale
    )
    x = x.to(stored).to(compute)
    visited, scores = [x.to(stored)], []
    first = int(window.int().argmax()) if tracked and not deferred else len(start)
    for i in range(len(start)):
        constant = i < first or not window[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
            if checkpoint and not constant and torch.is_grad_enabled():
                mean, deviation = torch_checkpoint(stepper.step, i, x, use_reentrant=False)
            else:
                mean, deviation = stepper.step(i, x, constant)
            x = mean if noise is None else mean + deviation * noise[:, i]
            x = x.to(stored).to(compute)
        if log_probs:
            with torch.no_grad():
                scores.append(_log_prob(x, mean, deviation, reduce) if scored[i] else x.new_zeros(len(x)))
        if history or log_probs or deferred:
            visited.append(x.to(stored))
    return Trajectory(
        final=x,
        timesteps=start,
        ends=end,
        dynamics=dynamics,
        cond=_frozen(cond),
        uncond=None if uncond is None else _frozen(uncond),
        cfg_scale=cfg_scale,
        scored=scored,
        window=window,
        latents=torch.stack(visited, dim=1) if len(visited) > 1 else None,
        noise=noise,
        log_probs=torch.stack(scores, dim=1) if scores else None,
        reduce=reduce,
    )


def _draw(
    model: Sampled,
    cond: Condition,
    steps: int,
    dynamics: Dynamics,
    latents: Tensor | None,
    noise: Tensor | None,
    generator: Generators,
    size: tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """The start, at least float32, and the noise of every step, drawn in the order in which they are used."""
    height, width = size or (model.resolution, model.resolution)
    shape = (len(cond), model.latent_channels, height // model.downsample, width // model.downsample)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=model.device, dtype=torch.float32)
    x = latents.to(model.device, torch.promote_types(latents.dtype, torch.float32))
    if x.shape[0] != len(cond):
        raise ValueError(f"{x.shape[0]} latents for {len(cond)} conditions")
    if not dynamics.stochastic:
        return x, None
    if noise is None:
        drawn = [randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype) for _ in range(steps)]
        noise = torch.stack(drawn, dim=1)
    expected = (x.shape[0], steps, *x.shape[1:])
    if noise.shape != expected:
        raise ValueError(f"noise of shape {tuple(noise.shape)}, not {expected}")
    return x, noise.to(x)


def _frozen(cond: Condition) -> Condition:
    """`cond` without its graph."""
    extra = {key: value.detach() for key, value in cond.extra.items()}
    pooled = None if cond.pooled is None else cond.pooled.detach()
    return replace(cond, tokens=cond.tokens.detach(), pooled=pooled, extra=extra)


def _device(value: Tensor | Condition) -> torch.device:
    return (value.tokens if isinstance(value, Condition) else value).device
