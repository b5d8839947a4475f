"""Lets an adapter method look at the task before the first step, and keeps what it decided."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.objectives.base import Supervised, Tools, generator
from visiontune.training.step import Rows

if TYPE_CHECKING:
    from accelerate import Accelerator

    from visiontune.adapters.base import AdapterSet
    from visiontune.models.base import Model


def plan(
    file: Path,
    *,
    model: Model,
    adapters: AdapterSet,
    objective: Supervised,
    rows: Rows,
    seed: int,
    accelerator: Accelerator,
    again: bool = False,
) -> None:
    """Prepare ``adapters`` for the task and write them to ``file``.

    Args:
        model: on the training device.
        rows: gives the batches; the first ``adapters.config.batches`` are looked at.
        seed: of their noise.
        again: take what ``file`` holds, as a run does that goes on: the decisions must be those of its checkpoints.
    """
    if again and file.exists():
        adapters.restore(file)
        return
    count = adapters.config.batches
    places = stratified(count, accelerator.num_processes, accelerator.process_index, seed)

    def loss_of(index: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            batch = rows.batch(index).to(accelerator.device)
            order = torch.randperm(len(batch), generator=generator(seed, "plan rows", index))
            batch.data["quantile"] = (order + places[index]) / len(batch)
            tools = Tools(
                reference=adapters.disable,
                rng=generator(seed, "plan", index, accelerator.process_index),
                seed=seed,
                index=index,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
            # Without a scale for the loss, half precision would flush small gradients to zero.
            half = accelerator.mixed_precision == "fp16"
            with nullcontext() if half else accelerator.autocast():
                return objective.loss(model, batch, tools).total

        return loss

    reduce: Any = accelerator.reduce
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters.prepare([loss_of(i) for i in range(count)], reduce if accelerator.num_processes > 1 else None)
    if accelerator.is_main_process:
        adapters.save(file)
    accelerator.wait_for_everyone()


def stratified(count: int, world: int, rank: int, seed: int) -> Tensor:
    """Where in its stratum each batch of this process samples, ``[count]`` in (0, 1): evenly over all of them."""
    order = torch.randperm(count * world, generator=generator(seed, "plan places"))
    return (order[rank::world] + 0.5) / (count * world)
