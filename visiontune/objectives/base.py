"""What a training objective is: a batch of clean latents in, a scalar to minimise out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss

if TYPE_CHECKING:
    from visiontune.data.base import Sample
    from visiontune.models.base import DiffusionModel


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that is a pure function of ``key``: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`seed_of`; draws on the CPU are the same whatever device trains."""
    return torch.Generator().manual_seed(seed_of(*key))


def condition_of(model: DiffusionModel, batch: Batch) -> Condition:
    """The batch's cached condition, or one embedded now, with a gradient if the text encoder is trained."""
    return batch.cond if batch.cond is not None else model.embed(batch.prompts)


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


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` ``[b]`` over the rows of ``mask`` ``[b]``; 0 when it selects none."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


class Objective(ABC):
    """One way to compute a loss. Stateless between steps: everything random comes from ``rng``.

    Attributes:
        pairs: whether it trains on pairs of images, the worse ones being ``batch.data["rejected"]``.
    """

    pairs: ClassVar[bool] = False

    def prepare(
        self,
        model: DiffusionModel,
        *,
        adapters: Any,
        data: Any,
        cache_dir: Path,
        images: Callable[..., Any],
    ) -> Sequence[Sample]:
        """Called once before the first step; returns samples to train on besides the user's own.

        Args:
            model: the base, on the training device, with ``adapters`` attached.
            adapters: the run's ``AdapterSet``, or ``None`` when the base itself is trained.
            data: the run's data configuration (trigger, class noun, ...).
            cache_dir: where generated files may be kept between runs.
            images: ``visiontune.sampling.generate.images``; handed in because objectives do not know sampling.
        """
        return []

    def rollout(self, model: DiffusionModel, batch: Batch, rng: torch.Generator) -> Batch:
        """Turn a batch of data into what :meth:`loss` needs, without a gradient; nothing to do by default."""
        return batch

    @abstractmethod
    def loss(self, model: DiffusionModel, batch: Batch, rng: torch.Generator) -> Loss:
        """The loss of one batch, in float32.

        Args:
            model: predicts with whatever is attached to it.
            batch: ``b`` rows.
            rng: a CPU generator, the only source of randomness.
        """
