"""Online runs of one process or of two, for `test_online_ranks.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import ranks
from tiny import tiny_model
from tiny_online import PROMPTS, brightness

from visiontune import adapters, plugin
from visiontune.data.prompts import PromptBatches
from visiontune.rewards.base import as_reward
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

NAMES = {
    "prdp": {"clip": 1e-3, "beta": 1e-2},
    "nft": {"kl_weight": 0.1},
    "dpo_online": {"beta": 50.0},
    "unigrpo": {"masks": 2, "group": 4},
}


def fit(out: Path, name: str, rank: int, world: int) -> None:
    """A rollout of two groups in all, and two updates."""
    torch.set_num_threads(1)
    model = tiny_model("amused" if name == "unigrpo" else "sd")
    torch.manual_seed(0)
    found = adapters.attach(model.of("denoiser"), "lora", targets=["to_q"])
    options = {"name": name, "group": 2, "steps": 2, "updates": 2, "cfg_scale": 1.0, "micro_batch": 2, **NAMES[name]}
    module, config = plugin.configure("objectives", options, "objective")
    group = options["group"]
    size = 2 * group // world
    train = {"steps": 2, "batch_size": size, "optimizer": "sgd", "lr": 0.1, "max_grad_norm": 1.0, "log_every": 1}
    Trainer(
        model=model,
        adapters=found,
        objective=module.build(config),
        rows=PromptBatches(PROMPTS, size, group, 0, rank, world),
        train=TrainConfig(**train, trackers=[], device="cpu"),
        out=out / name,
        reward=as_reward(brightness, "brightness"),
    ).fit()


def two(folder: str) -> list[int]:
    """The exit codes of two processes, which share one run after the other."""
    return ranks(2, lambda rank: [fit(Path(folder), name, rank, 2) for name in NAMES])
