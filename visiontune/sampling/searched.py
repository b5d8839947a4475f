"""Sampling with search: what is drawn, what is kept, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visiontune.core import Request
from visiontune.rewards.base import Reward
from visiontune.sampling.pipeline import check_batch, evaluating, pictures, prepared
from visiontune.search.asked import Asked
from visiontune.search.base import Found, Search, Setting

if TYPE_CHECKING:
    from visiontune.guidance.stack import GuidanceStack
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """A search that is ready to draw.

    Attributes:
        method: the search. at: how pictures are drawn and scored. held_out: judges what is kept, if any does.
    """

    method: Search
    at: Setting
    held_out: Reward | None = None

    @staticmethod
    def of(asked: Asked, model: PipelineModel, **options: Any) -> Searcher:
        """A search on a model, with the options of :func:`visiontune.sampling.pipeline.images`; loads the rewards.

        Raises:
            UserError: the search does not suit the model or the options, or a reward does not suit a search.
        """
        drawing = drawing_of(model, **options)
        reward, held_out = asked.rewards()
        at = Setting(model=model, reward=reward, **drawing)
        asked.method.check(at)
        return Searcher(method=asked.method, at=at, held_out=held_out)

    def plan(self) -> str:
        """What a picture costs, in one line."""
        cost = self.method.cost(self.at)
        return (
            f"search by {self.method.name}: for each picture that is kept {cost.pictures} are drawn and "
            f"'{self.at.reward.name}' scores {cost.scores}; the network sees {cost.rows} pictures, {self.at.rows} "
            "without search"
        )

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[tuple[Found, dict[str, Any]]]:
        """Of each request what was found, and what a manifest says of it, as JSON has it."""
        with evaluating(self.at.model):
            found = self.method.find(self.at, requests)
        rows = [{"reward": [one.plain_reward, one.reward]} for one in found]
        if self.held_out is not None:
            plain, kept = ([getattr(one, name) for one in found] for name in ("plain", "picture"))
            before, after = (self.at.score(np.stack(part), requests, self.held_out) for part in (plain, kept))
            for row, *pair in zip(rows, before, after, strict=True):
                row["held_out"] = pair
        return [(one, {**row, **one.record}) for one, row in zip(found, rows, strict=True)]


def drawing_of(
    model: PipelineModel,
    *,
    steps: int = 25,
    cfg_scale: float = 4.0,
    guidance: GuidanceStack | None = None,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    scheduler: str = "model",
    image_cfg_scale: float | None = None,
) -> dict[str, Any]:
    """Of a :class:`Setting` all but the model and the reward.

    Args:
        steps, cfg_scale, ...: options of :func:`visiontune.sampling.pipeline.images`.

    Raises:
        UserError: as of that.
    """
    guided, size = prepared(model, cfg_scale, guidance, steps, height, width, image_cfg_scale)
    check_batch(batch_size, *size)
    drawing: dict[str, Any] = {
        "steps": steps,
        "guidance": guided,
        "scheduler": scheduler,
        "size": size,
        "batch_size": batch_size,
    }
    return {**drawing, "draw": partial(pictures, model, **drawing)}


def report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean rewards of the pictures of a manifest's rows, without search or guidance and with it, in a line each."""
    lines = []
    for key, by, what in (("search", "searched by", "search"), ("guided", "guided by", "it")):
        for name, role in (("reward", by), ("held_out", "held out")):
            pairs = [row[key][name] for row in rows if name in row.get(key, {})]
            if pairs:
                plain, kept = (fmean(side) for side in zip(*pairs, strict=True))
                lines.append(
                    f"reward {role}: {plain:.4g} without {what}, {kept:.4g} with it, mean of {len(pairs)} pictures"
                )
    return lines
