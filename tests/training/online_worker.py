"""Online runs that die, or that are several processes, for `test_online.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from processes import ranks
from tiny_training import TinyReward, tiny_trainer

from visiontune.core import Loss
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.guidance import NoGuidance
from visiontune.objectives import alignprop
from visiontune.objectives._online import OnlineConfig, Rollouts, conditions, score
from visiontune.rewards.mix import Mix, Term

PROMPTS = ["a red cat", "a dog", "two birds in a tree", "a blue fish", "an old house"]


class Remembering(Rollouts):
    """Pulls the prediction at drawn latents towards a running mean that it keeps as its state."""

    group = 2
    updates = 2
    dies_at = -1
    calls = 0

    def collect(self, model, batch, tools):
        self.calls += 1
        if tools.index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.stack([torch.randn(4, 8, 8, generator=rng) for rng in tools.generators(batch)])
        cond, _ = conditions(model, batch.prompts, NoGuidance(), tools.text)
        rewards = tools.gather(score(tools, model.decode(noise) / 2 + 0.5, batch)["reward"])
        mean = tools.state.get("mean", torch.zeros(()))
        tools.state["mean"] = 0.9 * mean + 0.1 * rewards.mean()
        tools.state["rollouts"] = tools.state.get("rollouts", 0) + 1
        return noise, cond

    def probe(self, model, batch, tools):
        self.collect(model, batch, tools)

    def update(self, model, collected, part, tools):
        noise, cond = collected
        t = torch.randint(0, 1000, (len(noise),), generator=tools.shared("t", part))
        with torch.enable_grad():
            loss = (model.predict(noise, t, cond) - tools.state["mean"]).square().mean()
            (tools.scale * loss).backward()
        return Loss(total=loss.detach(), terms={"part": torch.tensor(float(part))})


def remembering(out: Path, dies_at: int = -1, **train):
    """A state of the objective and of the reward, several updates a rollout, averages."""
    torch.set_num_threads(1)
    objective = Remembering(OnlineConfig())
    objective.dies_at = dies_at
    options = {"steps": 12, "checkpoint_every": 4, "lr": 1e-2, "ema": 0.9, "log_every": 3, "resume": True, **train}
    reward = Mix([TinyReward()], [Term(reward="tiny", normalise="running")])
    rows = PromptBatches(PROMPTS, 4, objective.group, seed=7)
    return tiny_trainer(out, objective=objective, rows=rows, reward=reward, seed=7, batch_size=4, **options)


def shared(out: Path, batch_size: int, rank: int = 0, world: int = 1):
    """AlignProp with a trained text encoder and a running scale; the batches may be cut between processes."""
    torch.set_num_threads(1)
    objective = alignprop.build(alignprop.Config(steps=4, cfg_scale=2.0, dynamics={"name": "ddim", "eta": 0.5}))
    options = {
        "steps": 4,
        "optimizer": "sgd",
        "lr": 0.3,
        "log_every": 2,
        "max_grad_norm": None,
        "parts": ["denoiser", "text"],
    }
    rows = PromptBatches(PROMPTS, batch_size, rank=rank, world=world)
    reward = Mix([TinyReward()] * 2, [Term(reward="tiny"), Term(reward="tiny", normalise="running")])
    return tiny_trainer(out, objective=objective, rows=rows, reward=reward, batch_size=batch_size, **options)


def two(folder: str) -> list[int]:
    """The exit codes of two processes of one run."""
    return ranks(2, lambda rank: shared(Path(folder), 2, rank, 2).fit())


def death(folder: str, when: str) -> list[int]:
    """The exit code of a run that dies in rollout ``when``."""
    return ranks(1, lambda _: remembering(Path(folder), dies_at=int(when)).fit())
