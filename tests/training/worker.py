"""Training runs that die, or that are several processes, for `test_resume.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from processes import ranks
from tiny_training import CutRows, RowNoise, TinyModel, TinyRows, tiny_trainer

from visiontune import adapters
from visiontune.objectives import dreambooth
from visiontune.signals import Interrupted
from visiontune.training import checkpoint

STEPS = 13


class Mortal(dreambooth.DreamBooth):
    """Kills its process in the middle of a step, after half of the step's batches."""

    dies_at = -1
    calls = 0

    def loss(self, model, batch, tools):
        if batch.ids[0].startswith(f"{self.dies_at}-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch, tools)


def trainer(out: Path, dies_at: int = -1, **train):
    """Everything with a state: averages, a schedule, dropout, accumulation, momenta, a trained text encoder."""
    torch.set_num_threads(1)
    objective = Mortal(dreambooth.Config(snr_gamma=5.0, offset_noise=0.1))
    objective.dies_at = dies_at
    model = TinyModel(dropout=0.2)
    options = {
        "steps": STEPS,
        "lr": 1e-2,
        "accumulate": 2,
        "ema": 0.9,
        "schedule": "cosine",
        "warmup": 3,
        "parts": ["denoiser", "text"],
        "checkpoint_every": 3,
        "log_every": 4,
        "resume": True,
        "trackers": ["tensorboard"],
    }
    rows = TinyRows(model, batch_size=1, prior=1, embedded=False)
    return tiny_trainer(out, objective=objective, model=model, rows=rows, seed=7, **options | train)


def die_while_saving(step: int) -> None:
    """Kill the process when the checkpoint of `step` has its weights but not its state."""
    save = torch.save

    def dying(state, file):
        if state["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    checkpoint.torch.save = dying


def die_before_replacing(name: str) -> None:
    """Kill the process when a file of that name would be put in its place."""
    replace = os.replace

    def dying(source, target):
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


def signalled(folder: str) -> list[int]:
    """Two processes of one run, the second of which is sent SIGTERM in step 2; which step each stopped after."""

    def work(rank: int) -> None:
        run = shared(Path(folder), 2, rank, 2)
        loss = run.loss
        run.loss = lambda index: [index == 3 and rank == 1 and os.kill(os.getpid(), signal.SIGTERM), loss(index)][1]
        try:
            run.fit()
        except Interrupted as stop:
            assert stop.number == signal.SIGTERM
            os._exit(10 + checkpoint.steps(Path(folder))[-1])

    return ranks(2, work)


def shared(out: Path, batch_size: int, rank: int = 0, world: int = 1, over: bool | None = False):
    """A run whose batches may be cut between processes.

    Args:
        over: trains an adapter over another one; None an adapter alone, and False all weights.
    """
    torch.set_num_threads(1)
    model = TinyModel()
    sets = {} if over is False else {"under": stacked(model) if over else None, "adapters": adapted(model)}
    rows = CutRows(model, batch_size, rank, world)
    options = {"steps": 4, "optimizer": "sgd", "lr": 0.1, "accumulate": 2, "log_every": 2, "max_grad_norm": None}
    return tiny_trainer(out, model=model, rows=rows, objective=RowNoise(), **sets, **options)


def adapted(model, name: str = "default"):
    """A LoRA of the denoiser that starts at nothing."""
    torch.manual_seed(0)
    return adapters.attach(model.of("denoiser"), "lora", targets="all", presets=model.presets(), rank=2, name=name)


def stacked(model):
    """A frozen one that moves it much."""
    made = adapted(model, "under").requires_grad_(False).eval()
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made


def two(folder: str) -> list[int]:
    """The exit codes of two processes of one run."""
    return ranks(2, lambda rank: shared(Path(folder), 2, rank, 2).fit())


def two_over(folder: str) -> list[int]:
    """The same of a run that trains an adapter over another one."""
    return ranks(2, lambda rank: shared(Path(folder), 2, rank, 2, over=True).fit())


def deaths(folder: str, *places: str) -> list[list[int]]:
    """Let a run die at each of ``places``, one after the other; each exit code, and the checkpoints then there."""
    return [
        [*ranks(1, lambda _, place=place: die(Path(folder), place)), *checkpoint.steps(Path(folder))]
        for place in places
    ]


def die(out: Path, place: str) -> None:
    """Train up to ``batch:N`` or ``save:N``, or until ``replace:NAME``, when a file is whole and not yet in place."""
    where, _, when = place.partition(":")
    if where == "save":
        die_while_saving(int(when))
    if where == "replace":
        die_before_replacing(when)
    trainer(out, dies_at=int(when) if where == "batch" else -1).fit()
