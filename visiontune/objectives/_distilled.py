"""What distilling objectives share: states with what a teacher says of them, and the regression to that."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import Embedded, Guidance
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.trajectory import Chain, Keep, Start, Trajectory, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._online import Stepped, SteppedConfig
from visiontune.objectives.base import Tools, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class DistilledConfig(SteppedConfig):
    """Options of a regression to a teacher's predictions; `cfg_scale` and `guidance` are the teacher's."""

    updates: int = option(10, least=1, greatest=65536, help="optimiser steps that share the states of a rollout")
    negative_prompt: str = option("", help="what the teacher is guided away from; fixed by the distillation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """States and what the teacher predicts of them, or where it leads from them.

    Attributes:
        x, target: ``[n, ...]``. t: ``[n]``. cond: of the ``n`` states.
        of_row: how many states of a row of the batch come one after the other.
        end: ``[n]`` the timestep at which the target is, where it is a state too.
    """

    x: Tensor
    t: Tensor
    cond: Condition
    target: Tensor
    of_row: int = 1
    end: Tensor | None = None

    def __getitem__(self, states: slice | Tensor) -> Seen:
        return self._map(lambda value: value[states])

    def to(self, device: torch.device) -> Seen:
        """The same on a device."""
        return self._map(lambda value: value.to(device))

    def part(self, number: int, parts: int) -> Seen:
        """Of each row of the batch every `parts`-th state."""
        return self[torch.arange(len(self.t)).view(-1, self.of_row)[:, number::parts].flatten()]

    def _map(self, change: Callable[[Any], Any]) -> Seen:
        end = None if self.end is None else change(self.end)
        x, t, cond, target = (change(value) for value in (self.x, self.t, self.cond, self.target))
        return Seen(x=x, t=t, cond=cond, target=target, end=end)


class Distilled(Stepped):
    """Logs ``error``, the mean squared difference from the teacher, and ``target``, the teacher's mean square."""

    config: DistilledConfig

    def probe(self, model: DiffusionModel, batch: Batch, tools: Tools) -> None:
        """The student's one call."""
        batch = batch[: self.config.micro_batch or len(batch)]
        shape = model.latent_shape()
        t = model.chain(self.config.steps, shape)[0][:1].to(model.device).expand(len(batch))
        model.predict(torch.randn(len(batch), *shape, device=model.device), t, model.embed(batch.prompts))

    def regress(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        """Add the gradients of the errors at those states of each row whose turn it is."""
        total, terms = torch.zeros((), device=model.device), dict[str, Tensor]()
        mine = [seen.part(part, self.updates) for seen in collected]
        count = sum(len(seen.t) for seen in mine)
        for seen in mine:
            for rows in micro_batches(len(seen.t), self.config.micro_batch):
                cut = seen[rows].to(model.device)
                share = len(cut.t) / count
                with torch.enable_grad():
                    errors, found = self.errors(model, cut)
                    loss = share * errors.mean()
                    (tools.scale * loss).backward()
                total += loss.detach()
                terms = {name: terms.get(name, 0) + share * value for name, value in found.items()}
        return Loss(total=total, terms=terms)

    def visit(
        self, model: DiffusionModel, cond: Condition, guidance: Guidance, chain: Chain, rows: Batch, tools: Tools
    ) -> Trajectory:
        """The rollout of some rows with its history."""
        return rollout(
            model,
            cond,
            uncond=self.away(model, len(rows)) if guidance.contrasts else None,
            guidance=guidance,
            chain=chain,
            dynamics=self.dynamics,
            start=Start(generator=tools.generators(rows)),
            keep=Keep(history=True),
        )

    def away(self, model: DiffusionModel, count: int) -> Condition | None:
        """What the teacher is guided away from; None is the family's own."""
        return model.embed([self.config.negative_prompt] * count) if self.config.negative_prompt else None

    def weight(self, model: DiffusionModel, t: Tensor) -> Tensor | None:
        """What squared errors at timesteps ``[n]`` count, ``[n]``; None for all alike."""
        return None

    def errors(self, model: DiffusionModel, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of each row ``[b]``, and what the log says."""
        pred = model.predict(seen.x, seen.t, seen.cond)
        # The teacher's sum of predictions times w is not to lose what they differ by.
        pred, target = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (pred, seen.target))
        errors, weight = per_row((pred - target).square()), self.weight(model, seen.t)
        terms = {"error": errors.detach().mean(), "target": target.square().mean()}
        return errors if weight is None else errors * weight, terms


def refuse_told(model: Any, guidance: Guidance) -> None:
    """Refuse a model whose network is told a scale, where one strength is learnt.

    Raises:
        UserError: it is.
    """
    if isinstance(guidance, Embedded) or (isinstance(guidance, GuidanceStack) and guidance.told is not None):
        raise UserError(
            f"model '{model.source}' ({model.family}) is told its guidance, and one strength of it is learnt here: "
            "take another model"
        )


def few_sampler(model: Any) -> str:
    """By which a student of a few steps is drawn: ``lcm``, or of flow the model's own."""
    return own_sampler(model) if model.schedule.prediction == "flow" else "lcm"


def own_sampler(model: Any) -> str:
    """The first of a model's samplers, which steps as rollouts do."""
    return next(iter(model.samplers())) if hasattr(model, "samplers") else "model"


def few_facts(teacher: SteppedConfig, steps: int, sampler: str) -> dict[str, str]:
    """For the header: how many steps samplers are to take, by which, and that guidance is inside."""
    guidance = {"cfg_scale": teacher.cfg_scale, **({"guidance": teacher.guidance} if teacher.guidance else {})}
    few = {"steps": steps, "scheduler": sampler}
    return {"distilled_guidance": json.dumps(guidance), "few_steps": json.dumps(few)}


def shuffled(
    x: Tensor,
    t: Tensor,
    cond: Condition,
    target: Tensor,
    generators: Sequence[torch.Generator],
    end: Tensor | None = None,
) -> Seen:
    """The states of a rollout, on the CPU, those of a row in an order of its own.

    Args:
        x, target: ``[b, T, ...]``. t, end: ``[T]``. cond: of the ``b`` rows. generators: of the rows, of their order.
    """
    order = torch.stack([torch.randperm(len(t), generator=rng) for rng in generators])
    row = torch.arange(len(x))[:, None]
    return Seen(
        x=x.cpu()[row, order].flatten(0, 1),
        t=t.cpu()[order].flatten(),
        cond=cond.to("cpu")[row.expand_as(order).flatten()],
        target=target.cpu()[row, order].flatten(0, 1),
        of_row=len(t),
        end=None if end is None else end.cpu()[order].flatten(),
    )
