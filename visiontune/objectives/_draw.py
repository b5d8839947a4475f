"""Pictures of a batch of prompts, drawn and scored without gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from visiontune.core import Batch
from visiontune.diffusion.dynamics import Dynamics
from visiontune.diffusion.trajectory import Trajectory, rollout
from visiontune.diffusion.transition import Reduce
from visiontune.errors import UserError
from visiontune.objectives._online import Tools, conditions, parts_of, pixels, score

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel


@torch.no_grad()
def draw(
    model: DiffusionModel,
    batch: Batch,
    tools: Tools,
    *,
    steps: int,
    cfg_scale: float,
    dynamics: Dynamics,
    group: int,
    micro_batch: int | None,
    reduce: Reduce = "mean",
    log_probs: bool = False,
) -> tuple[list[Trajectory], Tensor]:
    """Rollouts of at most ``micro_batch`` rows each, and the rewards ``[b]`` of their pictures.

    Scored transitions are computed again in these same slices, since rounding depends on the batch's shape. Rewards see
    whole groups.

    Raises:
        UserError: text encoders are trained, which would get no gradient from frozen conditions.
    """
    if tools.text:
        raise UserError("objective keeps the conditions of its rollouts: set train.text_encoder=false")
    trajectories, images = [], []
    for rows in parts_of(batch, micro_batch):
        cond, uncond = conditions(model, rows.prompts, cfg_scale, text=False)
        drawn = rollout(
            model,
            cond,
            uncond=uncond,
            cfg_scale=cfg_scale,
            steps=steps,
            dynamics=dynamics,
            generator=tools.generators(rows),
            reduce=reduce,
            log_probs=log_probs,
        )
        images.append(pixels(model, drawn.final))
        # The history holds all that the noise has to say.
        trajectories.append(replace(drawn, noise=None).to("cpu" if log_probs else drawn.final.device))
    whole = group * -(-(micro_batch or len(batch)) // group)
    parts = zip(torch.cat(images).split(whole), parts_of(batch, whole), strict=True)
    return trajectories, torch.cat([score(tools, shown, rows) for shown, rows in parts])


def same_prompt(batch: Batch, group: int) -> None:
    """Raises ValueError unless every ``group`` rows in turn have one prompt."""
    prompts = batch.extra["prompt"]
    if len(prompts) % group or bool((prompts.view(-1, group) != prompts.view(-1, group)[:, :1]).any()):
        raise ValueError(f"a batch of {len(prompts)} rows is not made of groups of {group} with one prompt each")
