"""Stored transitions under the present weights: what policy gradients and trajectory losses are made of.

Only the trajectory is read: its timesteps, guidance and conditions, never the options of the rollout. At the rollout's
batch shape and precision the log-probabilities come out as they were stored, so a ratio starts at exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from visiontune.core import Condition
from visiontune.diffusion.trajectory import Sampled, Stepper, Trajectory, require_no_memory
from visiontune.diffusion.transition import log_prob

# A quarter of bfloat16's step: enough to round anew, and small enough for what is of second order.
_NUDGE = 2.0**-10

Rows = slice | Tensor | None
Steps = int | Sequence[int] | Tensor | None


def stepper(
    model: Sampled, trajectory: Trajectory, cond: Condition | None = None, uncond: Condition | None = None
) -> Stepper:
    """The chain of a trajectory under the present weights; `cond` and `uncond` may replace the stored ones.

    Raises:
        UserError: its guidance remembers earlier steps.
    """
    require_no_memory(trajectory.guidance)
    return Stepper(
        model=model,
        start=trajectory.timesteps,
        end=trajectory.ends,
        dynamics=trajectory.dynamics,
        cond=trajectory.cond.to(model.device) if cond is None else cond,
        uncond=_moved(trajectory.uncond, model.device) if uncond is None else uncond,
        guidance=trajectory.guidance.begin(model),
    )


def latent(trajectory: Trajectory, i: int | Tensor, device: torch.device) -> Tensor:
    """[b, c, (f), h, w] where the i-th step started (T is the end), in the rollout's precision and without a graph.

    `i` may be [b], each row's own step.
    """
    if trajectory.latents is None:
        raise ValueError("the trajectory has no history: sample it with Keep(history=True)")
    rows: slice | Tensor = slice(None)
    if isinstance(i, Tensor):
        i = i.to(trajectory.latents.device)
        rows = torch.arange(len(trajectory), device=i.device)
    return trajectory.latents[rows, i].detach().to(device, trajectory.final.dtype)


def revisit(
    model: Sampled,
    trajectory: Trajectory,
    step: int | Tensor,
    rows: Rows = None,
    *,
    cond: Condition | None = None,
    uncond: Condition | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean [n, c, (f), h, w] and std [n, 1, ...] of one stored step under the present weights.

    Args:
        model: the model of the rollout.
        trajectory: `b` rows with history.
        step: 0 .. T - 1, or [n] of them on the CPU, each row's own. rows: n of the rows, default all.
        cond, uncond: conditions of the *chosen* rows in the place of the stored ones, where a text encoder is trained.
        checkpoint: keep the inputs alone and compute the step again in the backward pass.
    """
    part = trajectory if rows is None else trajectory[rows]
    chain = stepper(model, part, cond, uncond)
    x = latent(part, step, model.device)
    if checkpoint and torch.is_grad_enabled():
        return torch_checkpoint(chain.step, step, x, use_reentrant=False)
    return chain.step(step, x)


def replay(
    model: Sampled,
    trajectory: Trajectory,
    steps: Steps = None,
    rows: Rows = None,
    *,
    cond: Condition | None = None,
    uncond: Condition | None = None,
    checkpoint: bool = False,
) -> Tensor:
    """Log-probabilities [n, k] of the stored transitions under the present weights, reduced as the trajectory's own.

    Args:
        steps: k of the steps; default those that are `scored`, in order.
        model, trajectory, rows, cond, uncond, checkpoint: as in `revisit`.

    Raises:
        ValueError: a chosen step added no noise.
    """
    part = trajectory if rows is None else trajectory[rows]
    scores = []
    for step in chosen_steps(trajectory, steps):
        mean, std = revisit(model, part, step, cond=cond, uncond=uncond, checkpoint=checkpoint)
        scores.append(log_prob(latent(part, step + 1, model.device), mean, std, trajectory.reduce))
    return torch.stack(scores, dim=1)


@torch.no_grad()
def rounding(model: Sampled, trajectory: Trajectory, steps: Steps = None, rows: Rows = None) -> Tensor:
    """How far rounding alone moves log-probabilities once the weights have changed: a sample [n, k] of it.

    Args:
        model, trajectory, steps, rows: as in `replay`, in the precision that is asked about.
    """
    part = trajectory if rows is None else trajectory[rows]
    chain, found = stepper(model, part), []
    for step in chosen_steps(trajectory, steps):
        x, target = latent(part, step, model.device), latent(part, step + 1, model.device)
        mean, std = chain.step(step, x)

        def mean_at(value: Tensor, step: int = step) -> Tensor:
            return chain.step(step, value)[0]

        moved = mean + rounding_of(mean_at, x, mean)
        found.append(log_prob(target, moved, std, part.reduce) - log_prob(target, mean, std, part.reduce))
    return torch.stack(found, dim=1)


def rounding_of(compute: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> Tensor:
    """A sample of what rounding does to `value`, which is `compute(x)`, from one set of weights to another.

    The same weights round in the same way; others, however close, anew. So does another input: the second difference
    over x - d, x and x + d has no part of first order in d, and is the rounding of three calls.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    d = _NUDGE * noise * x.square().mean().sqrt()
    # The difference of two calls has sqrt(2) of the rounding of one, this one sqrt(6) of it.
    return (compute(x + d) + compute(x - d) - 2 * value) / 3**0.5


@torch.no_grad()
def reference(
    model: Sampled,
    trajectory: Trajectory,
    without: AbstractContextManager[object],
    steps: Steps = None,
    rows: Rows = None,
) -> Tensor:
    """`replay` inside a context manager that makes the model the reference, `adapters.disable()`; no gradient."""
    with without:
        return replay(model, trajectory, steps, rows)


def backpropagate_scores(
    model: Sampled,
    trajectory: Trajectory,
    weights: Tensor,
    *,
    steps: Steps = None,
    micro_batch: int | None = None,
) -> None:
    """Add the gradient of sum(weights * log-probabilities) to the parameters', one step of a micro-batch at a time.

    For losses that see nothing but the matrix of log-probabilities: compute the matrix without gradients, take the
    loss's gradient with respect to it as `weights`, and call this. The memory is that of one denoiser call.

    Args:
        weights: [b, k], detached. A step of a micro-batch whose weights are all 0 costs nothing.
        steps: the k steps; default those that are `scored`.
        micro_batch: rows at a time, default all.
    """
    which = chosen_steps(trajectory, steps)
    if weights.shape != (len(trajectory), len(which)):
        raise ValueError(f"weights of shape {tuple(weights.shape)} for {len(trajectory)} rows and {len(which)} steps")
    for rows in micro_batches(len(trajectory), micro_batch):
        for column, step in enumerate(which):
            weight = weights[rows, column].detach()
            if weight.any():
                score = replay(model, trajectory, step, rows)[:, 0]
                (weight.to(score) * score).sum().backward()


def micro_batches(rows: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` rows."""
    for begin in range(0, rows, size or max(rows, 1)):
        yield slice(begin, min(begin + (size or rows), rows))


def chosen_steps(trajectory: Trajectory, steps: Steps) -> list[int]:
    """The indices that `steps` stands for."""
    if steps is None:
        return torch.nonzero(trajectory.scored).flatten().tolist()
    if isinstance(steps, int):
        return [steps]
    return steps.tolist() if isinstance(steps, Tensor) else list(steps)


def _moved(cond: Condition | None, device: torch.device) -> Condition | None:
    return None if cond is None else cond.to(device)
