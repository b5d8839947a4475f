"""CFG distillation: what a guided model predicts in several calls, learnt by the model in one.

Meng et al., "On Distillation of Guided Diffusion Models", 2023, arXiv 2210.03142, stage 1, with a fixed strength, or
with one that is drawn for each row and told to the student:

    L = mean of omega(t) (f(x_t, t, c) - g(x_t, t, c))^2
    L = mean of omega(t) (f(x_t, t, c, w) - g_w(x_t, t, c))^2,   g_w = u + w (c - u),   w ~ p(w)

with f the trained network for the prompt alone, in one call, and g the untrained one under any guidance, in as many as
that takes. Guidance that is not linear in its scale (rescale, an interval) is learnt as it is. x_t are states of the
teacher's rollouts, whose predictions come with them; of the student's own, which it will meet when it samples
(on-policy); or noised pictures. Only prompts are needed but for the last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition
from visiontune.diffusion.guidance import NO_GUIDANCE, Call, Guidance, RowCFG, guided
from visiontune.diffusion.trajectory import Chain
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._distill import Distillation, DistillConfig, Seen, square_errors, states_of
from visiontune.objectives.base import Needs, Tools
from visiontune.objectives.denoising import min_snr_weight
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(DistillConfig):
    """Options of CFG distillation."""

    states: Literal["teacher", "student", "data"] = option(
        "teacher",
        help="noisy latents that are learnt from: of rollouts of the guided teacher, or of the student; or pictures of "
        "data.root, noised",
    )
    w: list[float] | None = option(
        None,
        least=0,
        greatest=1000,
        help="[least, most]: strengths that one student learns and is told, in the place of cfg_scale",
    )
    w_density: Literal["uniform", "log-uniform"] = option("uniform", help="of w, over that range")
    snr_gamma: float | None = option(
        None, above=0, greatest=1e6, help="min-SNR weighting with this gamma (5 is usual); null weighs every t alike"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.w is None:
            return
        if len(self.w) != 2 or not self.w[0] < self.w[1]:
            raise ValueError(f"w must be [least, most], not {self.w}: for one strength leave it out and set cfg_scale")
        if self.w_density == "log-uniform" and self.w[0] == 0:
            raise ValueError("w begins at 0, of which log-uniform has no density: begin above, or take uniform")
        if self.guidance is not None or self.cfg_scale != DistillConfig.cfg_scale:
            other = "cfg_scale" if self.guidance is None else "guidance"
            raise ValueError(f"w is the strength of the teacher, and {other} has one of its own: leave one of them out")


def build(config: Config) -> CFGDistill:
    """The objective that ``config`` describes."""
    return CFGDistill(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Noted(Guidance):
    """Guidance whose predictions are kept.

    Attributes:
        inner: the guidance. predictions: ``[b, ...]`` of each call, in order.
    """

    inner: Guidance
    predictions: list[Tensor] = field(default_factory=list)

    @property
    def contrasts(self) -> bool:
        return self.inner.contrasts

    @property
    def remembers(self) -> bool:
        return self.inner.remembers

    def begin(self, *args: Any, **kwargs: Any) -> Guidance:
        return replace(self, inner=self.inner.begin(*args, **kwargs))

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        self.predictions.append(self.inner(call, x, t, level, cond, uncond))
        return self.predictions[-1]


class CFGDistill(Distillation):
    """Logs ``error``, the mean squared difference from the teacher, and ``target``, the teacher's mean square."""

    config: Config

    @property
    def needs(self) -> Needs:
        return replace(super().needs, told=self.config.w is not None)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher that is not guided."""
        super().check(model, reward)
        if self.config.w is not None:
            return
        guidance = self.guidance(model)
        if guidance == NO_GUIDANCE or (isinstance(guidance, GuidanceStack) and all(t.idle for t in guidance.terms)):
            raise UserError("the teacher is not guided: raise objective.cfg_scale, or name terms in objective.guidance")

    def facts(self) -> dict[str, str]:
        """The teacher's guidance, or the strengths that the student is told."""
        config = self.config
        told = {"w": config.w, "w_density": config.w_density}
        return super().facts() if config.w is None else {"distilled_guidance": json.dumps(told)}

    def condition(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Condition:
        cond = super().condition(model, batch, tools)
        return cond if self.config.w is None else self._told(cond, torch.rand(len(cond), generator=tools.rng))

    def visited(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        visit = self._of_teacher if self.config.states == "teacher" else self._of_student
        return visit(model, rows, chain, tools)

    def noised(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None) -> Seen:
        target = guided(model, x_t, t, cond, uncond, self._teacher(model, cond))
        return Seen(x=x_t, t=t, end=t, cond=cond, target=target)

    def _of_teacher(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        with tools.reference():
            cond = self._drawn_condition(model, rows, tools)
            noted = Noted(inner=self._teacher(model, cond))
            drawn = self.rollout(model, cond, noted, chain, rows, tools)
        return states_of(drawn, torch.stack(noted.predictions, dim=1), tools.generators(rows, "order"))

    def _of_student(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        drawn = self.rollout(model, self._drawn_condition(model, rows, tools), NO_GUIDANCE, chain, rows, tools)
        assert drawn.latents is not None
        teacher, away, targets = self._teacher(model, drawn.cond), self.negative(model, len(rows)), []
        with tools.reference():
            for x, t in zip(drawn.latents[:, :-1].unbind(1), drawn.timesteps.to(model.device), strict=True):
                targets.append(guided(model, x, t.expand(len(x)), drawn.cond, away, teacher))
        return states_of(drawn, torch.stack(targets, dim=1), tools.generators(rows, "order"))

    def errors(self, model: DiffusionModel, seen: Seen, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        errors, terms = square_errors(model, seen)
        if self.config.snr_gamma is not None:
            schedule = model.schedule
            errors = errors * min_snr_weight(schedule.snr(seen.t), self.config.snr_gamma, schedule.prediction)
        return errors, terms

    # -- strengths that are told --------------------------------------------------------------------------------

    def _teacher(self, model: DiffusionModel, cond: Condition) -> Guidance:
        """The teacher's guidance, of the strengths that the student is told, if it is."""
        return self.guidance(model) if self.config.w is None else RowCFG(scales=cond.extra["guidance"])

    def _drawn_condition(self, model: DiffusionModel, rows: Batch, tools: Tools) -> Condition:
        cond = model.embed(rows.prompts)
        if self.config.w is None:
            return cond
        return self._told(cond, torch.cat([torch.rand(1, generator=rng) for rng in tools.generators(rows, "w")]))

    def _told(self, cond: Condition, quantiles: Tensor) -> Condition:
        """The condition with the strengths that stand at ``quantiles`` ``[b]`` of the density."""
        return replace(cond, extra={**cond.extra, "guidance": self.strengths(quantiles).to(cond.tokens.device)})

    def strengths(self, quantiles: Tensor) -> Tensor:
        """w ``[b]`` of where in the density they stand, in [0, 1)."""
        assert self.config.w is not None
        least, most = self.config.w
        if self.config.w_density == "uniform":
            return least + quantiles * (most - least)
        return least * (most / least) ** quantiles
