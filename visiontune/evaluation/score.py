"""Score a folder of images with several rewards."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from visiontune import files, plugin
from visiontune.errors import UserError
from visiontune.evaluation.metrics import to_tensor
from visiontune.rewards.base import Reward, as_reward
from visiontune.sampling import manifest

_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image to be scored; ``meta`` is its line of the manifest."""

    path: Path
    prompt: str
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """``values[reward][i]`` is the score of ``items[i]``."""

    items: list[Item]
    values: dict[str, list[float]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Number, mean, standard deviation, standard error of the mean, least and greatest score of each reward."""
        return {name: _summary(values) for name, values in self.values.items()}

    def table(self) -> str:
        """The summary as plain text, one reward a line."""
        width = max([len("reward"), *map(len, self.values)])
        lines = [f"{'reward':<{width}}  {'images':>6}  {'mean':>9}  {'std':>9}  {'min':>9}  {'max':>9}"]
        for name, row in self.summary().items():
            numbers = "  ".join(f"{row[key]:>9.4f}" for key in ("mean", "std", "min", "max"))
            lines.append(f"{name:<{width}}  {row['images']:>6}  {numbers}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping ``file, prompt, <reward>...`` for each image."""
        return [
            {"file": item.path.name, "prompt": item.prompt, **{name: v[i] for name, v in self.values.items()}}
            for i, item in enumerate(self.items)
        ]

    def write(self, path: str | Path) -> Path:
        """Write everything to a ``.json`` file (summary and images) or a ``.csv`` file (images alone), atomically.

        Raises:
            UserError: another suffix.
        """
        path = Path(path).expanduser()
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

    Args:
        folder: what :func:`read_folder` takes.
        rewards: rewards by name, or specs as :func:`build_rewards` takes them.
        batch_size: images a batch; images of one batch have one size.
        device: where images, and with them the rewards' models, are put.
        progress: show a bar.

    Raises:
        UserError: the folder cannot be read, or a reward fails its checks.
    """
    built = rewards if isinstance(rewards, Mapping) else build_rewards(rewards)
    if not built:
        raise UserError("no rewards to score with: name at least one")
    items = read_folder(folder)
    values: dict[str, list[float]] = {name: [math.nan] * len(items) for name in built}
    with torch.no_grad(), tqdm(total=len(items), unit="image", disable=not progress) as bar:
        for indices in _batches(items, batch_size):
            batch = [items[i] for i in indices]
            images = to_tensor(np.stack([_pixels(item.path) for item in batch])).to(device)
            for name, reward in built.items():
                result = reward(images, [item.prompt for item in batch], [item.meta for item in batch])
                for i, value in zip(indices, result.tolist(), strict=True):
                    values[name][i] = value
            bar.update(len(batch))
    return Scores(items=items, values=values)


def build_rewards(specs: Sequence[str | Mapping[str, Any]]) -> dict[str, Reward]:
    """Rewards by name from specs: a reward's name, a ``.py`` file, or a mapping ``{"name": ..., **options}``.

    A name that comes twice is told apart by its options.
    """
    built: dict[str, Reward] = {}
    for i, spec in enumerate(specs):
        module, config = plugin.configure("rewards", spec, f"rewards[{i}]")
        options = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
        base = Path(spec if isinstance(spec, str) else spec["name"]).stem
        name = base if not options else f"{base}({', '.join(f'{k}={v}' for k, v in options.items())})"
        if name in built:
            raise UserError(f"rewards[{i}]: {name} is named twice: leave one out")
        built[name] = as_reward(module.build(config), name)
    return built


def read_folder(folder: str | Path) -> list[Item]:
    """Images and prompts of a folder: those of its ``manifest.jsonl``, or images with ``.txt`` files beside them.

    Raises:
        UserError: there is no such folder, it has no images, or prompts or images are missing (the first ten named).
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if (folder / manifest.NAME).is_file():
        rows = manifest.read(folder / manifest.NAME)
        items = [Item(path=folder / row["file"], prompt=row["prompt"], meta=row) for row in rows]
        _refuse([item.path.name for item in items if not item.path.is_file()], folder, "is in the manifest but absent")
    else:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.name != "grid.png")
        _refuse([p.name for p in paths if not p.with_suffix(".txt").is_file()], folder, "has no .txt with its prompt")
        prompts = [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in paths]
        items = [Item(path=path, prompt=prompt, meta={}) for path, prompt in zip(paths, prompts, strict=True)]
    if not items:
        raise UserError(f"{folder} holds no images to score")
    return items


def _refuse(names: Sequence[str], folder: Path, trouble: str) -> None:
    if names:
        more = " ..." if len(names) > 10 else ""
        raise UserError(f"{len(names)} images of {folder}: {', '.join(names[:10])}{more}: each {trouble}")


def _batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Indices in batches of one image size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        try:
            with Image.open(item.path) as picture:
                by_size.setdefault(picture.size, []).append(i)
        except OSError as error:
            raise UserError(f"{item.path} is not a readable image: make it again or delete it") from error
    return [group[i : i + batch_size] for group in by_size.values() for i in range(0, len(group), batch_size)]


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} is not a readable image: make it again or delete it") from error


def _summary(values: Sequence[float]) -> dict[str, float]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "images": len(values),
        "mean": statistics.fmean(values),
        "std": std,
        "sem": std / math.sqrt(len(values)),
        "min": min(values),
        "max": max(values),
    }
