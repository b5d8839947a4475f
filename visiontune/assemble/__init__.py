"""From a recipe to a finished run: the run folder (`folder`), its parts (`parts`), the trainer (`build`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.config import Run

if TYPE_CHECKING:
    from visiontune.training.loop import Trainer


def assemble(run: Run) -> Trainer:
    """The trainer of a run, whose ``fit()`` trains it; the resolved recipe is written into the run folder.

    Raises:
        UserError: the folder holds another run, or model, adapter or data are not usable; no recipe is written then.
    """
    from visiontune.assemble import folder
    from visiontune.assemble.build import build
    from visiontune.files import write_text

    folder.check_folder(run)
    trainer = build(run, cache_dir=Path(run.out).expanduser() / ".cache", plan=True)
    if trainer.accelerator.is_main_process:
        write_text(run.folder / folder.RECIPE, folder.dump(run))
    return trainer


def train(run: Run) -> Path:
    """Train a run; returns ``adapter.safetensors``, or the folder ``model`` of a full fine-tune."""
    return assemble(run).fit()
