"""Pictures of a batch of prompts, drawn and scored without gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.core import Batch
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.trajectory import Keep, Start, Trajectory, rollout
from visiontune.diffusion.transition import Reduce
from visiontune.objectives._online import Stepped, conditions, parts_of, pixels, reward_terms, score
from visiontune.objectives.base import Tools

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel
    from visiontune.models.pipeline import PipelineModel


@torch.no_grad()
def draw(
    objective: Stepped,
    model: DiffusionModel,
    rows: Batch,
    tools: Tools,
    *,
    latents: Tensor | None = None,
    reduce: Reduce = "mean",
) -> Trajectory:
    """The rollout of some rows in one batch; with its history, on the CPU, where the objective needs likelihoods.

    Scored transitions are to be computed again in these same slices, since rounding depends on the batch's shape.

    Args:
        latents: where the rows start, instead of noise of their own.
    """
    config = objective.config
    guidance = objective.guidance(model)
    cond, uncond = conditions(model, rows.prompts, guidance, text=False)
    drawn = rollout(
        model,
        cond,
        uncond=uncond,
        guidance=guidance,
        chain=config.steps,
        dynamics=objective.dynamics,
        start=Start(latents=latents, generator=tools.generators(rows)),
        keep=Keep(log_probs=objective.likelihoods, reduce=reduce),
    )
    # Nothing reads the noise again, which is as large as the history.
    drawn = replace(drawn, noise=None)
    return drawn.to("cpu") if objective.likelihoods else drawn


def draw_scored(
    objective: Stepped, model: DiffusionModel, batch: Batch, tools: Tools, reduce: Reduce = "mean"
) -> tuple[list[Trajectory], Tensor, dict[str, Tensor]]:
    """Rollouts of at most ``micro_batch`` rows each, the rewards ``[b]`` of all their pictures, and their log."""
    size = objective.config.micro_batch
    drawn = [draw(objective, model, rows, tools, reduce=reduce) for rows in parts_of(batch, size)]
    latents = torch.cat([trajectory.final for trajectory in drawn])
    scores = score_latents(model, tools, latents, batch, objective.group, size)
    return drawn, scores["reward"], reward_terms(tools, scores)


@torch.no_grad()
def score_latents(
    model: PipelineModel, tools: Tools, latents: Tensor, batch: Batch, group: int, size: int | None
) -> dict[str, Tensor]:
    """What :func:`score` gives for the pictures of finished latents.

    Pictures are decoded at most ``size`` at a time. They are scored so too, unless the reward is groupwise: it then
    sees each prompt's ``group`` pictures, which are consecutive rows, in a call of their own, however the batch is cut
    and whatever other groups of the same prompt there are.
    """
    whole = size
    if getattr(tools.reward, "groupwise", False):
        whole = group if group > 1 else len(batch)
    found: list[dict[str, Tensor]] = []
    for rows in micro_batches(len(batch), whole):
        drawn = latents[rows].to(model.device)
        shown = torch.cat([pixels(model, part) for part in drawn.split(size or len(drawn))])
        found.append(score(tools, shown, batch[rows]))
    return {name: torch.cat([part[name].detach() for part in found]) for name in found[0]}


def same_prompt(batch: Batch, group: int) -> None:
    """Raises ValueError unless every ``group`` rows in turn have one prompt."""
    prompts = batch.data["prompt"]
    if len(prompts) % group or bool((prompts.view(-1, group) != prompts.view(-1, group)[:, :1]).any()):
        raise ValueError(f"a batch of {len(prompts)} rows is not made of groups of {group} with one prompt each")
