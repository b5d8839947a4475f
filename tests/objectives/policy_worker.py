"""Runs of policy gradients in several processes, for `test_policy_processes.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import ranks
from tiny_online import policy_trainer

from visiontune.objectives import ddpo, grpo

COMMON = {"steps": 4, "group": 4, "cfg_scale": 2.0, "micro_batch": 4}
BUILT = {
    "ddpo": lambda: ddpo.build(ddpo.Config(**COMMON, tracker=6, min_count=5)),
    "grpo": lambda: grpo.build(
        grpo.Config(
            **COMMON, dynamics={"name": "ddim", "eta": 1.0}, std="global", timestep_fraction=0.5, same_noise=True
        )
    ),
}


def trainer(out: Path, name: str, batch_size: int, rank: int = 0, world: int = 1):
    torch.set_num_threads(1)
    options = {"steps": 3, "optimizer": "sgd", "lr": 0.1, "max_grad_norm": None, "batch_size": batch_size}
    return policy_trainer(out, BUILT[name](), rank=rank, world=world, checkpoint_every=3, **options)


def two(folder: str, name: str) -> list[int]:
    """The exit codes of two processes of one run."""
    return ranks(2, lambda rank: trainer(Path(folder), name, 8, rank, 2).fit())
