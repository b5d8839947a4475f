"""Training runs that die, or that are several processes: run by `test_resume.py`, and imported there."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import torch
from tiny_training import CutRows, RowNoise, TinyModel, TinyRows, tiny_trainer

from visiontune.objectives import dreambooth
from visiontune.training import checkpoint

STEPS = 13


class Mortal(dreambooth.DreamBooth):
    """Kills its process in the middle of a step, after half of the step's batches."""

    dies_at = -1
    calls = 0

    def loss(self, model, batch, rng):
        if batch.ids[0].startswith(f"{self.dies_at}-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch, rng)


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
        "text_encoder": True,
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


def processes(out: Path, world: int, make=None) -> list[int]:
    """Train what `make` makes, by default `shared`, with several processes; gives their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            (make or shared)(out, 2, rank, world).fit()
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def shared(out: Path, batch_size: int, rank: int = 0, world: int = 1):
    """A run whose batches may be cut between processes."""
    torch.set_num_threads(1)
    model = TinyModel()
    rows = CutRows(model, batch_size, rank, world)
    options = {"steps": 4, "optimizer": "sgd", "lr": 0.1, "accumulate": 2, "log_every": 2, "max_grad_norm": None}
    return tiny_trainer(out, model=model, rows=rows, objective=RowNoise(), **options)


if __name__ == "__main__":
    # One child per death, forked before torch has started a thread: importing it again would take most of the time.
    folder = Path(sys.argv[1])
    for death in sys.argv[2:]:
        where, when = death.split(":")
        if where == "processes":
            print(*processes(folder, int(when)), flush=True)
            continue
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *checkpoint.steps(folder), flush=True)
            continue
        if where == "save":
            die_while_saving(int(when))
        trainer(folder, dies_at=int(when) if where == "batch" else -1).fit()
        os._exit(0)
