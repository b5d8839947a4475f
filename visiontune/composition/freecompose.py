"""FreeCompose: a composite whose latents are optimised until a frozen model has nothing to correct in them.

Chen et al., 2024, arXiv 2407.04947. The gradient is a difference of two predictions of one and the same noise, without
a way back through the network (delta denoising, Hertz et al., 2023, arXiv 2304.07090):

    g = eps_w(alpha z + sigma n; target) - eps_w(alpha z_0 + sigma n; origin),

of the latents z and of those that they start from; Adam follows it, and a loss on what the VAE decodes holds the rest.
What the target's side attends to is changed: keys inside of the mask are left out, or are those of the origin's side.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from visiontune.composition._delta import Composed, Optimisation, appearance, difference, optimised
from visiontune.composition._keys import dropping, sharing
from visiontune.errors import UserError
from visiontune.guidance._network import Network

__all__ = ["Composed", "Optimisation", "appearance", "difference", "harmonise", "redraw", "remove"]


def remove(
    model: Any,
    picture: np.ndarray,
    mask: np.ndarray,
    *,
    origin: str = "something in some place",
    target: str = "some place",
    outside: float = 0.2,
    background: float = 0.3,
    threshold: float = 0.1,
    how: Optimisation | None = None,
) -> Composed:
    """A picture without what is in the mask.

    Args:
        model: a DiffusionModel of pictures, of a family whose attention is known (docs/guidance/README.md).
        picture: [h, w, 3] in [0, 1]. mask: [h, w] in [0, 1], what goes; its shadow, too.
        origin, target: what is in the picture, and what shall be.
        outside: share of the gradient outside of the mask. background: weight of the loss on pixels there.
        threshold: share of a token that the mask covers from which its keys are left out.
        how: 150 iterations unless given.

    Raises:
        UserError: sizes that do not go together, an empty mask, or one that leaves a layer nothing to attend to.
    """
    inside = _inside(picture, mask)
    weights = outside + (1 - outside) * inside
    network, how = Network.of_model(model), how or Optimisation(iterations=150)

    def edit(level: float) -> AbstractContextManager[Any]:
        return dropping(network, inside, threshold)

    return optimised(model, picture, (target, origin), how, edit, weights, [(background, 1 - inside)])


def harmonise(
    model: Any,
    picture: np.ndarray,
    mask: np.ndarray,
    *,
    origin: str = "",
    target: str = "A harmonious scene.",
    background: float = 0.3,
    foreground: float = 0.1,
    how: Optimisation | None = None,
) -> Composed:
    """A pasted object that belongs where it is.

    Args:
        picture: [h, w, 3] in [0, 1], the object pasted. mask: [h, w] in [0, 1], the object.
        origin, target: as of `remove`. background, foreground: weights of the losses on pixels.

    Raises:
        UserError: as of `remove`.
    """
    inside = _inside(picture, mask)
    kept = [(background, 1 - inside), (foreground, inside)]
    return optimised(model, picture, (target, origin), how or Optimisation(), _as_it_is, np.ones(mask.shape), kept)


def redraw(
    model: Any,
    picture: np.ndarray,
    *,
    target: str,
    origin: str,
    above: float = 0.4,
    share: float = 11 / 16,
    how: Optimisation | None = None,
) -> Composed:
    """A picture of something else in the same layout: the target's side attends to the origin's keys and values.

    Args:
        above: level of noise above which it does. share: of the layers, in order, from which on it does.
        how: 500 iterations unless given.

    Raises:
        UserError: the picture is none, or of a size that the model does not draw.
    """
    network = Network.of_model(model)

    def edit(level: float) -> AbstractContextManager[Any]:
        return sharing(network, share) if level > above else nullcontext()

    return optimised(
        model, picture, (target, origin), how or Optimisation(iterations=500), edit, np.ones(picture.shape[:2]), []
    )


def _inside(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if mask.shape != picture.shape[:2]:
        raise UserError(
            f"freecompose: the mask has {mask.shape[::-1]} pixels and the picture {picture.shape[1::-1]} (width, "
            "height): take a mask of the picture's size"
        )
    if not mask.any() or mask.all():
        raise UserError("freecompose: the mask must be white somewhere and black somewhere: paint the object white")
    return mask


def _as_it_is(level: float) -> AbstractContextManager[Any]:
    return nullcontext()
