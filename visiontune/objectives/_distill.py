"""What distillations share: the teacher's options, states of rollouts or of pictures, and their gradients."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import Embedded, Guidance
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.timesteps import Timesteps
from visiontune.diffusion.trajectory import Chain, Keep, Start, Trajectory, require_no_memory, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives._online import Stepped, SteppedConfig, parts_of
from visiontune.objectives.base import Needs, Tools, combine, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(SteppedConfig):
    """Options of learning what a teacher says; `cfg_scale` and `guidance` are the teacher's."""

    updates: int = option(10, least=1, greatest=65536, help="optimiser steps that share the states of a rollout")
    negative_prompt: str = option("", help="what the teacher is guided away from; fixed by the distillation")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RegressionConfig):
    """Options of a distillation.

    Attributes:
        states: where noisy latents come from; `data` are the user's pictures, and all else are rollouts.
    """

    states: str
    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of a rollout, each of which gives a state")
    jitter: bool = option(True, help="move a rollout's inner steps by a random share of a step, so that all are seen")
    timesteps: Timesteps = option(Timesteps(), help="with states=data, the noise that is trained at")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states != "data" and self.updates > self.steps:
            raise ValueError("updates must be at most steps: each takes states of its own from every rollout")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """States, where a step leads from them, and what is to be learnt of them.

    Attributes:
        x, target: ``[n, ...]``. t, end: ``[n]`` timesteps. cond: of the ``n`` states.
        of_row: how many states of a row of the batch come one after the other.
    """

    x: Tensor
    t: Tensor
    end: Tensor
    cond: Condition
    target: Tensor
    of_row: int = 1

    def __getitem__(self, states: slice | Tensor) -> Seen:
        return self._map(lambda value: value[states])

    def to(self, device: torch.device) -> Seen:
        """The same on a device."""
        return self._map(lambda value: value.to(device))

    def part(self, number: int, parts: int) -> Seen:
        """Of each row of the batch every `parts`-th state."""
        return self[torch.arange(len(self.t)).view(-1, self.of_row)[:, number::parts].flatten()]

    def _map(self, change: Callable[[Any], Any]) -> Seen:
        names = ("x", "t", "end", "cond", "target")
        return Seen(**{name: change(getattr(self, name)) for name in names})


class Regression(Stepped):
    """Learns at states of rollouts what a teacher says of them."""

    config: RegressionConfig

    @abstractmethod
    def errors(self, model: DiffusionModel, seen: Seen, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted error of each state ``[n]``, and what the log says."""

    def probe(self, model: DiffusionModel, batch: Batch, tools: Tools) -> None:
        """The student's one call."""
        batch = batch[: self.config.micro_batch or len(batch)]
        shape = model.latent_shape()
        t = model.chain(self.config.steps, shape)[0][:1].to(model.device).expand(len(batch))
        model.predict(torch.randn(len(batch), *shape, device=model.device), t, model.embed(batch.prompts))

    def regress(self, model: DiffusionModel, collected: Sequence[Seen], part: int, tools: Tools) -> Loss:
        """Add the gradients of the errors at those states of each row whose turn it is."""
        total, terms = torch.zeros((), device=model.device), dict[str, Tensor]()
        mine = [seen.part(part, self.updates) for seen in collected]
        count = sum(len(seen.t) for seen in mine)
        for seen in mine:
            for rows in micro_batches(len(seen.t), self.config.micro_batch):
                cut = seen[rows].to(model.device)
                share = len(cut.t) / count
                with torch.enable_grad():
                    errors, found = self.errors(model, cut, tools)
                    loss = share * errors.mean()
                    (tools.scale * loss).backward()
                total += loss.detach()
                terms = {name: terms.get(name, 0) + share * value for name, value in found.items()}
        return Loss(total=total, terms=terms)

    def rollout(
        self, model: DiffusionModel, cond: Condition, guidance: Guidance, chain: Chain, rows: Batch, tools: Tools
    ) -> Trajectory:
        """Of some prompts, along a chain, with all its states."""
        return rollout(
            model,
            cond,
            uncond=self.negative(model, len(rows)) if guidance.contrasts else None,
            guidance=guidance,
            chain=chain,
            dynamics=self.dynamics,
            start=Start(generator=tools.generators(rows)),
            keep=Keep(history=True),
        )

    def negative(self, model: DiffusionModel, count: int) -> Condition | None:
        """What the teacher is guided away from; None is the family's own."""
        return model.embed([self.config.negative_prompt] * count) if self.config.negative_prompt else None


class Distillation(Regression):
    """A student that is to do in fewer calls what a guided teacher, the untrained model, does."""

    config: DistillConfig

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        if self.online:
            self.updates = config.updates

    @abstractmethod
    def visited(self, model: DiffusionModel, rows: Batch, chain: Chain, tools: Tools) -> Seen:
        """The states of a rollout of some prompts, in an order of each row's own, on the CPU."""

    @abstractmethod
    def noised(self, model: DiffusionModel, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None) -> Seen:
        """Noised pictures ``x_t`` at ``t`` as states, called where the model is the teacher."""

    @property
    def online(self) -> bool:
        """Whether states come from rollouts."""
        return self.config.states != "data"

    @property
    def needs(self) -> Needs:
        return Needs(columns=() if self.online else ("image",), online=self.online, reference=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher whose guidance the model is told, or that single steps cannot ask."""
        super().check(model, reward)
        guidance = self.guidance(model)
        told = isinstance(guidance, Embedded) or (isinstance(guidance, GuidanceStack) and guidance.told is not None)
        if told and not (self.needs.told and model.blank):
            raise UserError(
                f"model '{model.source}' ({model.family}) has guidance distilled into it already: train it as it is, "
                "or take one without"
            )
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

    # -- states of pictures -------------------------------------------------------------------------------------

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        """Of noised pictures."""
        x_0 = batch.data["image"].float()
        t = self.config.timesteps.draw(model, x_0.shape[1:], len(x_0), tools.rng, batch.data.get("quantile"))
        t, eps = t.to(x_0.device), torch.randn(x_0.shape, generator=tools.rng).to(x_0.device)
        x_t = model.schedule.add_noise(x_0, eps, t)
        with tools.reference(), torch.no_grad():
            cond = self.condition(model, batch, tools)
            seen = self.noised(model, x_t, t, cond, self.negative(model, len(x_t)))
        errors, terms = self.errors(model, seen, tools)
        return Loss(total=combine(errors, batch), terms=terms)

    def condition(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Condition:
        """What the student is told of pictures; drawn from `tools.rng` where that is by chance."""
        return model.embed(batch.prompts) if batch.cond is None else batch.cond

    # -- states of rollouts -------------------------------------------------------------------------------------

    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Seen]:
        """All states of a rollout of each prompt, those of a row in an order of its own, on the CPU."""
        chain = self.chain(model, tools)
        return [self.visited(model, rows, chain, tools) for rows in parts_of(batch, self.config.micro_batch)]

    def update(self, model: DiffusionModel, collected: list[Seen], part: int, tools: Tools) -> Loss:
        return self.regress(model, collected, part, tools)

    def chain(self, model: DiffusionModel, tools: Tools) -> Chain:
        """Where the steps of a rollout start and lead."""
        start, end = model.chain(self.config.steps, model.latent_shape())
        if not self.config.jitter:
            return start, end
        return jittered(start, float(torch.rand((), generator=tools.shared("jitter"))), end[-1:])


def square_errors(model: DiffusionModel, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error ``[n]`` of the prediction at each state, and for the log that and the target's square."""
    pred = model.predict(seen.x, seen.t, seen.cond)
    # The teacher's sum of predictions times w is not to lose what they differ by.
    pred, target = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (pred, seen.target))
    errors = per_row((pred - target).square())
    return errors, {"error": errors.detach().mean(), "target": target.square().mean()}


def jittered(start: Tensor, share: float, end: Tensor) -> Chain:
    """A chain whose inner steps begin a share of a step earlier, at higher noise.

    Args:
        start: ``[T]`` timesteps, falling; whole ones stay whole. share: in [0, 1). end: ``[1]``, of the last step.
    """
    moved = start[1:] + share * (start[:-1] - start[1:])
    begin = torch.cat([start[:1], moved if start.is_floating_point() else moved.floor().to(start.dtype)])
    return begin, torch.cat([begin[1:], end])


def states_of(drawn: Trajectory, target: Tensor, generators: Sequence[torch.Generator]) -> Seen:
    """The states of a rollout, on the CPU.

    Args:
        target: ``[b, T, ...]``. generators: of each row the order of its states.
    """
    assert drawn.latents is not None
    order = torch.stack([torch.randperm(drawn.steps, generator=rng) for rng in generators])
    row = torch.arange(len(drawn))[:, None]
    return Seen(
        x=drawn.latents.cpu()[row, order].flatten(0, 1),
        t=drawn.timesteps[order].flatten(),
        end=drawn.ends[order].flatten(),
        cond=drawn.cond.to("cpu")[row.expand_as(order).flatten()],
        target=target.cpu()[row, order].flatten(0, 1),
        of_row=drawn.steps,
    )
