"""Metrics: ``metrics.jsonl``, one row per logged step, and whichever trackers accelerate knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from visiontune import outside
from visiontune.errors import UserError
from visiontune.files import append_jsonl, write_text, writing
from visiontune.schema import nearest

FILE = "metrics.jsonl"


class Meter:
    """Mean of named scalars since the last row; its sums stay on the device, so adding to them waits for nothing."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            # A checkpoint gives sums back on the CPU.
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def reduce(self, accelerator: Any) -> None:
        """Replace each process's sums and counts by those of all, each of which may know other names."""
        if accelerator.num_processes == 1:
            return
        told = gather_object([{name: (float(total), self.counts[name]) for name, total in self.sums.items()}])
        names = dict.fromkeys(name for own in told for name in own)
        totals = {name: sum(own[name][0] for own in told if name in own) for name in names}
        self.sums = {name: torch.tensor(total, dtype=torch.float64) for name, total in totals.items()}
        self.counts = {name: sum(own[name][1] for own in told if name in own) for name in names}

    def take(self) -> dict[str, float]:
        """The means, after which the meter is empty."""
        row = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Metrics:
    """Writes rows from the main process.

    Args:
        accelerator: owns the trackers.
        out: the run folder; TensorBoard's events go to ``tensorboard/`` in it.
        trackers: names that accelerate knows.
        step: steps already done; rows of later steps, left by a run that was killed, are taken away.
    """

    def __init__(self, accelerator: Any, out: Path, trackers: list[str], step: int) -> None:
        self.accelerator, self.path = accelerator, out / FILE
        if accelerator.is_main_process:
            forget_after(self.path, step)
        options = {"tensorboard": {"purge_step": step + 1}, "wandb": {"name": out.name}}
        with writing(out):
            accelerator.init_trackers("visiontune", init_kwargs={k: v for k, v in options.items() if k in trackers})

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row, unless there is nothing in it."""
        if row and self.accelerator.is_main_process:
            append_jsonl(self.path, {"step": step, **{k: float(f"{v:.6g}") for k, v in row.items()}})
            self.accelerator.log(dict(row), step=step)

    def images(self, step: int, pixels: Any) -> None:
        """Show previews ``uint8 [n, (f), h, w, 3]`` in the trackers that take images; of clips the middle frames."""
        if pixels.ndim == 5:
            pixels = pixels[:, pixels.shape[1] // 2]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"preview": pixels}, step=step, **layout)

    def close(self) -> None:
        # Not accelerate's end_training, which takes the process group away before the results are written.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate would pass over in silence.

    Raises:
        UserError: a tracker that is unknown or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = [str(k) for k in LOGGER_TYPE_TO_CLASS], [str(k) for k in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"train.trackers: '{name}' is unknown{nearest(name, known)}")
        if name not in installed:
            raise UserError(f"train.trackers: '{name}' is not installed; pip install {name}, or take it off the list")


def forget_after(path: Path, step: int) -> None:
    """Keep the rows of ``metrics.jsonl`` up to ``step``, dropping a last line that was cut short.

    Raises:
        UserError: another line is no row; nothing is changed then.
    """
    if not path.exists():
        return
    kept = []
    lines = outside.read_text(path, "metrics").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = outside.parse_json(line, f"{path} line {number}")
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise UserError(f"{path} line {number} is no row of metrics with a step: delete that line")
        except UserError:
            # Only a line without its end can have been cut short; after it there is nothing.
            if number == len(lines):
                break
            raise
        if row["step"] <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
