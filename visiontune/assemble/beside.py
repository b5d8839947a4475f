"""What a run shows its model beside words: whether the data has it, and whether the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from visiontune.config import Run
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.data.base import Sample
    from visiontune.objectives.base import Objective

# What becomes of a column, by whether the model paints.
_ARE = {"region": "where a model paints into its picture", "source": "what a model edits"}


def check(run: Run, model: Any, objective: Objective, samples: Sequence[Sample]) -> None:
    """Refuse pictures that the model does not read, a model whose pictures are not there, and what would be drawn of
    words alone by one that needs more.

    Raises:
        UserError: naming what to add or to leave out.
    """
    reads = getattr(model, "reads", None)
    if reads is None:
        return
    columns = {name for sample in samples for name in sample.sources}
    read = {"region"} if reads.mask else {"source"} if reads.pictures else set()
    for name in sorted(columns & (_ARE.keys() - read)):
        raise UserError(
            f"data has a column '{name}', {_ARE[name]}, and '{model.source}' ({model.family}) is none that does: leave "
            f"it out by data.ignore=[{name}], or take another model"
        )
    if "source" in columns and model.WORDS_SEE:
        raise UserError(
            f"the text encoder of '{model.source}' reads the pictures of its prompts, which runs do not show it: take "
            "FLUX.1 Kontext or FLUX.2"
        )
    if reads.least == 0:
        return
    if not reads.mask and "source" not in columns:
        raise UserError(
            f"model '{model.source}' reads {reads.words()} beside each prompt: put what each picture was made of into "
            "a column 'source' (a folder source/ with the same names), or take a model that reads words alone"
        )
    _draws_nothing(run, model, objective)


def _draws_nothing(run: Run, model: Any, objective: Objective) -> None:
    """Refuse options for which such a model would be asked to draw."""
    prior = getattr(objective.config, "prior", "none")
    for asked, mend in (
        (bool(run.preview.prompts), "preview.prompts=[]"),
        (prior != "none", "objective.prior=none"),
        (run.judge is not None, "judge=none"),
        (objective.needs.online, "an objective with data, such as denoising"),
    ):
        if asked:
            raise UserError(
                f"model '{model.source}' reads {model.reads.words()} beside each prompt, and draws nothing from words "
                f"alone: set {mend}"
            )
