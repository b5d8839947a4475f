"""Score a folder of images with several rewards."""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from visiontune import files, outside
from visiontune.data import pictures
from visiontune.data.base import listed
from visiontune.data.folder import captions_of
from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.base import Reward, score_each
from visiontune.rewards.loading import load
from visiontune.sampling import manifest, shards

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to be scored; ``meta`` is its line of the manifest."""

    path: Path
    prompt: str
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """``values[reward][i]`` is the score of ``items[i]``, NaN where the reward failed."""

    items: list[Item]
    values: dict[str, list[float]]
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    """Why ``items[i]`` has no score of a reward."""

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Number, mean, standard deviation, standard error of the mean, least and greatest score of each reward.

        They are those of the images that have a score; a reward without any has null for all but the number.
        """
        return {name: _summary([v for v in values if not math.isnan(v)]) for name, values in self.values.items()}

    def complaints(self) -> list[str]:
        """One line for each reward that failed, naming the first of its images."""
        lines = []
        for name, reasons in self.failures.items():
            first, reason = min(reasons.items())
            count = f"{len(reasons)} of {len(self.items)} images"
            lines.append(f"no score of '{name}' for {count}; first {self.items[first].path.name}: {reason}")
        return lines

    def table(self) -> str:
        """The summary as plain text, one reward a line."""
        width = max([len("reward"), *map(len, self.values)])
        lines = [f"{'reward':<{width}}  {'images':>6}  {'mean':>9}  {'std':>9}  {'min':>9}  {'max':>9}"]
        for name, row in self.summary().items():
            cells = [row[key] for key in ("mean", "std", "min", "max")]
            numbers = "  ".join(f"{'-':>9}" if cell is None else f"{cell:>9.4f}" for cell in cells)
            lines.append(f"{name:<{width}}  {row['images']:>6}  {numbers}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping ``file, prompt, <reward>...`` for each image; a score that is missing is null."""
        values = {name: [None if math.isnan(v) else v for v in column] for name, column in self.values.items()}
        return [
            {"file": item.path.name, "prompt": item.prompt, **{name: column[i] for name, column in values.items()}}
            for i, item in enumerate(self.items)
        ]

    def write(self, path: str | Path) -> Path:
        """Write everything to a ``.json`` file (summary and images) or a ``.csv`` file (images alone), atomically.

        Raises:
            UserError: another suffix.
        """
        path = outside.expanded(path)
        if path.suffix == ".json":
            files.write_json(path, {"summary": self.summary(), "images": self.rows()})
        elif path.suffix == ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, ["file", "prompt", *self.values], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())
            files.write_text(path, text.getvalue())
        else:
            raise UserError(f"scores are written to a .json or .csv file, not {path.name}")
        return path


def score(
    folder: str | Path,
    rewards: Mapping[str, Reward] | Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 32,
    device: str = "cpu",
    progress: bool = False,
) -> Scores:
    """Score every image of a folder with every reward.

    A reward that fails on a batch is asked for its images one by one: those that fail have no score and are named in
    :meth:`Scores.complaints`, and everything else is kept. The terms of a mix have columns of their own.

    Args:
        folder: what :func:`read_folder` takes.
        rewards: rewards by name, or specs as :func:`build_rewards` takes them.
        batch_size: images a batch; images of one batch have one size. A groupwise reward gets all images of a prompt
            (of one size) at once instead.
        device: where images, and with them the rewards' models, are put.
        progress: show a bar.

    Raises:
        UserError: the folder cannot be read.
    """
    built = rewards if isinstance(rewards, Mapping) else build_rewards(rewards)
    if not built:
        raise UserError("no rewards to score with: name at least one")
    items = read_folder(folder)
    scores = Scores(items=items, values={name: [math.nan] * len(items) for name in built})
    sizes = [pictures.size(item.path) for item in items]
    passes = [
        ({n: r for n, r in built.items() if not r.groupwise}, _batches(sizes, batch_size)),
        ({n: r for n, r in built.items() if r.groupwise}, _groups(items, sizes)),
    ]
    total = sum(len(items) for some, _ in passes if some)
    with torch.no_grad(), tqdm(total=total, unit="image", disable=not progress) as bar:
        for some, batches in passes:
            for indices in batches if some else []:
                _score_batch(scores, some, indices, device)
                bar.update(len(indices))
    return scores


def _score_batch(scores: Scores, rewards: Mapping[str, Reward], indices: list[int], device: str) -> None:
    """Put the scores of some images in, or the reasons why there are none."""
    try:
        images = to_tensor(np.stack([_pixels(scores.items[i].path) for i in indices]), device)
    except UserError as error:
        if len(indices) == 1:
            for name in rewards:
                scores.failures.setdefault(name, {})[indices[0]] = str(error)
            return
        for i in indices:
            _score_batch(scores, rewards, [i], device)
        return
    for name, reward in rewards.items():
        _score_images(scores, name, reward, indices, images)


def _score_images(scores: Scores, name: str, reward: Reward, indices: list[int], images: torch.Tensor) -> None:
    batch = [scores.items[i] for i in indices]
    columns, reasons = score_each(reward, images, [item.prompt for item in batch], [item.meta for item in batch])
    for column, values in columns.items():
        # Rewards are told apart by names that may be others than their own.
        label = name + column.removeprefix(reward.name)
        cells = scores.values.setdefault(label, [math.nan] * len(scores.items))
        for i, value in zip(indices, values, strict=True):
            cells[i] = value
    if reasons:
        scores.failures.setdefault(name, {}).update({indices[k]: reason for k, reason in reasons.items()})


def build_rewards(specs: Sequence[str | Mapping[str, Any]]) -> dict[str, Reward]:
    """Rewards by name from specs as :func:`visiontune.rewards.loading.load` takes them.

    A name that comes twice is told apart by its options.
    """
    built: dict[str, Reward] = {}
    for i, spec in enumerate(specs):
        options = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
        base = Path(spec if isinstance(spec, str) else str(spec.get("name"))).stem
        name = base if not options else f"{base}({', '.join(f'{k}={v}' for k, v in options.items())})"
        if name in built:
            raise UserError(f"rewards[{i}]: {name} is named twice: leave one out")
        built[name] = load(spec, f"rewards[{i}]", name)
    return built


def read_folder(folder: str | Path) -> list[Item]:
    """Images and prompts of a folder: those of its ``manifest.jsonl``, or images captioned as for training.

    Raises:
        UserError: there is no such folder, it has no images, or prompts or images are missing (the first ten named).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if (folder / manifest.NAME).is_file():
        rows = [row for row in manifest.read(folder / manifest.NAME) if manifest.is_kept(row)]
        packed = shards.members(folder)
        if any(row["file"] in packed and not (folder / row["file"]).is_file() for row in rows):
            raise UserError(
                f"{folder} has its pictures in shards: unpack them (tar xf), or score them as they are drawn"
            )
        items = [Item(path=folder / row["file"], prompt=row["prompt"], meta=row) for row in rows]
        _refuse([item.path.name for item in items if not item.path.is_file()], folder, "is in the manifest but absent")
    else:
        found = captions_of(folder, ignore=[manifest.GRID])
        _refuse([path.name for path, words in found.items() if words is None], folder, "has no .txt with its prompt")
        _refuse([path.name for path in found if not path.is_file()], folder, "has a caption but is absent")
        items = [Item(path=path, prompt=words or "", meta={}) for path, words in found.items()]
    if not items:
        raise UserError(f"{folder} holds no images to score")
    taken = {item.path for item in items}
    others = (f.relative_to(folder) for f in folder.rglob("*") if pictures.is_picture(f) and f not in taken)
    others = (f for f in others if not manifest.is_sheet(f.as_posix()))
    left = sorted(f.as_posix() for f in others if not any(part.startswith(".") for part in f.parts))
    if left:
        what = "are not in its manifest" if (folder / manifest.NAME).is_file() else "lie deeper, or are no files"
        _log.warning("%d pictures of %s are not scored, since they %s: %s", len(left), folder, what, listed(left))
    return items


def _refuse(names: Sequence[str], folder: Path, trouble: str) -> None:
    if names:
        more = " ..." if len(names) > 10 else ""
        raise UserError(f"{len(names)} images of {folder}: {', '.join(names[:10])}{more}: each {trouble}")


def _batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices in batches of one image size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        by_size.setdefault(size, []).append(i)
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


def _groups(items: Sequence[Item], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices in groups of one prompt and one image size."""
    groups: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((item.prompt, sizes[i]), []).append(i)
    return list(groups.values())


def _pixels(path: Path) -> np.ndarray:
    shown = pictures.frames(path)
    if shown.ndim > 3:
        raise UserError(f"{path} is a clip of {len(shown)} frames, and what is scored here are pictures")
    return shown


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"images": 0, "mean": None, "std": None, "sem": None, "min": None, "max": None}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "images": len(values),
        "mean": statistics.fmean(values),
        "std": std,
        "sem": std / math.sqrt(len(values)),
        "min": min(values),
        "max": max(values),
    }
