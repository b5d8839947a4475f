"""A set of pictures for a model that paints: one is painted whole, and of the others, its references, nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

from PIL import Image

from visiontune.core import Request
from visiontune.models._reading import Reads

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

# What a model that draws sets reads beside each prompt; channels, since references have the size of what is drawn.
READS = Reads(least=0, most=None, channels=True)
_GREY, _WHITE, _BLACK = (128, 128, 128), 255, 0


def not_painting(model: DiffusionModel) -> str:
    """The line that refuses a model that does not paint into pictures."""
    able = hasattr(model, "PAINTING") and not model.reads.pictures
    mend = f"make one of it, `visiontune expand {model.source} FOLDER`, or take" if able else "take"
    return (
        f"sets of pictures are for models that paint into pictures, and '{model.source}' ({model.family}) is none: "
        f"{mend} an inpainting model of Stable Diffusion or SDXL, such as pocket/inpaint"
    )


def members(requests: Sequence[Request], size: tuple[int, int]) -> tuple[list[Request], list[int]]:
    """Requests to paint, those of a set behind one another, its new picture first, and how many each set has.

    References have no words, as in training, and noise of their own.

    Args:
        requests: with their references as pictures. size: height and width in pixels of what is drawn.
    """
    sets = [_members(request, size) for request in requests]
    return [*chain.from_iterable(sets)], [len(one) for one in sets]


def _members(request: Request, size: tuple[int, int]) -> list[Request]:
    whole: dict[str, Any] = {"pictures": (Image.new("RGB", size[::-1], _GREY),), "mask": _mask(size, _WHITE)}
    new = Request(prompt=request.prompt, seed=request.seed, negative=request.negative, noise=request.noise, **whole)
    references = [
        Request(prompt="", seed=request.seed + i, pictures=(picture,), mask=_mask(size, _BLACK))
        for i, picture in enumerate(request.pictures, 1)
    ]
    return [new, *references]


def _mask(size: tuple[int, int], level: int) -> Image.Image:
    return Image.new("L", size[::-1], level)


def firsts(sizes: Sequence[int]) -> list[int]:
    """The place of each set's first row."""
    return [0, *accumulate(sizes)][:-1]
