"""Two panels in one picture: on the left what a model is shown, on the right what it paints.

Mao et al., "ACE++: Instruction-Based Image Creation and Editing via Context-Aware Content Filling", 2025,
arXiv 2501.02487: a model that fills holes reads another picture by having it on its canvas, so it needs no inputs of
its own for that. The hole is the right panel. Both panels are of one size, and what is shown keeps its shape.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from PIL import Image, ImageOps

from visiontune.data.base import Sample, Source, source

_GREY = (128, 128, 128)  # near 0 in [-1, 1], as hidden places are


def panels(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both beside each other, the left one scaled into the size of the right one, grey where it has another shape."""
    fitting = left if left.size == right.size else ImageOps.pad(left, right.size, color=_GREY)
    return _joined(fitting, right, "RGB")


def hole(size: tuple[int, int]) -> Image.Image:
    """The mask of a canvas with panels of a width and a height: white on the right."""
    return _joined(Image.new("L", size), Image.new("L", size, 255), "L")


def blank(left: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A canvas on which nothing is painted yet, with panels of a width and a height."""
    return panels(left, Image.new("RGB", size, _GREY))


def on_canvas(sample: Sample) -> Sample:
    """A sample whose ``source`` and ``image`` are the panels of its image, the right one being its region."""
    pair = sample.sources["source"], sample.sources["image"]
    rest = {name: one for name, one in sample.sources.items() if name not in ("source", "image")}
    made = {"image": Source(partial(_opened, *pair)), "region": source("region", partial(_hole_of, pair[1]))}
    return replace(sample, sources={**made, **rest})


def _opened(left: Source, right: Source) -> Image.Image:
    return panels(left.open(), right.open())


def _hole_of(right: Source) -> Image.Image:
    height, width = right.size()
    return hole((width, height))


def _joined(left: Image.Image, right: Image.Image, mode: str) -> Image.Image:
    made = Image.new(mode, (2 * right.width, right.height))
    made.paste(left, (0, 0))
    made.paste(right, (right.width, 0))
    return made
