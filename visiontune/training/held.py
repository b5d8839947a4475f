"""The denoising loss on pictures that are held out: the same pictures, noise and timesteps for whatever is compared.

Losses of one model before and after training compare; those of models with other latents or predictions do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from visiontune.core import Batch
from visiontune.data.picks import Pick
from visiontune.data.rows import Rows
from visiontune.objectives.base import condition_of, generator, per_row


class Held:
    """Fixed rows at fixed noise.

    Args:
        rows: the pictures, encoded. count: how many of them, the first of each size in turn.
        levels: how many timesteps each is looked at, in the middle of as many equal parts of the schedule.
        batch_size: rows at once; it changes rounding alone.
    """

    def __init__(self, rows: Rows, count: int = 32, levels: int = 8, batch_size: int = 8) -> None:
        self.levels = levels
        self.batches = list(_batches(rows, count, batch_size))

    @torch.no_grad()
    def losses(self, model: Any) -> Tensor:
        """Mean squared error ``[levels]`` of the prediction, float64, from little noise to much."""
        total, rows = torch.zeros(self.levels, dtype=torch.float64), 0
        with _still(model):
            for batch in self.batches:
                moved = batch.to(model.device)
                total += torch.stack([self._at(model, moved, level) for level in range(self.levels)])
                rows += len(batch)
        return total / rows

    def _at(self, model: Any, batch: Batch, level: int) -> Tensor:
        """The sum over a batch's rows."""
        x_0 = batch.data["image"].float()
        share = (level + 0.5) / self.levels * model.schedule.num_train_timesteps
        t = torch.full((len(batch),), share, device=x_0.device)
        t = t if model.schedule.prediction == "flow" else t.long()
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator("held", name, level)) for name in batch.ids])
        eps = eps.to(x_0)
        x_t, target = model.schedule.add_noise(x_0, eps, t), model.schedule.target(x_0, eps, t)
        pred = model.predict(x_t, t, condition_of(model, batch)).float()
        return per_row((pred - target).square()).double().sum().cpu()


def _batches(rows: Rows, count: int, batch_size: int) -> Iterator[Batch]:
    for size, members in rows.buckets.items():
        own = members[: max(1, round(count * len(members) / len(rows)))]
        for start in range(0, len(own), batch_size):
            yield rows.collate([Pick(index=i, size=size, seed=i) for i in own[start : start + batch_size]])


@contextmanager
def _still(model: Any) -> Iterator[None]:
    """The networks in evaluation mode for a while."""
    training = [network for network in model.networks().values() if network.training]
    for network in training:
        network.eval()
    try:
        yield
    finally:
        for network in training:
            network.train()
