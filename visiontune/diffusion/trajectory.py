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
from visiontune.diffusion.guidance import NO_GUIDANCE, Guidance, guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import Reduce, _log_prob, kernel, transition
from visiontune.errors import UserError

Generators = torch.Generator | list[torch.Generator] | None
# Where each step starts and where it leads, [T] each.
Chain = tuple[Tensor, Tensor]
# Fields of a trajectory that have rows.
_ROWS = ("final", "latents", "noise", "log_probs", "cond", "uncond")


class Sampled(Protocol):
    """What a rollout needs of a model; see `models.diffusion.DiffusionModel`."""

    schedule: Schedule

    @property
    def device(self) -> torch.device: ...
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]: ...
    def chain(self, steps: int, shape: Sequence[int]) -> Chain: ...
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...
    def unconditional(self, count: int) -> Condition: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """The noise of a rollout. What is not given is drawn: first the start, then the noise of each step in turn.

    Attributes:
        latents: [b, c, (f), h, w] standard normal noise to start from.
        noise: [b, T, c, (f), h, w] standard normal noise of the steps.
        generator: one, or one for each row, which then depends on nothing but its own.
        size: height and width in pixels of a drawn start (of clips, what else `latent_shape` takes); default the
            model's own.
    """

    latents: Tensor | None = None
    noise: Tensor | None = None
    generator: Generators = None
    size: tuple[int, ...] = ()

    def shape(self, model: Sampled) -> tuple[int, ...]:
        """[c, (f), h, w] of a row."""
        return model.latent_shape(*self.size) if self.latents is None else tuple(self.latents.shape[1:])

    def draw(self, model: Sampled, rows: int, steps: int, dynamics: Dynamics) -> tuple[Tensor, Tensor | None]:
        """The start [rows, ...], at least float32, and the noise of every step where the dynamics adds any."""
        latents = self.latents
        if latents is None:
            shape = (rows, *self.shape(model))
            latents = randn_tensor(shape, generator=self.generator, device=model.device, dtype=torch.float32)
        x = latents.to(model.device, torch.promote_types(latents.dtype, torch.float32))
        if len(x) != rows:
            raise ValueError(f"{len(x)} latents for {rows} conditions")
        if not dynamics.stochastic:
            return x, None
        noise = self.noise
        if noise is None:
            options: dict[str, Any] = {"generator": self.generator, "device": x.device, "dtype": x.dtype}
            noise = torch.stack([randn_tensor(x.shape, **options) for _ in range(steps)], dim=1)
        expected = (len(x), steps, *x.shape[1:])
        if noise.shape != expected:
            raise ValueError(f"noise of shape {tuple(noise.shape)}, not {expected}")
        return x, noise.to(x)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What a rollout keeps besides its end.

    Attributes:
        history: every latent.
        log_probs: the history too, and the score of every transition that adds noise.
        reduce: how a log-probability is reduced over a row; see `transition.log_prob`.
        dtype: round every latent to this type, so that the history can be kept in it; each transition is scored as
            rounded. Not with gradients.
    """

    history: bool = False
    log_probs: bool = False
    reduce: Reduce = "mean"
    dtype: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Which steps of a rollout are differentiated, and how.

    Attributes:
        steps: so many last ones; the earlier ones run without gradients. Or a mask [T]: from its first True on, the
            denoiser's prediction is a constant at the steps that are False.
        checkpoint: keep the inputs of the differentiated steps alone and compute each again in the backward pass.
        deferred: build no graph; keep the history, and `pathwise.backpropagate` walks back through the window.
    """

    steps: int | Tensor = 0
    checkpoint: bool = False
    deferred: bool = False

    def differentiates(self, inside: Tensor) -> bool:
        """Whether any step of `inside` [T] is: now, or when the walk back comes to it."""
        return bool(inside.any()) and (self.deferred or torch.is_grad_enabled())


# What a rollout does unless it is told otherwise.
DETERMINISTIC, OWN_NOISE, THE_END, NO_STEPS = DDIM(), Start(), Keep(), Window()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A finished rollout of `b` rows and T steps, with all that is needed to compute its steps again.

    Attributes:
        final: [b, c, (f), h, w] the latents at the end of the chain, ready for `decode`.
        timesteps, ends: [T] where each step started and where it led, on the CPU.
        dynamics: how it stepped.
        cond, uncond: what it was conditioned on and guided away from, without their graphs. guidance: how.
        scored: [T] bool, the steps that added noise and so have a log-probability, on the CPU.
        window: [T] bool, the steps to differentiate, on the CPU.
        latents: [b, T + 1, c, (f), h, w] from the noise to `final`, or None if the history was not asked for.
        noise: [b, T, c, (f), h, w] standard normal noise of the steps, or None where none was drawn.
        log_probs: [b, T] log-probability of each step when it was taken, 0 where not `scored`, or None.
        reduce: how `log_probs` are reduced over a row; see `log_prob`.
    """

    final: Tensor
    timesteps: Tensor
    ends: Tensor
    dynamics: Dynamics
    cond: Condition
    uncond: Condition | None
    guidance: Guidance
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepper:
    """The chain of one rollout: `step(i, x)` is the Gaussian of its i-th step."""

    model: Sampled
    start: Tensor
    end: Tensor
    dynamics: Dynamics
    cond: Condition
    uncond: Condition | None
    guidance: Guidance

    def step(self, i: int | Tensor, x: Tensor, constant: bool = False) -> tuple[Tensor, Tensor]:
        """Mean [b, ...] and std [b, 1, ...]; `constant` takes the prediction for one, which no gradient enters.

        `i` may be [b], each row's own step.
        """
        t, t_next = (value[i].to(x.device).expand(len(x)) for value in (self.start, self.end))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            pred = guided(self.model, x, t, self.cond, self.uncond, self.guidance)
        return transition(self.model.schedule, pred, x, t, t_next, self.dynamics)


def rollout(
    model: Sampled,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    guidance: Guidance = NO_GUIDANCE,
    chain: int | Chain = 25,
    dynamics: Dynamics = DETERMINISTIC,
    start: Start = OWN_NOISE,
    keep: Keep = THE_END,
    window: Window = NO_STEPS,
) -> Trajectory:
    """Sample latents for `b` conditions.

    Dropout must be off (adapters in `eval()`) where the steps are computed again: with `log_probs` and `deferred`.

    Args:
        model: a DiffusionModel.
        cond: `b` conditions.
        uncond: `b` conditions to guide away from; None takes the family's own.
        guidance: without any, the denoiser is called once per step on the rows alone.
        chain: number of steps, which the family places; or where each step starts and ends, [T] each, of which an end
            of -1 is the clean end.
        dynamics: how to step; deterministic unless given.
        start: the noise. keep: what is remembered. window: what is differentiated.

    Returns:
        The trajectory, at least float32.

    Raises:
        UserError: the dynamics does not suit the model; log-probabilities are asked of a chain without noise; or the
            steps to differentiate are such that the denoiser has no influence on the result.
    """
    dynamics.check(model.schedule.prediction)
    placed = model.chain(chain, start.shape(model)) if isinstance(chain, int) else chain
    begin, end = (value.cpu() for value in placed)
    scored, inside = _checked(model, (begin, end), dynamics, keep, window)
    if keep.log_probs or window.differentiates(inside):
        require_no_memory(guidance)
    x, noise = start.draw(model, len(cond), len(begin), dynamics)
    if not guidance.contrasts:
        uncond = None
    elif uncond is None:
        uncond = model.unconditional(len(cond))
    levels, shape = _shares(model, begin), tuple(x.shape[1:])
    begun = guidance.begin(model, levels, whole=isinstance(chain, int), shape=shape)
    stepper = Stepper(model=model, start=begin, end=end, dynamics=dynamics, cond=cond, uncond=uncond, guidance=begun)
    x, visited, scores = _walk(stepper, x, noise, scored, inside, keep, window)
    return Trajectory(
        final=x,
        timesteps=begin,
        ends=end,
        dynamics=dynamics,
        cond=_frozen(cond),
        uncond=None if uncond is None else _frozen(uncond),
        guidance=guidance,
        scored=scored,
        window=inside,
        latents=torch.stack(visited, dim=1) if len(visited) > 1 else None,
        noise=noise,
        log_probs=torch.stack(scores, dim=1) if scores else None,
        reduce=keep.reduce,
    )


def require_no_memory(guidance: Guidance) -> None:
    """Refuse guidance whose steps cannot be computed again one by one.

    Raises:
        UserError: it remembers earlier steps, or edits what they lead to.
    """
    if guidance.remembers:
        raise UserError(
            "the guidance remembers earlier steps (apg's momentum, inherit) or edits what they lead to, and steps are "
            "to be computed again one by one: set momentum to 0, and leave out what inherits or edits"
        )


def _shares(model: Sampled, start: Tensor) -> list[float]:
    """Timesteps as shares of the schedule, in [0, 1]."""
    return (start.clamp(min=0) / model.schedule.num_train_timesteps).tolist()


def _checked(model: Sampled, chain: Chain, dynamics: Dynamics, keep: Keep, window: Window) -> tuple[Tensor, Tensor]:
    """[T] bool each: the steps that add noise, and those that are differentiated; refuses what cannot be."""
    inside = gradient_window(window.steps, len(chain[0]))
    of_x, of_pred, std = kernel(model.schedule, *chain, dynamics)
    scored = std > 0
    if keep.log_probs:
        dynamics.require_noise()
        if not scored.any():
            raise UserError("none of the steps adds noise, so none has a log-probability: sample with more steps")
    if window.differentiates(inside):
        require_effect(inside, chain[0], of_x, of_pred)
        if keep.dtype is not None:
            raise ValueError("latents are rounded only where nothing is differentiated: give no dtype, or no window")
    return scored, inside


def _walk(
    stepper: Stepper,
    x: Tensor,
    noise: Tensor | None,
    scored: Tensor,
    inside: Tensor,
    keep: Keep,
    window: Window,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The end, the latents that are kept (the start at least), and the log-probabilities of the steps."""
    compute, stored, steps = x.dtype, keep.dtype or x.dtype, len(stepper.start)
    x = stepper.guidance.edit(x, stepper.start[0]).to(stored).to(compute)
    visited, scores = [x.to(stored)], []
    first = int(inside.int().argmax()) if window.differentiates(inside) and not window.deferred else steps
    for i in range(steps):
        constant = i < first or not inside[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= first):
            if window.checkpoint and not constant and torch.is_grad_enabled():
                mean, deviation = torch_checkpoint(stepper.step, i, x, use_reentrant=False)
            else:
                mean, deviation = stepper.step(i, x, constant)
            x = mean if noise is None else mean + deviation * noise[:, i]
            # Some samplers lead to other levels than those where they go on.
            following = stepper.start[i + 1] if i + 1 < steps else stepper.end[i]
            x = stepper.guidance.edit(x, following).to(stored).to(compute)
        if keep.log_probs:
            with torch.no_grad():
                scores.append(_log_prob(x, mean, deviation, keep.reduce) if scored[i] else x.new_zeros(len(x)))
        if keep.history or keep.log_probs or window.deferred:
            visited.append(x.to(stored))
    return x, visited, scores


def _frozen(cond: Condition) -> Condition:
    """`cond` without its graph."""
    extra = {key: value.detach() for key, value in cond.extra.items()}
    pooled = None if cond.pooled is None else cond.pooled.detach()
    shown = None if cond.references is None else [tuple(one.detach() for one in row) for row in cond.references]
    return replace(cond, tokens=cond.tokens.detach(), pooled=pooled, extra=extra, references=shown)


def _device(value: Tensor | Condition) -> torch.device:
    return (value.tokens if isinstance(value, Condition) else value).device
