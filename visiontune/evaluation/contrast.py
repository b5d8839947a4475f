"""What a model of pictures and texts tells apart: in the pocket world by attributes, elsewhere by your own captions.

Tuning one thing breaks another, so a report has all three: *recognition*, *retrieval* and *composition* (the three
numbers of Oh et al., 2024, arXiv 2406.09388), and *likeness* in the pocket world. Beside each score stand those of who
cannot see: ``chance``, and for your own pictures ``blind``, the model itself shown the mean of all pictures, which
tells what captions give away. Ties are guesses: a model for which all is alike scores chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from visiontune.data.negatives import KINDS, negative
from visiontune.data.transforms import fitted
from visiontune.errors import UserError
from visiontune.models.contrastive import ContrastiveModel
from visiontune.ops.pixels import to_tensor

_BATCH = 64
# Of the false captions: the same for every model.
_SEED = 707


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows ``{what, kind, n, value, chance, ...}`` of one model."""

    model: str
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, float]:
        """The mean value of each kind's rows."""
        kinds = dict.fromkeys(row["kind"] for row in self.rows)
        return {kind: float(np.mean([row["value"] for row in self.rows if row["kind"] == kind])) for kind in kinds}

    def table(self) -> str:
        """One line a row, and the means."""
        beside = [name for name in dict.fromkeys(chain(*self.rows)) if name not in ("what", "kind", "n", "value")]
        wide = max(len(row["what"]) for row in self.rows)
        lines = [
            self.model,
            f"{'':<{wide}}  {'kind':<11}  {'n':>5}  {'right':>6}  " + "  ".join(f"{b:>9}" for b in beside),
        ]
        for row in self.rows:
            numbers = "  ".join(f"{row[name]:>9.3f}" if name in row else f"{'-':>9}" for name in beside)
            lines.append(f"{row['what']:<{wide}}  {row['kind']:<11}  {row['n']:>5}  {row['value']:>6.3f}  {numbers}")
        means = ", ".join(f"{kind} {value:.3f}" for kind, value in self.summary().items())
        return "\n".join([*lines, f"means: {means}"])


def compared(report: Report, base: Report) -> str:
    """How the means of two reports on the same data differ."""
    before = base.summary()
    found = [f"{kind} {value - before[kind]:+.3f}" for kind, value in report.summary().items()]
    return f"{report.model} beside {base.model}: {', '.join(found)}"


def on_pictures(
    model: ContrastiveModel, pictures: Sequence[Image.Image], captions: Sequence[str], name: str = ""
) -> Report:
    """What a model makes of captioned pictures.

    - *caption of a picture*: the best of all different captions is its own; recognition where they are few, as names of
      classes are;
    - *picture of a caption*: the best picture has it;
    - *swap, replace, shuffle*: its own caption is better than a false one of :mod:`visiontune.data.negatives`.

    Raises:
        UserError: fewer than two different captions.
    """
    if len(set(captions)) < 2:
        raise UserError("captions are told from each other: give pictures with two different ones at least")
    images = _of_pictures(model, pictures)
    different = list(dict.fromkeys(captions))
    texts = _of_texts(model, different)
    places = {caption: i for i, caption in enumerate(different)}
    own = torch.tensor([places[caption] for caption in captions])
    return Report(model=name or model.source, rows=[*_retrieval(images, texts, own), *_wrong(model, images, captions)])


def _retrieval(images: Tensor, texts: Tensor, own: Tensor) -> Iterator[dict[str, Any]]:
    scores = images @ texts.T
    blind = normalize(images.mean(0), dim=0) @ texts.T
    truth = own[:, None] == torch.arange(len(texts))
    for most in (1, 5):
        if most < len(texts):
            hits, hidden = top(scores, truth, most), top(blind.expand_as(scores), truth, most)
            chance = top(torch.zeros_like(scores), truth, most)
            yield _row(f"caption of a picture, top-{most} of {len(texts)}", "retrieval", hits, chance, hidden)
    for most in (1, 5):
        if most < len(images):
            hits, chance = (top(table, truth.T, most) for table in (scores.T, torch.zeros_like(scores.T)))
            yield _row(f"picture of a caption, top-{most} of {len(images)}", "retrieval", hits, chance)


def _wrong(model: ContrastiveModel, images: Tensor, captions: Sequence[str]) -> Iterator[dict[str, Any]]:
    mean = normalize(images.mean(0), dim=0)
    for kind in KINDS:
        made = [(i, negative(text, kind, random.Random(f"{_SEED} {i}"))) for i, text in enumerate(captions)]
        pairs = [(i, text) for i, text in made if text is not None]
        if not pairs:
            continue
        rows = torch.tensor([i for i, _ in pairs])
        true, false = (_of_texts(model, texts) for texts in ([captions[i] for i, _ in pairs], [t for _, t in pairs]))
        hits, blind = (better((seen * true).sum(1), (seen * false).sum(1)) for seen in (images[rows], mean))
        chance = torch.full_like(hits, 0.5)
        yield _row(f"its caption, not one with words {_DONE[kind]}", "composition", hits, chance, blind)


_DONE = {"swap": "swapped", "replace": "replaced", "shuffle": "shuffled"}


def better(true: Tensor, false: Tensor) -> Tensor:
    """1 where the first score is the higher, 1/2 where they are equal."""
    return (true > false).double() + (true == false).double() / 2


def top(scores: Tensor, truth: Tensor, most: int) -> Tensor:
    """Probability [b] that a right column is among the ``most`` best, ties in an order of chance.

    Args:
        scores: [b, n]. truth: bool [b, n], at least one of each row.
    """
    best = scores.masked_fill(~truth, float("-inf")).amax(1, keepdim=True)
    above = (scores > best).sum(1)
    equal, right = (scores == best).sum(1), ((scores == best) & truth).sum(1)
    left = (most - above).clamp(min=0)
    # The chance that none of the right ones is among the first `left` of the equal ones.
    missed = torch.ones(len(scores), dtype=torch.float64)
    for k in range(int(left.max())):
        wrong = (equal - right - k).clamp(min=0)
        missed = torch.where(k < left, missed * wrong / (equal - k).clamp(min=1), missed)
    return torch.where(left > 0, 1 - missed, 0.0)


def _row(what: str, kind: str, hits: Tensor, chance: Tensor, blind: Tensor | None = None) -> dict[str, Any]:
    row = {"what": what, "kind": kind, "n": len(hits), "value": float(hits.mean()), "chance": float(chance.mean())}
    return row if blind is None else {**row, "blind": float(blind.mean())}


@torch.no_grad()
def _of_pictures(model: ContrastiveModel, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit features on the CPU, of the middle of each picture."""
    side, found = model.resolution, []
    for start in range(0, len(pictures), _BATCH):
        shown = [np.asarray(fitted(picture, (side, side))) for picture in pictures[start : start + _BATCH]]
        found.append(model.image_features(to_tensor(np.stack(shown), model.device)).pooled.float().cpu())
    return normalize(torch.cat(found), dim=-1)


@torch.no_grad()
def _of_texts(model: ContrastiveModel, texts: Sequence[str]) -> Tensor:
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    return normalize(torch.cat([model.text_features(part).pooled.float().cpu() for part in parts]), dim=-1)
