"""What a training objective is: what it needs, and how it makes gradients of a batch.

One with data has `loss`, a scalar of a batch that the run differentiates. One that is `online` trains on what the model
draws: `collect` makes a rollout of a batch of prompts, which serves `updates` optimiser steps, and `update` leaves the
gradients of one of them in `.grad`. Both are lent the same `Tools`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from visiontune import plugin
from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.timesteps import Timesteps
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.data.base import Sample
    from visiontune.models.pipeline import PipelineModel

Reward = Callable[..., Tensor]


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that is a pure function of ``key``: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of`; draws on the CPU are the same whatever device trains."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run must have for an objective.

    Attributes:
        columns: of every sample; none where the model draws its own pictures. optional: used where they are there.
        online: whether it trains on what the model draws, so that its data are prompts.
        reward: whether pictures are scored. differentiable: whether by a reward that gradients pass through.
        reference: whether it compares with the untrained model.
        text: whether text encoders can be trained by it.
        told: whether it teaches the denoiser to be told a scale of guidance.
        ranges: whether it trains each row at the noise that its source is for (`Batch.timestep_range`).
        scores: whether it tells the denoiser each row's ratings (:func:`condition_of`).
        sets: whether its rows are pictures of sets, several of each beside one another (`data.set_size`).
        together: whether the loss of a row depends on the others of its batch, which are what it is told from.
    """

    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    online: bool = False
    reward: bool = False
    differentiable: bool = False
    reference: bool = False
    text: bool = True
    told: bool = False
    ranges: bool = False
    scores: bool = False
    sets: bool = False
    together: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Tools:
    """What a run lends an objective for a batch.

    Attributes:
        reference: context in which the model is the untrained one, without gradients.
        reward: images ``[b, 3, h, w]`` in [0, 1], prompts and meta -> float32 ``[b]``; ``None`` unless it is needed.
        rng: a CPU generator, the only source of randomness of a loss; a function of seed, batch and process.
        draw: ``(model, prompts, seeds, *, steps, cfg_scale, batch_size) -> uint8 [n, h, w, 3]``, pictures of the stock
            pipeline.
        gather: the rows of a tensor of all processes, in the order of their ranks; the tensor itself with one.
        scale: what every loss is multiplied by before an ``update`` differentiates it (fp16).
        text: whether the text encoders are trained, so that conditions need a graph.
        seed: of the run. index: number of the batch.
        rank, world: this process and the number of processes.
        parameters: what is trained, by name. refresh: to be called after a change of them through ``.data``.
        lockstep: whether all processes must call the networks equally often, in the same order.
        state: the objective's own, kept in checkpoints by name: tensors, plain values, and whatever has torch's
            ``state_dict`` and ``load_state_dict``, a second optimiser for instance.
    """

    reference: Callable[[], AbstractContextManager[Any]] = nullcontext
    reward: Reward | None = None
    rng: torch.Generator = field(default_factory=torch.Generator)
    draw: Callable[..., Any] | None = None
    gather: Callable[[Tensor], Tensor] = lambda value: value
    scale: float = 1.0
    text: bool = False
    seed: int = 0
    index: int = 0
    rank: int = 0
    world: int = 1
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    refresh: Callable[[], None] = lambda: None
    lockstep: bool = False
    state: dict[str, Any] = field(default_factory=dict)

    def generators(self, batch: Batch, *key: int | str) -> list[torch.Generator]:
        """One for each row: its noise depends on the run's seed, the rollout and the row, not on the batch's cut."""
        return [generator(self.seed, "row", self.index, int(row), *key) for row in batch.data["row"]]

    def shared(self, *key: int | str) -> torch.Generator:
        """A generator that is the same in every process."""
        return generator(self.seed, "shared", self.index, *key)


_CHECKS = ("needs", "check", "check_reward", "check_text")
_CALLS = (*_CHECKS, "prepare", "facts", "setup", "probe", "draw_timesteps", "loss", "collect", "update")


class Objective(ABC):
    """One way to train.

    Attributes:
        config: its options.
        group: pictures of each prompt that are compared with each other.
        updates: optimiser steps that a batch serves.
        even: whether all processes can be made to call the networks equally often (`Tools.lockstep`).
    """

    config: Any
    group: int = 1
    updates: int = 1
    even: bool = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        plugin.guard_methods(cls, _CALLS, "objective")

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the run must have."""

    def check(self, model: Any, reward: Any) -> None:
        """Refuse what cannot work, before anything is drawn or trained.

        Raises:
            UserError: the reward does not suit, or the model.
        """
        self.check_reward(reward)

    def check_reward(self, reward: Any) -> None:
        """The part of :meth:`check` for which no model need be opened.

        Raises:
            UserError: no reward where one is needed, or one without gradients where they are.
        """
        if self.needs.reward and reward is None:
            raise UserError("objective needs a reward: add for instance reward=pocket-clip")
        if self.needs.differentiable and not reward.differentiable:
            raise UserError(
                f"reward '{reward.name}' is not differentiable, and this objective follows its gradient: take a "
                "differentiable one (visiontune list), or objective=ddpo"
            )

    def check_text(self, trained: bool) -> None:
        """Refuse what does not suit the parts that are trained.

        Raises:
            UserError: text encoders are trained, which would get no gradient from a rollout's conditions.
        """
        if trained and not self.needs.text:
            raise UserError(
                "objective keeps the conditions of its rollouts: take text encoders and trigger out of train.parts"
            )

    def prepare(
        self, model: PipelineModel, data: Any, samples: Sequence[Sample], cache_dir: Path, tools: Tools
    ) -> Sequence[Sample]:
        """Called once before the first step; returns samples to train on besides the user's own.

        Args:
            model: on the training device, with the run's adapters attached.
            data: the run's data configuration (trigger, class noun, ...).
            samples: the user's own.
            cache_dir: where generated files may be kept between runs.
            tools: ``reference`` and ``draw``.
        """
        return []

    @property
    def draws(self) -> bool:
        """Whether :meth:`prepare` has the model draw pictures of words alone."""
        return False

    def prior_rows(self, batch_size: int) -> int:
        """How many rows of :meth:`prepare` come on top of a batch of the user's own, where there are any."""
        return batch_size

    def draw_timesteps(
        self, model: Any, shape: Sequence[int], rows: int, rng: torch.Generator, bounds: Tensor | None = None
    ) -> Tensor | None:
        """Timesteps ``[rows]`` as steps draw them for latents ``[c, (f), h, w]``, by the option ``timesteps``.

        ``bounds`` ``[rows, 2]`` are those of each row, where its source has a range. ``None`` where the objective has
        no such option, or its timesteps are those of a sampler.
        """
        timesteps = getattr(self.config, "timesteps", None)
        return timesteps.draw(model, shape, rows, rng, bounds=bounds) if isinstance(timesteps, Timesteps) else None

    def facts(self) -> dict[str, str]:
        """What the header of the trained weights says of the objective besides its name."""
        return {}

    def setup(self, model: Any, tools: Tools) -> None:
        """Called once, before training or taking up a checkpoint: puts what has a state into ``tools.state``."""
        return

    @abstractmethod
    def probe(self, model: Any, batch: Batch, tools: Tools) -> None:
        """The forward pass of which a step keeps the most for its backward pass, for an estimate of memory."""


class Supervised(Objective):
    """Trains on data. Stateless between steps, but for ``tools.state``: everything random comes from ``tools.rng``."""

    @property
    def needs(self) -> Needs:
        return Needs(columns=("image",))

    @abstractmethod
    def loss(self, model: Any, batch: Batch, tools: Tools) -> Loss:
        """The loss of one batch of ``b`` rows, in float32, under whatever is attached to the model."""

    def probe(self, model: Any, batch: Batch, tools: Tools) -> None:
        self.loss(model, batch, tools)


class Online(Objective):
    """Trains on what the model draws.

    Gradients are left in ``.grad``, of the mean over this process's rows; the run averages them over processes. The
    adapters are in evaluation mode throughout, so that a step that is computed twice comes out the same.
    """

    @abstractmethod
    def collect(self, model: Any, batch: Batch, tools: Tools) -> Any:
        """A rollout of prompts, without gradients."""

    @abstractmethod
    def update(self, model: Any, collected: Any, part: int, tools: Tools) -> Loss:
        """Add the gradients of one optimiser step, number ``part`` of the rollout's; the loss is detached."""


def check_loss(found: Any, objective: Objective) -> Loss:
    """What an objective returned, if it is a :class:`Loss` that can train.

    Raises:
        UserError: it is something else, its total is no single number, or one that was to be differentiated cannot be.
    """
    kind = type(objective).__module__
    if not isinstance(found, Loss) or not isinstance(found.total, Tensor) or found.total.numel() != 1:
        raise UserError(f"objective '{kind}' returned a {type(found).__name__}, not a Loss whose total is one number")
    if not objective.needs.online and torch.is_grad_enabled() and not found.total.requires_grad:
        raise UserError(
            f"objective '{kind}' returned a loss that no gradient can be taken of: compute it by torch alone"
        )
    return found


def continuous(model: Any) -> None:
    """Refuse a model that has no noise schedule.

    Raises:
        UserError: naming what would do.
    """
    if not hasattr(model, "schedule"):
        raise UserError(
            f"objective is for models of continuous latents, and '{model.source}' ({model.family}) has none: take "
            "another model, or an objective for it (visiontune list objectives)"
        )


def fills_in(model: Any, objective: str, instead: str) -> None:
    """Refuse a model that does not fill in masked tokens.

    Raises:
        UserError: naming the objective that would do ``instead``.
    """
    if not hasattr(model, "mask_token"):
        raise UserError(
            f"objective={objective} is for models that fill in masked tokens (amused), not for '{model.source}': take "
            f"objective={instead}"
        )


def compares(model: Any, objective: str) -> None:
    """Refuse a model that does not bring pictures and texts into one space.

    Raises:
        UserError: naming a family that does.
    """
    if not hasattr(model, "image_features"):
        raise UserError(
            f"objective={objective} is for models of pictures and texts (clip), not for '{model.source}' "
            f"({model.family}): set model=pocket/clip, or another CLIP"
        )


def draws_clips(model: Any) -> bool:
    """Whether the latents of a model that is :func:`continuous` have frames."""
    return len(model.latent_shape()) > 3


def condition_of(model: Any, batch: Batch) -> Condition:
    """The batch's cached condition, or one embedded now, with a gradient if the text encoder is trained.

    With it the pictures that the model is shown: ``channels`` beside its noisy latents, or the ``source`` of an edit,
    as such channels or as references. Rows that are not ``shown`` theirs have channels of 0, or no references. And the
    ratings of each row, where the data have some.
    """
    cond = batch.cond if batch.cond is not None else model.embed(batch.prompts)
    if "scores" in batch.data:
        cond = replace(cond, extra={**cond.extra, "scores": batch.data["scores"]})
    if "source" not in batch.data:
        beside = batch.data.get("channels")
    elif model.reads.channels:
        beside = model.edited(batch.data["source"])
    else:
        shown = batch.data.get("shown", torch.ones(len(batch), dtype=torch.bool)).tolist()
        pairs = zip(batch.data["source"], shown, strict=True)
        references: list[tuple[Tensor, ...]] = [(latents,) if seen else () for latents, seen in pairs]
        return replace(cond, references=references)
    if beside is None:
        return cond
    if "shown" in batch.data:
        beside = beside * batch.data["shown"].view(-1, 1, 1, 1).to(beside)
    return replace(cond, extra={**cond.extra, "channels": beside})


def per_row(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean error of each row ``[b]`` of a map ``[b, c, ...]``.

    Args:
        mask: ``[b, 1, ...]`` in [0, 1], how much each place counts; a row of which nothing counts has error 0. One
            without frames ``[b, 1, h, w]`` holds for all frames of a clip.
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    if mask.ndim < errors.ndim:
        mask = mask.unsqueeze(2)
    weight = mask.to(errors).expand_as(errors).flatten(1)
    return (weight * errors.flatten(1)).sum(1) / weight.sum(1).clamp(min=torch.finfo(errors.dtype).tiny)


def combine(errors: Tensor, batch: Batch) -> Tensor:
    """Scalar loss of a batch that may hold prior-preservation rows.

    The mean of ``weight * error`` over the instance rows plus the same mean over the prior rows, so a row's own weight
    decides its part (prior rows carry lambda) and the two kinds may come in any proportion and order.

    Args:
        errors: ``[b]``, one error per row.
        batch: gives ``weight`` ``[b]`` and ``prior`` ``[b]``.
    """
    if errors.shape != batch.weight.shape:
        raise ValueError(f"errors {tuple(errors.shape)} and row weights {tuple(batch.weight.shape)} must agree")
    weighted = errors * batch.weight.to(errors.dtype)
    return mean_where(weighted, ~batch.prior) + mean_where(weighted, batch.prior)


def by_range(errors: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Mean error of the rows of each range of noise, as ``error_0.0_0.9``; prior rows are of none.

    Args:
        errors: ``[b]``.
    """
    if batch.timestep_range is None:
        return {}
    bounds = batch.timestep_range[~batch.prior].unique(dim=0)
    rows = [(batch.timestep_range == pair).all(1) & ~batch.prior for pair in bounds]
    names = [f"error_{low:.4g}_{high:.4g}" for low, high in bounds.tolist()]
    return {name: mean_where(errors.detach(), own) for name, own in zip(names, rows, strict=True)}


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` ``[b]`` over the rows of ``mask`` ``[b]``; 0 when it selects none."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
