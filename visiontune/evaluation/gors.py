"""GORS: a model's own pictures that are as their prompts say, to be trained on, each as much as it is so.

Huang et al., "T2I-CompBench", NeurIPS 2023, arXiv 2307.06350, section 5: pictures of training prompts are drawn and
scored, those above a threshold are kept, and the loss of each is multiplied by its score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from visiontune import files
from visiontune.errors import UserError
from visiontune.evaluation.compose import Judge, Task, evaluate

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

WEIGHT = "weight"


def draw(
    model: PipelineModel, tasks: Sequence[Task], judge: Judge, folder: Path, *, threshold: float = 0.5, **sampling: Any
) -> int:
    """Draw a picture of each task and write those whose score is above the threshold as a dataset of its own.

    Args:
        tasks: of training: none of those that the model will be evaluated by.
        folder: is made: pictures, and a ``metadata.jsonl`` with ``text`` and ``weight``, for `data.weight_column`.
        threshold: of the score, below 1.
        sampling: as of :func:`visiontune.evaluation.compose.evaluate`.

    Returns:
        How many were kept.

    Raises:
        UserError: the folder is there, or no picture is good enough.
    """
    files.check_new(folder)
    report = evaluate(model, tasks, judge, **sampling)
    scored = zip(report.pictures, tasks, (verdict.right for verdict in report.verdicts), strict=True)
    kept = [(picture, task, score) for picture, task, score in scored if score > threshold]
    if not kept:
        raise UserError(f"none of {len(tasks)} pictures scores above {threshold:g}: lower the threshold")
    with files.atomic_write(folder) as partial:
        partial.mkdir()
        for i, (picture, _, _) in enumerate(kept):
            Image.fromarray(picture).save(partial / f"{i:05d}.png")
        lines = [
            {"file_name": f"{i:05d}.png", "text": task.prompt, WEIGHT: score} for i, (_, task, score) in enumerate(kept)
        ]
        (partial / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return len(kept)
