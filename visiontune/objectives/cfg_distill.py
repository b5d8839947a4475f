"""CFG distillation: what a guided model predicts in several calls, learnt by the model in one.

Meng et al., "On Distillation of Guided Diffusion Models", 2023, arXiv 2210.03142, stage 1, with a fixed strength:

    L = mean of w(t) (f(x_t, t, c) - g(x_t, t, c))^2

with f the trained network for the prompt alone, in one call, and g the untrained one under any guidance, in as many as
that takes. Guidance that is not linear in its scale (rescale, an interval) is learnt as it is. x_t are states of the
teacher's rollouts, whose predictions come with them; of the student's own, which it will meet when it samples
(on-policy); or noised pictures. Only prompts are needed but for the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition
from visiontune.diffusion.guidance import NO_GUIDANCE, Call, Guidance, guided
from visiontune.diffusion.trajectory import Chain
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._distill import Distillation, DistillConfig, Seen, states_of
from visiontune.objectives.base import Tools, per_row
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
    snr_gamma: float | None = option(
        None, above=0, greatest=1e6, help="min-SNR weighting with this gamma (5 is usual); null weighs every t alike"
    )


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

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher that is not guided."""
        super().check(model, reward)
        guidance = self.guidance(model)
        if guidance == NO_GUIDANCE or (isinstance(guidance, GuidanceStack) and all(t.idle for t in guidance.terms)):
            raise UserError("the teacher is not guided: raise objective.cfg_scale, or name terms in objective.guidance")

    def visited(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        visit = self._of_teacher if self.config.states == "teacher" else self._of_student
        return visit(model, rows, chain, tools)

    def noised(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None) -> Seen:
        target = guided(model, x_t, t, cond, uncond, self.guidance(model))
        return Seen(x=x_t, t=t, end=t, cond=cond, target=target)

    def _of_teacher(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        with tools.reference():
            noted = Noted(inner=self.guidance(model))
            drawn = self.rollout(model, model.embed(rows.prompts), noted, chain, rows, tools)
        return states_of(drawn, torch.stack(noted.predictions, dim=1), tools.generators(rows, "order"))

    def _of_student(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        drawn = self.rollout(model, model.embed(rows.prompts), NO_GUIDANCE, chain, rows, tools)
        assert drawn.latents is not None
        teacher, away, targets = self.guidance(model), self.negative(model, len(rows)), []
        with tools.reference():
            for x, t in zip(drawn.latents[:, :-1].unbind(1), drawn.timesteps.to(model.device), strict=True):
                targets.append(guided(model, x, t.expand(len(x)), drawn.cond, away, teacher))
        return states_of(drawn, torch.stack(targets, dim=1), tools.generators(rows, "order"))

    def errors(self, model: DiffusionModel, seen: Seen, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        pred = model.predict(seen.x, seen.t, seen.cond)
        # The teacher's sum of predictions times w is not to lose what they differ by.
        pred, target = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (pred, seen.target))
        errors = per_row((pred - target).square())
        terms = {"error": errors.detach().mean(), "target": target.square().mean()}
        if self.config.snr_gamma is not None:
            schedule = model.schedule
            errors = errors * min_snr_weight(schedule.snr(seen.t), self.config.snr_gamma, schedule.prediction)
        return errors, terms
