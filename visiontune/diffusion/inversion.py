"""Inversion: the noise from which the deterministic chain leads to given latents.

A step of a rollout is x_next = a x_t + b pred(x_t, t). Backwards it is an equation for x_t,

    x_t = (x_next - b pred(x_t, t)) / a,

whose right side is evaluated at x_next first, which is DDIM inversion (Song et al., 2021, arXiv 2010.02502, section
4.3; for flow an Euler step backwards), and then at what it gave, again and again: a fixed-point iteration with
Anderson's acceleration (Pan et al., 2023, arXiv 2309.04907), which makes the way back the way there. It converges where
b / a times the slope of the prediction is not far above 1; strong guidance steepens it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.guidance import NO_GUIDANCE, Guidance, guided
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import DETERMINISTIC, Chain, Sampled, Start, require_no_memory, rollout
from visiontune.diffusion.transition import kernel
from visiontune.errors import UserError

# Earlier points of an iteration that are looked at, and what of their square keeps a solution finite.
_DEPTH, _RIDGE = 8, 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """The way of b rows from clean latents to noise, in the order in which a rollout goes it: the noise first.

    Attributes:
        latents: [b, T + 1, c, (f), h, w], what was visited; the last are those that were given.
        timesteps, ends: [T] where each step of the chain starts and where it leads, on the CPU.
        residual: [b] how far the last evaluation of a row's worst step was from equality, relative.
        error: [b] |end of a rollout from the noise - given latents| / |given latents|, or None where not measured.
    """

    latents: Tensor
    timesteps: Tensor
    ends: Tensor
    residual: Tensor
    error: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """[b, c, (f), h, w] where a rollout starts."""
        return self.latents[:, 0]

    @property
    def chain(self) -> Chain:
        """As a rollout takes it."""
        return self.timesteps, self.ends

    def at(self, t: float | Tensor) -> Tensor:
        """The latents [b, c, (f), h, w] at a timestep of the chain.

        Raises:
            UserError: no step stands there, since the chain is another.
        """
        found = (self.timesteps == torch.as_tensor(t).cpu()).nonzero()
        if not len(found):
            raise UserError(
                f"nothing was kept at timestep {float(t):g} by an inversion of {len(self.timesteps)} steps: invert on "
                "the chain that reads it"
            )
        return self.latents[:, int(found[0])]


@torch.no_grad()
def invert(
    model: Sampled,
    x_0: Tensor,
    cond: Condition,
    *,
    uncond: Condition | None = None,
    guidance: Guidance = NO_GUIDANCE,
    chain: int | Chain = 25,
    iterations: int = 1,
    tolerance: float = 1e-5,
    most_error: float | None = 0.1,
) -> Inversion:
    """Walk from clean latents to noise along the chain of a deterministic rollout.

    Args:
        model: a DiffusionModel of any prediction that says something of x_t at every step (eps, v, flow).
        x_0: [b, c, (f), h, w] clean latents, as `encode` gives them.
        cond: b conditions, of prompts that describe the pictures or of empty ones. uncond: to guide away from; None
            takes the family's own.
        guidance: of the rollout that is to lead back; without any the way is the straightest.
        chain: as of `rollout`.
        iterations: evaluations of each step at most; 1 is plain inversion, more refine it.
        tolerance: a step is done where an evaluation is no further from equality, relative.
        most_error: the largest round-trip error, relative, with which there is something to edit; measuring it takes a
            rollout of T calls, and None leaves it out.

    Returns:
        The inversion, in at least float32.

    Raises:
        UserError: the model has no such chain, a step forgets where it came from, the guidance remembers steps, or
            the round trip is worse than `most_error`.
        ValueError: iterations below 1, or numbers of latents and conditions that differ.
    """
    if iterations < 1 or len(x_0) != len(cond):
        raise ValueError(f"{iterations} iterations for {len(x_0)} latents and {len(cond)} conditions")
    if not hasattr(model, "chain"):
        raise UserError("masked tokens have no noise to go back to: invert with a model of continuous latents")
    require_no_memory(guidance)
    start, end = (v.cpu() for v in (model.chain(chain, x_0.shape[1:]) if isinstance(chain, int) else chain))
    if guidance.contrasts and uncond is None:
        uncond = model.unconditional(len(cond))
    begun = guidance.begin(model, (start.clamp(min=0) / model.schedule.num_train_timesteps).tolist())

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return guided(model, x, t.to(x.device).expand(len(x)), cond, uncond, begun)

    x = x_0.to(model.device, torch.promote_types(x_0.dtype, torch.float32))
    visited, residual = [x], x.new_zeros(len(x))
    for t, a, b in reversed([*zip(start, *_weights(model.schedule, start, end), strict=True)]):
        x, left = _solved(partial(_backwards, predict, x, t, a, b), x, iterations, tolerance)
        visited.append(x)
        residual = torch.maximum(residual, left)
    found = Inversion(latents=torch.stack(visited[::-1], dim=1), timesteps=start, ends=end, residual=residual)
    if most_error is None:
        return found
    begin = Start(latents=found.noise)
    there = rollout(model, cond, uncond=uncond, guidance=guidance, chain=found.chain, start=begin).final
    return _checked(replace(found, error=relative(there, visited[0])), most_error)


def _weights(schedule: Schedule, start: Tensor, end: Tensor) -> tuple[list[float], list[float]]:
    """a and b of every step of the deterministic chain."""
    of_x, of_pred, _ = kernel(schedule, start, end, DETERMINISTIC)
    if not bool((of_x.abs() > 0).all()):
        raise UserError(
            f"a step of a model that predicts {schedule.prediction} forgets where it came from, so there is no way "
            "back: invert with a model that predicts eps, v or flow"
        )
    return of_x.tolist(), of_pred.tolist()


def _backwards(
    predict: Callable[[Tensor, Tensor], Tensor], x_next: Tensor, t: Tensor, a: float, b: float, x_t: Tensor
) -> Tensor:
    """Where a step to `x_next` starts if the network predicts what it does at x_t."""
    return (x_next - b * predict(x_t, t)) / a


def _solved(
    back: Callable[[Tensor], Tensor], x_next: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The fixed point [b, ...] of `back`, and how far the last evaluation of each row was from it, [b]."""
    x_t, residual = x_next, x_next.new_full((len(x_next),), torch.inf)
    tried: list[Tensor] = []
    given: list[Tensor] = []
    for _ in range(iterations):
        # A row that has arrived stays, so that it does not depend on those that have not.
        going = residual > tolerance
        if not bool(going.any()):
            break
        tried, given = [*tried[-_DEPTH:], x_t], [*given[-_DEPTH:], back(x_t)]
        residual = torch.where(going, relative(given[-1], x_t), residual)
        x_t = torch.where(going.view(-1, *(1,) * (x_t.ndim - 1)), accelerated(tried, given), x_t)
    return x_t, residual


def accelerated(tried: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """The next point of a fixed-point iteration by Anderson's acceleration, row by row.

    Of what the function gave, the combination whose distance from its own argument would be least if the function were
    linear; of a single point it is what the function gave.

    Args:
        tried: [b, ...] each, the latest last. given: the function's values there.
    """
    if len(tried) == 1:
        return given[-1]
    wide = torch.float32 if given[-1].device.type == "mps" else torch.float64
    gaps = torch.stack([(g - x).flatten(1).to(wide) for x, g in zip(tried, given, strict=True)], dim=1)
    changes = gaps[:, 1:] - gaps[:, :-1]
    square = changes @ changes.mT
    # Changes that are alike, or all zero, are told apart by rounding alone.
    floor = _RIDGE * square.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(wide).tiny
    square = square + floor[:, None, None] * torch.eye(len(tried) - 1, dtype=wide, device=square.device)
    shares = torch.linalg.solve(square, changes @ gaps[:, -1:].mT).to(given[-1].dtype)
    values = torch.stack(list(given), dim=1).flatten(2)
    back = (shares * (values[:, 1:] - values[:, :-1])).sum(1)
    return given[-1] - back.view_as(given[-1])


def _checked(found: Inversion, most_error: float) -> Inversion:
    """Raises UserError where a row does not come back."""
    worst = float(found.error.nan_to_num(nan=math.inf).max()) if found.error is not None else 0.0
    if worst <= most_error:
        return found
    raise UserError(
        f"a rollout from the inverted noise ends {worst:.2g} from the picture, relative, and at most {most_error:g} "
        "is wanted: raise iterations or the number of steps, lower the guidance, or raise most_error"
    )


def relative(x: Tensor, to: Tensor) -> Tensor:
    """|x - to| / |to| of rows, [b]."""
    return (x - to).flatten(1).norm(dim=1) / to.flatten(1).norm(dim=1)
