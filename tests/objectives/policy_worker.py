"""Runs of policy gradients in several processes: run by `test_policy_processes.py`, and imported there."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
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


if __name__ == "__main__":
    folder, name, world = Path(sys.argv[1]), sys.argv[2], 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            trainer(folder, name, 8, rank, world).fit()
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
