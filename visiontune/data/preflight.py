"""Refuse bad data before any training: a wrong caption or a broken file costs a run, finding it costs seconds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from visiontune.data.base import Sample, listed
from visiontune.errors import UserError

_EMPTY = "empty or missing captions (write them, or set data.prompt where there is no caption file)"
_BROKEN = "unreadable images (replace or remove them)"
_ALONE = "captions without an image (add the image or remove the caption)"
_HALF = "samples that lack a column (add the file of the same name, or remove the sample's others)"
_SHAPE = "masks or sources of another shape than their image (crop or scale them as it is)"
_NOWHERE = "masks of nouns without a white pixel (draw where they are, or write null for the file)"
_BLANK = "regions without a white pixel (draw where the image is painted, or remove the sample)"


def preflight(samples: Sequence[Sample]) -> None:
    """Decode every picture and look at every caption.

    Raises:
        UserError: one line that lists empty captions, unreadable pictures, captions without one, samples that lack a
            column, masks and sources that do not lie on their picture, and regions and nouns with nothing in them (the
            first ten names of each, and how many more), or says that there are no samples.
    """
    if not samples:
        raise UserError("the dataset has no samples: put images with captions into data.root")
    found: dict[str, list[str]] = {words: [] for words in (_EMPTY, _BROKEN, _ALONE, _HALF, _SHAPE, _BLANK, _NOWHERE)}
    with ThreadPoolExecutor() as pool:
        faults = tqdm(pool.map(_faults, samples), "checking images", len(samples), delay=1, leave=False)
        for words, name in (fault for some in faults for fault in some):
            found[words].append(name)
    problems = [f"{len(names)} {words}: {listed(names)}" for words, names in found.items() if names]
    if problems:
        raise UserError("; ".join(problems))


def _faults(sample: Sample) -> list[tuple[str, str]]:
    """What is wrong with a sample, and what to call it."""
    names = list(sample.sources)
    files = {name: source.file for name, source in sample.sources.items()}
    absent = [name for name, file in files.items() if file is not None and not file.is_file()]
    if absent:
        alone = len(absent) == len(names)
        return [(_ALONE, sample.id) if alone else (_HALF, f"{sample.id} ({', '.join(absent)})")]
    faults = [] if sample.caption.strip() else [(_EMPTY, sample.id)]
    shapes: dict[str, tuple[int, int]] = {}
    for name, source in sample.sources.items():
        try:
            picture = source.open()
            shapes[name] = picture.size
            if name == "region" and picture.getbbox() is None:
                faults.append((_BLANK, sample.id))
            if source.kind == "segments":
                from visiontune.data import segments

                faults += [(_NOWHERE, f"{sample.id} ({noun})") for noun in segments.empty(picture, sample.nouns)]
        except Exception:  # a damaged file can raise nearly anything from inside a decoder
            faults.append((_BROKEN, sample.id if name == names[0] else f"{sample.id} ({name})"))
    for name, source in sample.sources.items():
        laid = source.kind != "picture" or name == "source"
        if laid and {name, names[0]} <= shapes.keys() and not _alike(shapes[name], shapes[names[0]]):
            faults.append((_SHAPE, sample.id))
    return faults


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes differ by a scale alone, but for the rounding of the smaller one's sides."""
    small, large = sorted((one, other))
    off = abs(small[0] * large[1] - small[1] * large[0])
    return off <= max(large)
