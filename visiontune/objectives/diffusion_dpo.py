"""Diffusion-DPO: learn from pairs of pictures of which one is preferred.

Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", 2023, arXiv 2311.12908. With e the
mean squared error of the network's prediction, for the preferred picture w and the rejected one l at the same timestep
with the same noise,

    L = -log sigmoid(-(beta / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)])

This is the form of the authors' code. The paper has beta T omega(lambda_t) in the place of beta / 2 and squared norms
in that of means: its beta is smaller by the number of the latent's values. Flow models compare velocities (Liu et al.,
2025, arXiv 2501.13918), with the same weight at every timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from visiontune.core import Batch, Condition, Loss
from visiontune.objectives import denoising
from visiontune.objectives.base import Needs, Tools, combine, condition_of, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Noising):
    """Options of Diffusion-DPO; those of the denoising loss hold for its errors."""

    beta: float = option(
        5000.0, above=0, greatest=1e9, help="how much a difference of errors counts: larger stays closer to the base"
    )
    sft_weight: float = option(
        0.0, least=0, greatest=1e6, help="weight of the denoising loss of the preferred pictures, added"
    )


def build(config: Config) -> DiffusionDPO:
    """The objective that ``config`` describes."""
    return DiffusionDPO(config)


def preference(errors: Tensor, base: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of each pair and the argument of its sigmoid, ``[b]`` each.

    Args:
        errors: ``[2, b]``, of the preferred and the rejected pictures. base: the same of the reference.
    """
    better, worse = errors - base
    inside = -beta / 2 * (better - worse)
    return -logsigmoid(inside), inside


def said(errors: Tensor, base: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """What the log says of some pairs: shares and errors, arguments as for :func:`preference`."""
    names = ("chosen", "rejected", "chosen_base", "rejected_base")
    means = torch.cat([errors.detach(), base]).mean(1)
    right = (inside.detach() > 0).to(means).mean()
    return {"accuracy": right, **dict(zip(names, means.unbind(), strict=True))}


class DiffusionDPO(denoising.Denoising):
    """Logs the share of pairs told apart better than by the base, and the errors of both pictures and models."""

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(columns=("image", "rejected"), optional=("region", "source"), reference=True)

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        if "rejected" not in batch.data:
            raise ValueError("rows without a rejected image: read the data with the column 'rejected'")
        x_0, rejected = _wide(batch.data["image"]), _wide(batch.data["rejected"])
        t, eps = self.noised(model, x_0, batch, tools)
        errors = self.both(model, x_0, rejected, eps, t, condition_of(model, batch))
        with tools.reference(), torch.no_grad():
            base = self.both(model, x_0, rejected, eps, t, condition_of(model, batch))
        rows, inside = preference(errors, base, self.config.beta)
        return Loss(total=combine(rows + self.config.sft_weight * errors[0], batch), terms=said(errors, base, inside))

    def both(
        self, model: DiffusionModel, chosen: Tensor, rejected: Tensor, eps: Tensor, t: Tensor, cond: Condition
    ) -> Tensor:
        """Errors ``[2, b]`` of both pictures, at the same noise and timestep."""
        x_0, noise, twice = torch.cat([chosen, rejected]), torch.cat([eps, eps]), torch.cat([t, t])
        x_t, target = model.schedule.add_noise(x_0, noise, twice), model.schedule.target(x_0, noise, twice)
        return per_row(self.error_map(model, x_t, twice, Condition.cat([cond, cond]), target)).view(2, -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
