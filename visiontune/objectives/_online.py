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
from visiontune.diffusion.dynamics import make_dynamics
from visiontune.diffusion.replay import micro_batches
from visiontune.errors import UserError
from visiontune.objectives.base import generator
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.base import DiffusionModel, MaskedModel, Model

Reward = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Options of a rollout, which every online objective has."""

    steps: int = option(25, help="sampling steps of a rollout")
    cfg_scale: float = option(4.0, help="guidance of the rollout; 1 for none")
    micro_batch: int | None = option(None, help="pictures drawn and differentiated at once; null for all")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError("micro_batch must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class SteppedConfig(OnlineConfig):
    """Options of a rollout of continuous latents."""

    dynamics: Any = option("ddim", help="how the sampler steps: a name, or {name: ddim, eta: 1.0}")

    def __post_init__(self) -> None:
        super().__post_init__()
        make_dynamics(self.dynamics)


@dataclass(frozen=True, kw_only=True)
class GroupConfig(OnlineConfig):
    """Options of objectives that score several pictures of each prompt, and may use a rollout more than once."""

    fewest: ClassVar[int] = 2

    group: int = option(8, help="pictures of each prompt, which are compared with each other")
    updates: int = option(1, help="optimiser steps for each rollout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < self.fewest:
            needed = ": pictures of one prompt are compared with each other" if self.fewest > 1 else ""
            raise ValueError(f"group must be at least {self.fewest}{needed}")
        if self.updates < 1:
            raise ValueError("updates must be at least 1")


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
        return [generator(self.seed, "row", self.index, int(row), *key) for row in batch.data["row"]]

    def shared(self, *key: int | str) -> torch.Generator:
        """A generator that is the same in every process."""
        return generator(self.seed, "shared", self.index, *key)


class Online(ABC):
    """Trains on what the model draws.

    Each rollout serves ``updates`` optimiser steps. Gradients are left in ``.grad``, of the mean over this process's
    rows; the run averages them over processes. The adapters are in evaluation mode throughout, so that a step that is
    computed twice comes out the same.

    Attributes:
        group: pictures of each prompt that are compared with each other.
        updates: optimiser steps for each rollout.
        rewarded: whether pictures are scored. differentiable: whether by a reward that gradients pass through.
        embeds: whether updates embed the prompts anew, so that text encoders can be trained.
        referenced: whether it compares with the base, which only a run with an adapter keeps.
    """

    config: OnlineConfig
    group: int = 1
    updates: int = 1
    rewarded: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False
    embeds: ClassVar[bool] = True

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        if isinstance(config, GroupConfig):
            self.group, self.updates = config.group, config.updates

    @property
    def referenced(self) -> bool:
        return False

    def check(self, model: Any, reward: Any) -> None:
        """Refuse what cannot work, before anything is drawn.

        Raises:
            UserError: the reward does not suit, or the model.
        """
        self.check_reward(reward)

    def check_text(self, trained: bool) -> None:
        """Refuse what does not suit ``train.text_encoder``, before a model is opened.

        Raises:
            UserError: text encoders are trained, which would get no gradient from a rollout's conditions.
        """
        if trained and not self.embeds:
            raise UserError("objective keeps the conditions of its rollouts: set train.text_encoder=false")

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
    def collect(self, model: Any, batch: Batch, tools: Tools) -> Any:
        """A rollout of prompts, without gradients."""

    @abstractmethod
    def update(self, model: Any, collected: Any, part: int, tools: Tools) -> Loss:
        """Add the gradients of one optimiser step, number ``part`` of the rollout's; the loss is detached."""


class Stepped(Online):
    """Draws continuous latents by the steps of a sampler.

    Attributes:
        dynamics: how it steps.
        likelihoods: whether the log-probabilities of the steps are needed, and so a sampler with noise.
    """

    config: SteppedConfig
    likelihoods: ClassVar[bool] = False

    def __init__(self, config: SteppedConfig) -> None:
        super().__init__(config)
        self.dynamics = make_dynamics(config.dynamics)

    def check(self, model: DiffusionModel, reward: Any) -> None:
        """Besides, refuse a sampler that does not suit the model, or adds no noise where that is needed."""
        super().check(model, reward)
        self.dynamics.check(model.schedule.prediction)
        if self.likelihoods:
            self.dynamics.require_noise()


def conditions(
    model: Model, prompts: Sequence[str], cfg_scale: float, text: bool
) -> tuple[Condition, Condition | None]:
    """What to draw and, with guidance, what to guide away from; with a graph where ``text`` encoders are trained."""
    with torch.set_grad_enabled(text and torch.is_grad_enabled()):
        cond = model.embed(prompts)
        return cond, None if cfg_scale == 1.0 else model.unconditional(len(prompts))


def pixels(model: DiffusionModel | MaskedModel, latents: Tensor) -> Tensor:
    """Pictures ``[b, 3, h, w]`` in [0, 1], as rewards take them; differentiable inside that range.

    ``latents`` of a masked model are its tokens.
    """
    return (model.decode(latents) / 2 + 0.5).clamp(0, 1)


def parts_of(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in pieces of at most ``size`` rows."""
    for rows in micro_batches(len(batch), size):
        yield batch[rows]


def score(tools: Tools, images: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Rewards ``[b]`` of pictures of a batch's prompts as ``reward``, and of a mix each term as ``reward/<term>``."""
    assert tools.reward is not None
    meta = [{"prompt_id": int(i)} for i in batch.data["prompt"]]
    rewards = tools.reward(images, batch.prompts, meta)
    terms = getattr(tools.reward, "terms", {})
    return {"reward": rewards, **{f"reward/{name}": value.to(rewards) for name, value in terms.items()}}


def reward_terms(tools: Tools, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the logs: means over the rows of all processes of what :func:`score` gave, and the reward's deviation."""
    everyone = {name: tools.gather(values.detach()) for name, values in scores.items()}
    means = {name: values.mean() for name, values in everyone.items()}
    return {**means, "reward_std": everyone["reward"].std(unbiased=False)}
