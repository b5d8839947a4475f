"""Scores of pictures in the pass that draws them, and which of them stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from visiontune.core import Request
from visiontune.data.base import listed
from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.base import Reward, score_each
from visiontune.sampling.config import KeepConfig, SampleConfig
from visiontune.search.asked import configured, single

Row = Mapping[str, Any]


class Scorer:
    """Rewards that score pictures as they are drawn.

    Args:
        specs: as a recipe names rewards. device: where they run.

    Raises:
        UserError: one is unknown, named twice, or compares pictures with each other; or its weights are not there.
    """

    def __init__(self, specs: Sequence[str | Mapping[str, Any]], device: str) -> None:
        self.rewards: list[Reward] = [single(spec, f"score[{i}]") for i, spec in enumerate(specs)]
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """What the manifest says of pictures ``uint8 [n, (f), h, w, 3]``: scores, null where there is none, and why."""
        rows: list[dict[str, Any]] = [{"scores": {}} for _ in requests]
        images, prompts = to_tensor(pictures, self.device), [request.prompt for request in requests]
        for reward in self.rewards:
            columns, reasons = score_each(reward, images, prompts)
            for name, values in columns.items():
                for row, value in zip(rows, values, strict=True):
                    row["scores"][name] = None if math.isnan(value) else value
            for i, reason in reasons.items():
                rows[i].setdefault("unscored", {})[reward.name] = reason
        return rows


def check(config: SampleConfig) -> None:
    """Refuse, before a model is opened, rewards that are wrong, and a `keep` by none of them.

    Raises:
        UserError: naming the mend.
    """
    if config.keep is not None and not config.score:
        raise UserError("keep goes by a score: name its reward in score too, score=[oracle]")
    names = []
    for i, spec in enumerate(config.score):
        configured(spec, f"score[{i}]")
        names.append(name_of(spec))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"score names {twice[0]} twice, and scores go by that name: leave one out")
    if config.keep is not None:
        chosen_by(config.keep, names)


def name_of(spec: str | Mapping[str, Any]) -> str:
    """What a reward is called in the manifest."""
    return spec if isinstance(spec, str) else str(spec.get("name"))


def chosen_by(keep: KeepConfig, names: Sequence[str]) -> str:
    """The score that decides which pictures are kept.

    Raises:
        UserError: it is not among those that are asked for, or there are several and none is named.
    """
    by = keep.by or (names[0] if len(names) == 1 else None)
    if by is None:
        raise UserError(f"keep.by is missing: name the score that decides, one of {', '.join(names)}")
    # A mix has scores of its terms, which are known when it has scored.
    if by.partition("/")[0] not in names and by not in names:
        raise UserError(f"keep.by is '{by}', which is not among score: it must be one of {', '.join(names)}")
    return by


def let_go(rows: Sequence[Row], keep: KeepConfig, names: Sequence[str]) -> set[str]:
    """The files of pictures that are not among the best; one without a score is never among them.

    Of equal scores the earlier row wins.

    Raises:
        UserError: no picture has the score that decides.
    """
    by = chosen_by(keep, names)
    if rows and not any(by in row.get("scores", {}) for row in rows):
        raise UserError(f"keep.by is '{by}', and no picture has a score of that name: all of them are still there")
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row.get("scores", {}).get(by) is not None:
            key = {"prompt": row["index"], "cell": (row.get("cell"), row["index"]), "all": None}[keep.per]
            groups.setdefault(key, []).append(row)
    return {
        row["file"]
        for group in groups.values()
        for row in sorted(group, key=lambda row: -row["scores"][by])[keep.top :]
    }


def complaints(rows: Iterable[Row]) -> list[str]:
    """One line for each reward that failed, with its pictures and the first reason."""
    failed: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for name, reason in row.get("unscored", {}).items():
            failed.setdefault(name, []).append((row["file"], reason))
    return [
        f"no score of '{name}' for {len(some)} pictures, which are kept: {listed([file for file, _ in some])}; "
        f"the first: {some[0][1]}"
        for name, some in failed.items()
    ]


def means(rows: Sequence[Row]) -> list[str]:
    """The mean of each score, in a line."""
    names = dict.fromkeys(name for row in rows for name in row.get("scores", {}))
    lines = []
    for name in names:
        values = [row["scores"][name] for row in rows if row.get("scores", {}).get(name) is not None]
        if values:
            lines.append(f"score {name}: {sum(values) / len(values):.4g}, mean of {len(values)} pictures")
    return lines
