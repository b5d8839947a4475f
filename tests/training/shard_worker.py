"""Runs on sharded networks, and the same in one process, for `test_sharding.py`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from objectives import policy_worker
from processes import ranks
from tiny import tiny_model
from tiny_online import policy_trainer
from tiny_training import CutRows, RowNoise, TinyModel, TinyReward, TinyRows, interrupt, tiny_trainer

from visiontune import adapters, assemble
from visiontune.config import load_run
from visiontune.data.prompts import PromptBatches
from visiontune.errors import UserError
from visiontune.objectives import alignprop, dreambooth, grpo, nft
from visiontune.ops.shards import whole
from visiontune.training import checkpoint, resume
from visiontune.training.config import PreviewConfig

PROMPTS = ["a red circle", "a small blue square"]
SGD = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "lr": 0.1}
STEPS, ROWS = 4, 6


def pipeline(out: Path, rank: int, world: int, adapted: bool):
    """Two steps of a transformer, or of an adapter of it and of a text encoder."""
    model = tiny_model("sd3", t5=False)
    found = None
    if adapted:
        torch.manual_seed(0)
        found = adapters.attach(
            model.of("denoiser", "text_encoder"), "lora", targets=["to_q", "add_k_proj", "q_proj"], rank=2
        )
    options = {
        "steps": 2,
        "parts": ["denoiser", "text_encoder"] if adapted else None,
        "ema": 0.5,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.1,
    }
    preview = PreviewConfig(prompts=PROMPTS[:1], steps=1, every=2)
    rows = CutRows(model, 2 // world, rank, world, embedded=not adapted)
    return tiny_trainer(
        out, model=model, rows=rows, objective=RowNoise(), adapters=found, preview=preview, **SGD | options
    )


def watched(out: Path, rank: int, world: int):
    """A recipe, with the model of a shop beside it: an adapter that follows a reward, and what guards see of it."""
    words = {
        "model": out.parent / "shop" / "model",
        "data": out.parent / "shop" / "prompts.txt",
        "out": out.parent,
        "name": out.name,
        "reward": "redness",
        "objective": "{name: alignprop, steps: 2, cfg_scale: 1, truncation: full}",
        "guards": "{every: 1, holdout: 1, seeds: [0], diversity_min: null, steps: 1}",
        "preview.prompts": "[]",
        "train.batch_size": 2 // world,
        "train.steps": 1,
        "train.checkpoint_every": 1,
        "train.optimizer": "sgd",
        "train.lr": 0.1,
        "train.precision": "no",
        "train.device": "cpu",
        "train.trackers": "[]",
    }
    return assemble.assemble(load_run("reward_tune/alignprop", [f"{name}={value}" for name, value in words.items()]))


def rolled(out: Path, rank: int, world: int, name: str):
    """Online runs that train all weights: rows without a say, an old policy, a base to stay near."""
    if name == "alignprop":
        model, size = TinyModel(), 4 // world
        return tiny_trainer(
            out,
            model=model,
            objective=alignprop.build(alignprop.Config(steps=3, cfg_scale=2.0)),
            rows=PromptBatches(PROMPTS, size, rank=rank, world=world),
            reward=TinyReward(),
            batch_size=size,
            parts=["denoiser", "text"],
            **SGD | {"steps": 2},
        )
    if name == "ddpo":
        return policy_worker.trainer(out, name, 16 // world, rank, world)
    common = {"steps": 2, "group": 2, "cfg_scale": 1.0, "micro_batch": 2}
    if name == "nft":
        objective = nft.build(nft.Config(**common, kl_weight=0.1, decay_rate=0.3))
    else:
        objective = grpo.build(grpo.Config(**common, dynamics={"name": "ddim", "eta": 1.0}, beta=1.0, last_step=True))
    options = {"steps": 3, "optimizer": "sgd", "lr": 0.1, "batch_size": 8 // world}
    return policy_trainer(out, objective, reward=bright, rank=rank, world=world, **options)


ONLINE = ("alignprop", "ddpo", "grpo", "nft")


def bright(images, prompts, meta=None):
    """A reward that some prompts' pictures all share: their rows teach nothing."""
    told = torch.tensor([prompt != "c d" for prompt in prompts])
    return torch.where(told, images.mean((1, 2, 3)), 0.5)


def kept(out: Path, rows: int, **train):
    """A run with everything that a checkpoint has to carry, and a base to compare with."""
    model = TinyModel(dropout=0.2)
    options = {
        "steps": STEPS,
        "lr": 1e-2,
        "ema": 0.9,
        "checkpoint_every": 2,
        "keep": 3,
        "resume": True,
        "batch_size": rows,
    }
    objective = dreambooth.build(dreambooth.Config())
    return tiny_trainer(out, model=model, objective=objective, rows=TinyRows(model, 1, prior=1), **options | train)


def one(out: Path, name: str) -> None:
    """A run of :func:`two` in this process."""
    made(out, name, 0, 1).fit()


def made(out: Path, name: str, rank: int, world: int):
    torch.set_num_threads(1)
    if name in ("adapter", "full"):
        return pipeline(out / name, rank, world, name == "adapter")
    return watched(out / name, rank, world) if name == "watched" else rolled(out / name, rank, world, name)


RUNS = ("adapter", "full", "watched", *ONLINE)


def shard() -> None:
    """Have the next runs of this process sharded, as `accelerate launch` does."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def two(folder: str, *names: str) -> list[int]:
    """The exit codes of two processes that share runs, one after the other."""

    def work(rank: int) -> None:
        shard()
        for name in names:
            made(Path(folder), name, rank, 2).fit()

    return ranks(2, work)


def goes_on(folder: str) -> list[int]:
    """Two processes of a run that stops and goes on, and of one that does not; then three, which only take it up."""
    broken = Path(folder) / "broken"

    def work(rank: int) -> None:
        shard()
        kept(Path(folder) / "whole", ROWS // 2).fit()
        interrupt(kept(broken, ROWS // 2), 2)
        kept(broken, ROWS // 2).fit()

    def take_up(rank: int) -> None:
        shard()
        try:
            resume.take_up(kept(Path(folder) / "plain", ROWS // 3))
        except UserError as error:
            assert "was made without FSDP" in str(error)
        run = kept(broken, ROWS // 3)
        assert resume.take_up(run) == STEPS
        weights, _ = checkpoint.load(checkpoint.latest(broken))
        assert all(torch.equal(whole(p.detach()), weights[name]) for name, p in run.parameters.items())

    return [*ranks(2, work), *ranks(3, take_up)]
