"""What a run shows its model beside words: whether the data has it, and whether the model reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visiontune.config import Run
from visiontune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from visiontune.data.base import Config, Sample
    from visiontune.objectives.base import Objective
    from visiontune.sampling.shown import Shown
    from visiontune.training.config import PreviewConfig

# What becomes of a column, by whether the model paints.
_ARE = {"region": "where a model paints into its picture", "source": "what a model edits"}


def check(run: Run, model: Any, objective: Objective, samples: Sequence[Sample]) -> None:
    """Refuse pictures that the model does not read, a model whose pictures are not there, and what would be drawn of
    words alone by one that needs more.

    Raises:
        UserError: naming what to add or to leave out.
    """
    reads = getattr(model, "reads", None)
    if reads is None or not reads.pictures:
        _shows_nothing(run, model)
    columns = {name for sample in samples for name in sample.sources}
    _check_dropout(run, model, columns)
    _check_masks(run, objective, columns)
    if run.data.canvas and (reads is None or not reads.mask):
        raise UserError(
            f"data.canvas is for models that paint into pictures, and '{model.source}' ({model.family}) is none: take "
            "an inpainting model, such as pocket/inpaint"
        )
    if reads is None:
        return
    from visiontune.training.optim import trains_text

    read = {"region"} if reads.mask else {"source"} if reads.pictures else set()
    for name in sorted(columns & (_ARE.keys() - read)):
        raise UserError(
            f"data has a column '{name}', {_ARE[name]}, and '{model.source}' ({model.family}) is none that does: leave "
            f"it out by data.ignore=[{name}], or take another model"
        )
    if reads.least == 0:
        return
    if not reads.mask and "source" not in columns:
        raise UserError(
            f"model '{model.source}' reads {reads.words()} beside each prompt: put what each picture was made of into "
            "a column 'source' (a folder source/ with the same names), or take a model that reads words alone"
        )
    if model.WORDS_SEE and trains_text(model, run.train):
        raise UserError(
            f"the text encoder of '{model.source}' reads the pictures of its prompts, and runs that train it do not "
            "show it any: take text and trigger out of train.parts"
        )
    _draws_nothing(run, model, objective)


def check_sets(run: Run, objective: Objective) -> None:
    """Refuse sets that nothing reads, pictures that are in none, and a result that could not say how it is drawn.

    Raises:
        UserError: it names the option.
    """
    name, size = run.objective["name"], run.data.set_size
    if size > 1 and not objective.needs.sets:
        raise UserError(f"data.set_size: objective={name} learns each picture by itself: set it to 1, or take jedi")
    if not objective.needs.sets:
        return
    if size == 1:
        raise UserError(f"objective={name} learns pictures of sets, several at once: set data.set_size, 3 for instance")
    if run.train.batch_size % size:
        raise UserError(
            f"train.batch_size={run.train.batch_size} pictures are no whole number of sets of data.set_size={size}: "
            f"set it to {-(-run.train.batch_size // size) * size}"
        )
    if run.adapter is None and "coupled" in objective.facts():
        raise UserError(
            f"objective={name}: that pictures read one another is kept in the file of an adapter, and adapter=none "
            "writes none: choose one, dense for all weights"
        )


def _check_dropout(run: Run, model: Any, columns: Collection[str]) -> None:
    """Refuse to hide sources that are not there, or that the model cannot be without."""
    if not run.data.source_dropout:
        return
    if "source" not in columns:
        raise UserError("data.source_dropout hides a column 'source', which the data have not: set it to 0")
    if model.reads.least and not model.reads.channels:
        raise UserError(f"data.source_dropout: '{model.source}' cannot be without its pictures: set it to 0")


def _check_masks(run: Run, objective: Objective, columns: Collection[str]) -> None:
    """Refuse to make boxes of nothing, and to zoom where what is left empty would be learnt."""
    if run.data.box and "region" not in columns:
        raise UserError(
            "data.box makes a box of a column 'region' (a folder region/ of masks with the same names), which the data "
            "have not: leave it out"
        )
    if run.data.zoom and ("segments" in columns or "mask" not in {*objective.needs.columns, *objective.needs.optional}):
        raise UserError(
            "data.zoom leaves places of a picture empty, which this objective would count: set it to 0, or take "
            "denoising, dreambooth or dreamcom"
        )


def _draws_nothing(run: Run, model: Any, objective: Objective) -> None:
    """Refuse options for which such a model would be asked to draw."""
    alone = run.preview.prompts and not run.preview.pictures
    for asked, mend in (
        (alone, "preview.prompts=[] and preview.samples=4, which draws samples of the data, or name preview.pictures"),
        (objective.draws, "objective.prior=none"),
        (run.judge is not None, "judge=none"),
        (objective.needs.online, "an objective with data, such as denoising"),
    ):
        if asked:
            raise UserError(
                f"model '{model.source}' reads {model.reads.words()} beside each prompt, and draws nothing from words "
                f"alone: set {mend}"
            )


def _shows_nothing(run: Run, model: Any) -> None:
    """Refuse pictures beside prompts of previews that the model does not read."""
    given = {"pictures": run.preview.pictures, "samples": run.preview.samples}
    for name in (name for name, value in given.items() if value):
        raise UserError(f"preview.{name}: model '{model.source}' reads no pictures beside a prompt: leave it out")


def named(preview: PreviewConfig) -> list[Shown]:
    """The pictures and masks that previews name, of each prompt.

    Raises:
        UserError: a file is missing or no picture, or a mask does not suit its picture.
    """
    from visiontune.sampling.shown import NOTHING, read

    if not preview.pictures:
        return [NOTHING] * len(preview.prompts)
    masks = dict(enumerate(preview.masks))
    return [read([picture], masks.get(i)) for i, picture in enumerate(preview.pictures)]


def previews(
    preview: PreviewConfig, model: Any, samples: Sequence[Sample], given: Sequence[Shown], data: Config
) -> tuple[PreviewConfig, list[Shown]]:
    """The previews with the samples of the data that they draw among their prompts, and what stands beside each.

    Args:
        given: beside the prompts that are named, as of :func:`named`. data: what samples are made of.

    Raises:
        UserError: the data have no sources, or the model reads other pictures.
    """
    from visiontune.core import Request
    from visiontune.training.trouble import named

    found = _sampled(preview, model, samples, data)
    prompts, shown = [*preview.prompts, *(caption for caption, _ in found)], [*given, *(one for _, one in found)]
    if any(shown):
        with named("preview"):
            model.reads.check(model.source, [Request(prompt="", **one.options()) for one in shown if one])
    return replace(preview, prompts=prompts, pictures=[], masks=[]), shown


def _sampled(preview: PreviewConfig, model: Any, samples: Sequence[Sample], data: Config) -> list[tuple[str, Shown]]:
    """The captions of the first samples, and what each was made of, or where it is painted."""
    from visiontune.sampling.shown import Shown

    chosen = samples[: preview.samples]
    if preview.samples and not model.reads.mask and not any("source" in sample.sources for sample in chosen):
        raise UserError("preview.samples shows a column 'source', which the data have not: set it to 0")
    found = []
    for number, sample in enumerate(chosen):
        picture = sample.sources["image" if model.reads.mask else "source"].open()
        mask = _mask(sample, picture.size, number, data.box) if model.reads.mask else None
        found.append((sample.caption, Shown(pictures=(picture,), mask=mask, canvas=data.canvas)))
    return found


def _mask(sample: Sample, size: tuple[int, int], number: int, box: bool) -> Image.Image:
    """The region of a sample, or the box around it, or one of chance."""
    import torch
    from PIL import Image

    from visiontune.data.transforms import boxed, random_region, to_mask

    if "region" in sample.sources:
        given = sample.sources["region"].open()
        if not box:
            return given
        region = boxed(to_mask(given, size[::-1], 1).round())
    else:
        region = random_region(size[::-1], torch.Generator().manual_seed(number))
    return Image.fromarray((255 * region[0]).byte().numpy())
