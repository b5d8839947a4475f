"""Images drawn during training: fixed prompts and seeds, the stock pipeline, the averaged weights if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune.files import atomic_write
from visiontune.training import home
from visiontune.training.config import PreviewConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from visiontune.models.pipeline import PipelineModel
    from visiontune.sampling.shown import Shown

BEFORE_AFTER = "samples/before_after.png"


def due(step: int, total: int, config: PreviewConfig) -> bool:
    """Whether previews are drawn after ``step`` steps: at 0, at every ``every``-th, and at the end."""
    return bool(config.prompts) and (step % config.every == 0 or step == total)


def folder(out: Path, step: int) -> Path:
    """Where the previews after ``step`` steps lie."""
    return out / "samples" / f"step-{step:06d}"


def file_name(prompt: int, seed: int) -> str:
    """Name of one preview: the prompt's place in the list and the seed."""
    return f"{prompt:02d}_seed{seed}.png"


def draw(model: PipelineModel, config: PreviewConfig, shown: Sequence[Shown] = ()) -> np.ndarray:
    """Pictures ``uint8 [prompts * seeds, (f), h, w, 3]``, all seeds of the first prompt first.

    Args:
        shown: what stands beside each prompt, if anything.
    """
    from visiontune.core import Request
    from visiontune.guidance.stack import GuidanceStack
    from visiontune.sampling.pipeline import pictures, prepared
    from visiontune.sampling.shown import NOTHING

    terms = GuidanceStack.of_options(config)
    width = 2 * model.size()[1] if any(one.canvas for one in shown) else None
    guidance, size = prepared(
        model, config.cfg_scale, terms, config.steps, None, width, image_cfg_scale=config.image_cfg_scale
    )
    requests = [
        Request(prompt=prompt, seed=seed, **beside.fitted(model, size).options())
        for prompt, beside in zip(config.prompts, shown or [NOTHING] * len(config.prompts), strict=True)
        for seed in config.seeds
    ]
    return pictures(
        model,
        requests,
        steps=config.steps,
        guidance=guidance,
        size=size,
        batch_size=config.batch_size,
        scheduler=config.scheduler,
    )


def keep(out: Path, step: int, config: PreviewConfig, pixels: np.ndarray, shown: Sequence[Shown] = ()) -> None:
    """Write ``samples/step-N/`` (one file per prompt and seed, and ``grid.png``) as a whole."""
    write(folder(out, step), pixels, config.prompts, config.seeds, shown)


def compare(out: Path, step: int, config: PreviewConfig, shown: Sequence[Shown] = ()) -> None:
    """Write ``BEFORE_AFTER``: under each preview of step 0, from the same noise, that of ``step``; before them what
    they were shown.

    Nothing is written where either is not there.
    """
    pairs = [(i, when) for i in range(len(config.prompts)) for when in (0, step)]
    files = [folder(out, when) / file_name(i, seed) for i, when in pairs for seed in config.seeds]
    if not files or not all(file.is_file() for file in files):
        return
    names = [f"{config.prompts[i]} (step {when})" for i, when in pairs]
    twice = [beside for beside in shown for _ in (0, step)]
    sheet = _sheet(files, names, config.seeds, twice)
    with atomic_write(out / BEFORE_AFTER) as partial:
        sheet.save(partial, format="PNG")


def write(
    target: Path,
    pixels: np.ndarray,
    prompts: Sequence[str],
    seeds: Sequence[int],
    shown: Sequence[Shown] = (),
) -> None:
    """Write one file per prompt and seed, all seeds of the first prompt first, and ``grid.png``, as a whole."""
    from visiontune.sampling.writer import write_image

    names = [file_name(i, seed) for i in range(len(prompts)) for seed in seeds]
    home.clear(target.parents[1], target)
    with atomic_write(target) as partial:
        partial.mkdir()
        for name, image in zip(names, pixels, strict=True):
            write_image(partial / name, image)
        _sheet(list(pixels), prompts, seeds, shown).save(partial / "grid.png")


def _sheet(
    pictures: Sequence[Path | np.ndarray],
    names: Sequence[str],
    seeds: Sequence[int],
    shown: Sequence[Shown],
) -> Image.Image:
    """A row for each name, of one picture for each seed, and where anything was shown a first column of that."""
    from visiontune.sampling.grid import grid

    columns, count = [f"seed {seed}" for seed in seeds], len(seeds)
    rows: list[list[Any]] = [list(pictures[i * count : (i + 1) * count]) for i in range(len(names))]
    if any(shown):
        columns = ["shown", *columns]
        rows = [[beside.seen() if beside else None, *row] for beside, row in zip(shown, rows, strict=True)]
    return grid([one for row in rows for one in row], len(columns), row_captions=names, column_captions=columns)


def card_images(out: Path, config: PreviewConfig) -> list[dict[str, Any]]:
    """One entry per prompt for the model card's widget: text and the newest preview's file, relative to ``out``."""
    drawn = sorted(path for path in (out / "samples").glob("step-*") if home.wrote(out, path))
    if not drawn or not config.seeds:
        return [{"text": prompt} for prompt in config.prompts]
    place = f"samples/{drawn[-1].name}"
    return [
        {"text": prompt, "output": {"url": f"{place}/{file_name(i, config.seeds[0])}"}}
        for i, prompt in enumerate(config.prompts)
    ]
