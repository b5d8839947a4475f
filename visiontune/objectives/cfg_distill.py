"""CFG distillation: what a guided model predicts in several calls, learnt by the model in one.

Meng et al., "On Distillation of Guided Diffusion Models", 2023, arXiv 2210.03142, stage 1, with a fixed strength:

    L = mean of w(t) (f(x_t, t, c) - g(x_t, t, c))^2

with f the trained network for the prompt alone, in one call, and g the untrained one under any guidance, in as many as
that takes. Guidance that is not linear in its scale (rescale, an interval) is learnt as it is. x_t are states of the
teacher's rollouts, whose predictions come with them; of the student's own, which it will meet when it samples
(on-policy); or noised pictures. Only prompts are needed but for the last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import NO_GUIDANCE, Call, Embedded, Guidance, guided
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.timesteps import Timesteps
from visiontune.diffusion.trajectory import Chain, Keep, Start, Trajectory, require_no_memory, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._online import Stepped, SteppedConfig, parts_of
from visiontune.objectives.base import Needs, Tools, combine, per_row
from visiontune.objectives.denoising import min_snr_weight
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(SteppedConfig):
    """Options of CFG distillation; `cfg_scale` and `guidance` are the teacher's."""

    states: Literal["teacher", "student", "data"] = option(
        "teacher",
        help="noisy latents that are learnt from: of rollouts of the guided teacher, or of the student; or pictures of "
        "data.root, noised",
    )
    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of a rollout, each of which gives a state")
    updates: int = option(10, least=1, greatest=65536, help="optimiser steps that share the states of a rollout")
    jitter: bool = option(True, help="move a rollout's inner steps by a random share of a step, so that all are seen")
    negative_prompt: str = option("", help="what the teacher is guided away from; fixed by the distillation")
    snr_gamma: float | None = option(
        None, above=0, greatest=1e6, help="min-SNR weighting with this gamma (5 is usual); null weighs every t alike"
    )
    timesteps: Timesteps = option(Timesteps(), help="with states=data, the noise that is trained at")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states != "data" and self.updates > self.steps:
            raise ValueError("updates must be at most steps: each takes states of its own from every rollout")


def build(config: Config) -> CFGDistill:
    """The objective that ``config`` describes."""
    return CFGDistill(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """States and what the teacher predicts of them.

    Attributes:
        x, target: ``[n, ...]``. t: ``[n]``. cond: of the ``n`` states.
        of_row: how many states of a row of the batch come one after the other.
    """

    x: Tensor
    t: Tensor
    cond: Condition
    target: Tensor
    of_row: int = 1

    def __getitem__(self, states: slice | Tensor) -> Seen:
        return Seen(x=self.x[states], t=self.t[states], cond=self.cond[states], target=self.target[states])

    def to(self, device: torch.device) -> Seen:
        """The same on a device."""
        return Seen(x=self.x.to(device), t=self.t.to(device), cond=self.cond.to(device), target=self.target.to(device))

    def part(self, number: int, parts: int) -> Seen:
        """Of each row of the batch every `parts`-th state."""
        return self[torch.arange(len(self.t)).view(-1, self.of_row)[:, number::parts].flatten()]


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


class CFGDistill(Stepped):
    """Logs ``error``, the mean squared difference from the teacher, and ``target``, the teacher's mean square."""

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
        return Needs(columns=() if self.online else ("image",), online=self.online, reference=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher that guides as the student does already, or that single steps cannot ask."""
        super().check(model, reward)
        guidance = self.guidance(model)
        told = isinstance(guidance, Embedded) or (isinstance(guidance, GuidanceStack) and guidance.told is not None)
        if told:
            raise UserError(
                f"model '{model.source}' ({model.family}) has guidance distilled into it already: train it as it is, "
                "or take one without"
            )
        if guidance == NO_GUIDANCE or (isinstance(guidance, GuidanceStack) and all(t.idle for t in guidance.terms)):
            raise UserError("the teacher is not guided: raise objective.cfg_scale, or name terms in objective.guidance")
        edits = isinstance(guidance, GuidanceStack) and bool(guidance.edits)
        if self.config.states != "teacher" or edits:
            require_no_memory(guidance)

    def draw_timesteps(self, model: Any, shape: Any, rows: int, rng: torch.Generator) -> Tensor | None:
        return None if self.online else super().draw_timesteps(model, shape, rows, rng)

    def facts(self) -> dict[str, str]:
        """The teacher's guidance, by which samplers know that the result is to be drawn without."""
        terms = self.config.guidance or []
        guidance = {"cfg_scale": self.config.cfg_scale, **({"guidance": terms} if terms else {})}
        return {"distilled_guidance": json.dumps(guidance)}

    def probe(self, model: DiffusionModel, batch: Batch, tools: Tools) -> None:
        """The student's one call."""
        batch = batch[: self.config.micro_batch or len(batch)]
        shape = model.latent_shape()
        t = model.chain(self.config.steps, shape)[0][:1].to(model.device).expand(len(batch))
        model.predict(torch.randn(len(batch), *shape, device=model.device), t, model.embed(batch.prompts))

    # -- states of pictures -------------------------------------------------------------------------------------

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        """Of noised pictures."""
        x_0 = batch.data["image"].float()
        t = self.config.timesteps.draw(model, x_0.shape[1:], len(x_0), tools.rng, batch.data.get("quantile"))
        t, eps = t.to(x_0.device), torch.randn(x_0.shape, generator=tools.rng).to(x_0.device)
        x_t = model.schedule.add_noise(x_0, eps, t)
        with tools.reference(), torch.no_grad():
            cond = model.embed(batch.prompts) if batch.cond is None else batch.cond
            target = guided(model, x_t, t, cond, self._negative(model, len(x_t)), self.guidance(model))
        errors, terms = self._errors(model, Seen(x=x_t, t=t, cond=cond, target=target))
        return Loss(total=combine(errors, batch), terms=terms)

    # -- states of rollouts -------------------------------------------------------------------------------------

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Seen]:
        """All states of a rollout of each prompt, those of a row in an order of its own, on the CPU."""
        chain = self._chain(model, tools)
        visit = self._of_teacher if self.config.states == "teacher" else self._of_student
        return [visit(model, rows, chain, tools) for rows in parts_of(batch, self.config.micro_batch)]

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        """Of each row the states whose turn it is."""
        total, terms = torch.zeros((), device=model.device), dict[str, Tensor]()
        mine = [seen.part(part, self.updates) for seen in collected]
        count = sum(len(seen.t) for seen in mine)
        for seen in mine:
            for rows in micro_batches(len(seen.t), self.config.micro_batch):
                cut = seen[rows].to(model.device)
                share = len(cut.t) / count
                with torch.enable_grad():
                    errors, found = self._errors(model, cut)
                    loss = share * errors.mean()
                    (tools.scale * loss).backward()
                total += loss.detach()
                terms = {name: terms.get(name, 0) + share * value for name, value in found.items()}
        return Loss(total=total, terms=terms)

    def _of_teacher(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        with tools.reference():
            noted = Noted(inner=self.guidance(model))
            drawn = self._rollout(model, model.embed(rows.prompts), noted, chain, rows, tools)
        return _seen(drawn, torch.stack(noted.predictions, dim=1), tools.generators(rows, "order"))

    def _of_student(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        drawn = self._rollout(model, model.embed(rows.prompts), NO_GUIDANCE, chain, rows, tools)
        assert drawn.latents is not None
        teacher, away, targets = self.guidance(model), self._negative(model, len(rows)), []
        with tools.reference():
            for x, t in zip(drawn.latents[:, :-1].unbind(1), drawn.timesteps.to(model.device), strict=True):
                targets.append(guided(model, x, t.expand(len(x)), drawn.cond, away, teacher))
        return _seen(drawn, torch.stack(targets, dim=1), tools.generators(rows, "order"))

    def _rollout(
        self, model: DiffusionModel, cond: Condition, guidance: Guidance, chain: Chain, rows: Batch, tools: Tools
    ) -> Trajectory:
        return rollout(
            model,
            cond,
            uncond=self._negative(model, len(rows)) if guidance.contrasts else None,
            guidance=guidance,
            chain=chain,
            dynamics=self.dynamics,
            start=Start(generator=tools.generators(rows)),
            keep=Keep(history=True),
        )

    def _chain(self, model: DiffusionModel, tools: Tools) -> Chain:
        start, end = model.chain(self.config.steps, model.latent_shape())
        if not self.config.jitter:
            return start, end
        return jittered(start, float(torch.rand((), generator=tools.shared("jitter"))), end[-1:])

    def _negative(self, model: DiffusionModel, count: int) -> Condition | None:
        """What the teacher is guided away from; None is the family's own."""
        return model.embed([self.config.negative_prompt] * count) if self.config.negative_prompt else None

    def _errors(self, model: DiffusionModel, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of each row ``[b]``, and what the log says."""
        pred = model.predict(seen.x, seen.t, seen.cond)
        # The teacher's sum of predictions times w is not to lose what they differ by.
        pred, target = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (pred, seen.target))
        errors = per_row((pred - target).square())
        terms = {"error": errors.detach().mean(), "target": target.square().mean()}
        if self.config.snr_gamma is not None:
            schedule = model.schedule
            errors = errors * min_snr_weight(schedule.snr(seen.t), self.config.snr_gamma, schedule.prediction)
        return errors, terms


def jittered(start: Tensor, share: float, end: Tensor) -> Chain:
    """A chain whose inner steps begin a share of a step earlier, at higher noise.

    Args:
        start: ``[T]`` timesteps, falling; whole ones stay whole. share: in [0, 1). end: ``[1]``, of the last step.
    """
    moved = start[1:] + share * (start[:-1] - start[1:])
    begin = torch.cat([start[:1], moved if start.is_floating_point() else moved.floor().to(start.dtype)])
    return begin, torch.cat([begin[1:], end])


def _seen(drawn: Trajectory, target: Tensor, generators: Sequence[torch.Generator]) -> Seen:
    """The states of a rollout.

    Args:
        target: ``[b, T, ...]``. generators: of each row the order of its states.
    """
    assert drawn.latents is not None
    order = torch.stack([torch.randperm(drawn.steps, generator=rng) for rng in generators])
    row = torch.arange(len(drawn))[:, None]
    return Seen(
        x=drawn.latents.cpu()[row, order].flatten(0, 1),
        t=drawn.timesteps[order].flatten(),
        cond=drawn.cond.to("cpu")[row.expand_as(order).flatten()],
        target=target.cpu()[row, order].flatten(0, 1),
        of_row=drawn.steps,
    )
