"""What an online objective is: prompts in, pictures drawn by the model itself, gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from visiontune.core import Batch, Condition, Loss
from visiontune.errors import UserError
from visiontune.objectives.base import generator

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel

Reward = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tools:
    """What a run lends an online objective.

    Attributes:
        reward: images ``[b, 3, h, w]`` in [0, 1], prompts and meta -> float32 ``[b]``; ``None`` only for objectives
            without ``rewarded``.
        reference: context in which the model is the base.
        gather: the rows of a tensor of all processes, in the order of their ranks; the tensor itself with one.
        scale: what every loss is multiplied by before it is differentiated (fp16).
        text: whether the text encoders are trained, so that conditions need a graph.
        seed: of the run. index: number of the rollout.
        rank, world: this process and the number of processes.
        parameters: what is trained, by name. refresh: to be called after a change of them through ``.data``.
        state: the objective's own, kept in checkpoints: tensors and plain values by name.
    """

    reward: Reward | None
    reference: Callable[[], AbstractContextManager[Any]]
    gather: Callable[[Tensor], Tensor] = lambda value: value
    scale: float = 1.0
    text: bool = False
    seed: int = 0
    index: int = 0
    rank: int = 0
    world: int = 1
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    refresh: Callable[[], None] = lambda: None
    state: dict[str, Any] = field(default_factory=dict)

    def generators(self, batch: Batch, *key: int | str) -> list[torch.Generator]:
        """One for each row: its noise depends on the run's seed, the rollout and the row, not on the batch's cut."""
        return [generator(self.seed, "row", self.index, int(row), *key) for row in batch.extra["row"]]

    def shared(self, *key: int | str) -> torch.Generator:
        """A generator that is the same in every process."""
        return generator(self.seed, "shared", self.index, *key)


class Online(ABC):
    """Trains on what the model draws.

    Each rollout serves ``updates`` optimiser steps. Gradients are left in ``.grad``, of the mean over this process's
    rows; the run averages them over processes. The adapters are in evaluation mode throughout, so that a step that is
    computed twice comes out the same.

    Attributes:
        config: with ``cfg_scale``, ``steps`` and ``micro_batch``.
        group: pictures of each prompt that are compared with each other.
        updates: optimiser steps for each rollout.
        rewarded: whether pictures are scored. differentiable: whether by a reward that gradients pass through.
        referenced: whether it compares with the base, which only a run with an adapter keeps.
    """

    config: Any
    rewarded: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False

    @property
    def group(self) -> int:
        return int(getattr(self.config, "group", 1))

    @property
    def updates(self) -> int:
        return int(getattr(self.config, "updates", 1))

    @property
    def referenced(self) -> bool:
        return False

    def check(self, model: DiffusionModel, reward: Any) -> None:
        """Refuse what cannot work, before anything is drawn.

        Raises:
            UserError: the reward does not suit, or the model.
        """
        self.check_reward(reward)

    def check_reward(self, reward: Any) -> None:
        """The part of :meth:`check` for which no model need be opened.

        Raises:
            UserError: no reward, or one without gradients where they are needed.
        """
        if self.rewarded and reward is None:
            raise UserError("objective needs a reward: add for instance reward=pocket-clip")
        if self.differentiable and not reward.differentiable:
            raise UserError(
                f"reward '{reward.name}' is not differentiable, and this objective follows its gradient: take a "
                "differentiable one (visiontune list), or objective=ddpo"
            )

    @abstractmethod
    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Any:
        """A rollout of prompts, without gradients."""

    @abstractmethod
    def update(self, model: DiffusionModel, collected: Any, part: int, tools: Tools) -> Loss:
        """Add the gradients of one optimiser step, number ``part`` of the rollout's; the loss is detached."""


def conditions(
    model: DiffusionModel, prompts: Sequence[str], cfg_scale: float, text: bool
) -> tuple[Condition, Condition | None]:
    """What to draw and, with guidance, what to guide away from; with a graph where ``text`` encoders are trained."""
    with torch.set_grad_enabled(text and torch.is_grad_enabled()):
        cond = model.embed(prompts)
        return cond, None if cfg_scale == 1.0 else model.unconditional(len(prompts))


def pixels(model: DiffusionModel, latents: Tensor) -> Tensor:
    """Pictures ``[b, 3, h, w]`` in [0, 1], as rewards take them; differentiable inside that range."""
    return (model.decode(latents) / 2 + 0.5).clamp(0, 1)


def parts_of(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in pieces of at most ``size`` rows."""
    for start in range(0, len(batch), size or len(batch)):
        yield batch[start : start + (size or len(batch))]


def score(tools: Tools, images: Tensor, batch: Batch) -> Tensor:
    """Rewards ``[b]`` of pictures of a batch's prompts."""
    assert tools.reward is not None
    meta = [{"prompt_id": int(i)} for i in batch.extra["prompt"]]
    return tools.reward(images, batch.prompts, meta)


@torch.no_grad()
def score_latents(
    model: DiffusionModel, tools: Tools, latents: Tensor, batch: Batch, group: int, size: int | None
) -> dict[str, Tensor]:
    """Rewards ``[b]`` of finished latents as ``reward``, and where it is made of terms each as ``reward/<term>``.

    Pictures are decoded at most ``size`` at a time. They are scored so too, unless the reward is groupwise: it then
    sees each prompt's ``group`` pictures, which are consecutive rows, in a call of their own, however the batch is cut
    and whatever other groups of the same prompt there are.
    """
    whole = size
    if getattr(tools.reward, "groupwise", False):
        whole = group if group > 1 else len(batch)
    found: list[dict[str, Tensor]] = []
    start = 0
    for rows in parts_of(batch, whole):
        drawn = latents[start : start + len(rows)].to(model.device)
        start += len(rows)
        shown = torch.cat([pixels(model, part) for part in drawn.split(size or len(drawn))])
        rewards = score(tools, shown, rows)
        terms = {f"reward/{name}": value for name, value in getattr(tools.reward, "terms", {}).items()}
        found.append({"reward": rewards, **terms})
    return {name: torch.cat([part[name].detach().to(rewards) for part in found]) for name in found[0]}
