"""CFG distillation: what a guided model predicts in several calls, learnt by the model in one.

Meng et al., "On Distillation of Guided Diffusion Models", 2023, arXiv 2210.03142, stage 1, with a fixed strength, or
with one that is drawn for each row and told to the student:

    L = mean of omega(t) (f(x_t, t, c) - g(x_t, t, c))^2
    L = mean of omega(t) (f(x_t, t, c, w) - g_w(x_t, t, c))^2,   g_w = u + w (c - u),   w ~ p(w)

with f the trained network for the prompt alone, in one call, and g the untrained one under any guidance, in as many as
that takes. Guidance that is not linear in its scale (rescale, an interval) is learnt as it is. x_t are states of the
teacher's rollouts, whose predictions come with them; of the student's own, which it will meet when it samples
(on-policy); or noised pictures. Only prompts are needed but for the last.

Both sides of the teacher, u and c, give its prediction at every w. So each state is learnt at two, that of its rollout
and the one that lies as far from the other end of the range: what they differ by is due to w alone. This is ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import NO_GUIDANCE, Call, Embedded, Guidance, both_sides, guided
from visiontune.diffusion.timesteps import Timesteps
from visiontune.diffusion.trajectory import Chain, require_no_memory
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._distilled import Distilled, DistilledConfig, Seen, shuffled
from visiontune.objectives._online import parts_of
from visiontune.objectives.base import Needs, Tools, combine
from visiontune.objectives.denoising import min_snr_weight
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(DistilledConfig):
    """Options of CFG distillation; `cfg_scale` and `guidance` are the teacher's."""

    states: Literal["teacher", "student", "data"] = option(
        "teacher",
        help="noisy latents that are learnt from: of rollouts of the guided teacher, or of the student; or pictures of "
        "data.root, noised",
    )
    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of a rollout, each of which gives a state")
    jitter: bool = option(True, help="move a rollout's inner steps by a random share of a step, so that all are seen")
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
    timesteps: Timesteps = option(Timesteps(), help="with states=data, the noise that is trained at")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states != "data" and self.updates > self.steps:
            raise ValueError("updates must be at most steps: each takes states of its own from every rollout")
        if self.w is None:
            return
        if len(self.w) != 2 or not self.w[0] < self.w[1]:
            raise ValueError(f"w must be [least, most], not {self.w}: for one strength leave it out and set cfg_scale")
        if self.w_density == "log-uniform" and self.w[0] == 0:
            raise ValueError("w begins at 0, of which log-uniform has no density: begin above, or take uniform")
        if self.guidance is not None or self.cfg_scale != DistilledConfig.cfg_scale:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides(Guidance):
    """Classifier-free guidance with a scale ``[b]`` for each row, which keeps what it was made of.

    Attributes:
        scales: ``[b]``. sides: ``[b, 2, ...]`` of each call, without the prompt and with it, in order.
    """

    scales: Tensor
    sides: list[Tensor] = field(default_factory=list)

    @property
    def contrasts(self) -> bool:
        return True

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        if uncond is None:
            raise ValueError("classifier-free guidance needs the condition that it guides away from")
        self.sides.append(torch.stack(both_sides(call, x, t, cond, uncond), dim=1))
        return between(self.sides[-1], self.scales)


def between(sides: Tensor, w: Tensor) -> Tensor:
    """``u + w (c - u)`` of u and c ``[b, 2, ...]`` and w ``[b]``."""
    without, given = sides.unbind(1)
    return without + w.to(given).view(-1, *(1,) * (given.ndim - 1)) * (given - without)


class CFGDistill(Distilled):
    """Learns by regression to the guided teacher."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.online:
            self.updates = config.updates

    @property
    def online(self) -> bool:
        """Whether states come from rollouts."""
        return self.config.states != "data"

    @property
    def needs(self) -> Needs:
        columns = () if self.online else ("image",)
        told = self.config.w is not None
        return Needs(columns=columns, online=self.online, reference=True, text=False, told=told)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher that guides as the student does already, or that single steps cannot ask."""
        super().check(model, reward)
        guidance = self.guidance(model)
        told = isinstance(guidance, Embedded) or (isinstance(guidance, GuidanceStack) and guidance.told is not None)
        if told and not (self.config.w and model.blank):
            raise UserError(
                f"model '{model.source}' ({model.family}) has guidance distilled into it already: train it as it is, "
                "or take one without"
            )
        if self.config.w is not None:
            return
        if guidance == NO_GUIDANCE or (isinstance(guidance, GuidanceStack) and all(t.idle for t in guidance.terms)):
            raise UserError("the teacher is not guided: raise objective.cfg_scale, or name terms in objective.guidance")
        edits = isinstance(guidance, GuidanceStack) and bool(guidance.edits)
        if self.config.states != "teacher" or edits:
            require_no_memory(guidance)

    def draw_timesteps(
        self, model: Any, shape: Any, rows: int, rng: torch.Generator, bounds: Tensor | None = None
    ) -> Tensor | None:
        return None if self.online else super().draw_timesteps(model, shape, rows, rng, bounds)

    def facts(self) -> dict[str, str]:
        """The teacher's guidance, by which samplers know that the result is to be drawn without."""
        config, terms = self.config, self.config.guidance or []
        guidance = {"cfg_scale": config.cfg_scale, **({"guidance": terms} if terms else {})}
        told = {"w": config.w, "w_density": config.w_density}
        return {"distilled_guidance": json.dumps(guidance if config.w is None else told)}

    # -- states of pictures -------------------------------------------------------------------------------------

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        """Of noised pictures."""
        x_0 = batch.data["image"].float()
        t = self.config.timesteps.draw(model, x_0.shape[1:], len(x_0), tools.rng, batch.data.get("quantile"))
        t, eps = t.to(x_0.device), torch.randn(x_0.shape, generator=tools.rng).to(x_0.device)
        x_t = model.schedule.add_noise(x_0, eps, t)
        w = None if self.config.w is None else self._strengths(torch.rand(len(x_0), generator=tools.rng))
        with tools.reference(), torch.no_grad():
            cond = _told(model.embed(batch.prompts) if batch.cond is None else batch.cond, w)
            target = self._target(model, x_t, t, cond, w)
        errors, terms = self.errors(model, Seen(x=x_t, t=t, cond=cond, target=target))
        return Loss(total=combine(errors, batch), terms=terms)

    # -- states of rollouts -------------------------------------------------------------------------------------

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Seen]:
        """All states of a rollout of each prompt, those of a row in an order of its own, on the CPU."""
        chain = self._chain(model, tools)
        visit = self._of_teacher if self.config.states == "teacher" else self._of_student
        return [visit(model, rows, chain, tools) for rows in parts_of(batch, self.config.micro_batch)]

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        return self.regress(model, collected, part, tools)

    def _of_teacher(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        w, noted = self._drawn_strengths(rows, tools), Noted(inner=self.guidance(model))
        sides = None if w is None else Sides(scales=w.to(model.device))
        with tools.reference():
            drawn = self.visit(model, _told(model.embed(rows.prompts), w), sides or noted, chain, rows, tools)
        assert drawn.latents is not None
        target = torch.stack(noted.predictions if sides is None else sides.sides, dim=1)
        return shuffled(drawn.latents[:, :-1], drawn.timesteps, drawn.cond, target, tools.generators(rows, "order"))

    def _of_student(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        w, targets = self._drawn_strengths(rows, tools), []
        drawn = self.visit(model, _told(model.embed(rows.prompts), w), NO_GUIDANCE, chain, rows, tools)
        assert drawn.latents is not None
        with tools.reference():
            for x, t in zip(drawn.latents[:, :-1].unbind(1), drawn.timesteps.to(model.device), strict=True):
                targets.append(self._target(model, x, t.expand(len(x)), drawn.cond, w))
        target = torch.stack(targets, dim=1)
        return shuffled(drawn.latents[:, :-1], drawn.timesteps, drawn.cond, target, tools.generators(rows, "order"))

    def _target(self, model: DiffusionModel, x: Tensor, t: Tensor, cond: Condition, w: Tensor | None) -> Tensor:
        """What the teacher, which the model is here, predicts ``[b, ...]``; of a range its sides ``[b, 2, ...]``."""
        away = self.away(model, len(x))
        if w is None:
            return guided(model, x, t, cond, away, self.guidance(model))
        sides = Sides(scales=w.to(model.device))
        guided(model, x, t, cond, away, sides)
        return sides.sides[0]

    def errors(self, model: DiffusionModel, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a range, at the strength of each row and at the other one."""
        if self.config.w is None:
            return super().errors(model, seen)
        own = seen.cond.extra["guidance"]
        found = []
        for w in (own, self._other(own)):
            told = replace(seen, cond=_told(seen.cond, w), target=between(seen.target, w))
            found.append(super().errors(model, told))
        (errors, terms), (others, further) = found
        return (errors + others) / 2, {name: (terms[name] + further[name]) / 2 for name in terms}

    def weight(self, model: DiffusionModel, t: Tensor) -> Tensor | None:
        """Min-SNR, where it is asked for."""
        schedule, gamma = model.schedule, self.config.snr_gamma
        return None if gamma is None else min_snr_weight(schedule.snr(t), gamma, schedule.prediction)

    def _chain(self, model: DiffusionModel, tools: Tools) -> Chain:
        start, end = model.chain(self.config.steps, model.latent_shape())
        if not self.config.jitter:
            return start, end
        return jittered(start, float(torch.rand((), generator=tools.shared("jitter"))), end[-1:])

    def _drawn_strengths(self, rows: Batch, tools: Tools) -> Tensor | None:
        if self.config.w is None:
            return None
        return self._strengths(torch.cat([torch.rand(1, generator=rng) for rng in tools.generators(rows, "w")]))

    def _strengths(self, quantiles: Tensor) -> Tensor:
        """w ``[b]`` of where in the density they stand, in [0, 1)."""
        assert self.config.w is not None
        least, most = self.config.w
        if self.config.w_density == "uniform":
            return least + quantiles * (most - least)
        return least * (most / least) ** quantiles

    def _other(self, w: Tensor) -> Tensor:
        """As far from one end of the range, by its density, as w ``[b]`` is from the other."""
        assert self.config.w is not None
        least, most = self.config.w
        return least + most - w if self.config.w_density == "uniform" else least * most / w


def _told(cond: Condition, w: Tensor | None) -> Condition:
    """The condition of a student that is told strengths ``w`` ``[b]``, if it is."""
    return cond if w is None else replace(cond, extra={**cond.extra, "guidance": w.to(cond.tokens.device)})


def jittered(start: Tensor, share: float, end: Tensor) -> Chain:
    """A chain whose inner steps begin a share of a step earlier, at higher noise.

    Args:
        start: ``[T]`` timesteps, falling; whole ones stay whole. share: in [0, 1). end: ``[1]``, of the last step.
    """
    moved = start[1:] + share * (start[:-1] - start[1:])
    begin = torch.cat([start[:1], moved if start.is_floating_point() else moved.floor().to(start.dtype)])
    return begin, torch.cat([begin[1:], end])
