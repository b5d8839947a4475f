"""From a recipe to a finished run: the run folder (`folder`), its parts (`parts`), the trainer (`build`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.config import Run

if TYPE_CHECKING:
    from visiontune.training.loop import Trainer

_log = logging.getLogger(__name__)


def assemble(run: Run) -> Trainer:
    """The trainer of a run, whose ``fit()`` first writes the resolved recipe into the run folder, and then trains.

    The folder is this process's until that ends, or until the trainer is dropped.

    Raises:
        UserError: the folder holds another run or is held by one, or model, adapter or data are not usable; nothing is
            left in it then.
    """
    from visiontune.assemble import folder
    from visiontune.assemble.build import build
    from visiontune.training.home import Home

    folder.check_folder(run)
    home = Home(run.folder, folder.dump(run))
    with ExitStack() as stack:
        stack.enter_context(home)
        folder.check_folder(run)  # another may have ended meanwhile
        trainer = build(run, cache_dir=run.cache, plan=True, home=home)
        stack.pop_all()
    return trainer


def train(run: Run, say: Callable[[str], None] = _log.info) -> Path:
    """Train a run and judge it; returns ``adapter.safetensors``, or the folder ``model`` of a full fine-tune.

    Args:
        say: is told what the judge says.
    """
    from visiontune.assemble import judged, parts

    parts.check_shards(run)  # a judge has to be opened
    judge = judged.judge_of(run)
    trainer = assemble(run)
    result = trainer.fit()
    if words := judged.look(run, trainer, judge):
        say(words)
    return result
