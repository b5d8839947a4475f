"""The one place that sets up accelerate."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ProjectConfiguration

from visiontune.errors import UserError
from visiontune.training.config import TrainConfig
from visiontune.training.trackers import check_trackers


def make_accelerator(train: TrainConfig, out: Path) -> Accelerator:
    """Device, precision, accumulation and processes for one run.

    Raises:
        UserError: the precision is not possible on the device, or a tracker is unknown or not installed.
    """
    check_trackers(train.trackers)
    # accelerate keeps the first run's precision and device for the whole process; several runs may follow each other.
    state = PartialState(cpu=train.device == "cpu")
    AcceleratorState._reset_state(reset_partial_state=state.num_processes == 1)
    project = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard"))
    try:
        accelerator = Accelerator(
            cpu=train.device == "cpu",
            mixed_precision=train.precision,
            gradient_accumulation_steps=train.accumulate,
            log_with=[*train.trackers] or None,
            project_config=project,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"train.precision={train.precision}, train.device={train.device}: {error}") from error
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would go on in float32 without a word.
        raise UserError("train.precision=fp16 needs a GPU: use bf16 or no on a CPU")
    return accelerator


def precision_of(accelerator: Accelerator) -> torch.dtype | None:
    """The type that networks compute in during a run; ``None`` for that of their weights."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
