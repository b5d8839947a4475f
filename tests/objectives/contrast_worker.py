"""The gradients of a contrastive loss in one process or in two that share its batch; run by `processes.apart`."""

from __future__ import annotations

import json
from pathlib import Path

from processes import ranks


def run(folder: str, name: str, out: str) -> None:
    """Write what two processes find."""
    assert not any(ranks(2, lambda rank: _rank(folder, name, rank, Path(out))))


def _rank(folder: str, name: str, rank: int, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    found = gradients(folder, name, rank, 2)
    if rank == 0:
        out.write_text(json.dumps(found))


def gradients(folder: str, name: str, rank: int = 0, world: int = 1) -> dict[str, list[float]]:
    """The loss and the gradients of text tower, projections and temperature, in the mean over processes."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather, reduce

    from visiontune import models, plugin
    from visiontune.core import Batch
    from visiontune.objectives.base import Tools

    PartialState(cpu=True)

    model = models.load(folder)
    networks = model.of("head", "text")
    for network in networks.values():
        network.requires_grad_(True)
    captions = ["red dog, blue cat", "green cat", "green cat", "tall man, old cup"]
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    rows = len(captions[own])
    batch = Batch(
        prompts=captions[own],
        data={"image": pixels[own]},
        cond=None,
        weight=torch.ones(rows),
        prior=torch.zeros(rows, dtype=torch.bool),
        ids=[str(i) for i in range(rows)],
    )
    module = plugin.load("objectives", name)
    # Of "tall man, old cup" nothing can be swapped, and of the first either of two.
    tools = Tools(rank=rank, world=world, gather=gather, rng=torch.Generator().manual_seed(0))
    loss = module.build(module.Config()).loss(model, batch, tools).total
    loss.backward()
    found = {"loss": [float(reduce(loss.detach(), "mean"))]}
    for part, network in networks.items():
        for key, parameter in network.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[f"{part}.{key}"] = reduce(gradient, "mean").flatten().tolist()
    return found
