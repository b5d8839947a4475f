"""How an object meets the canvas: as it is, with a feathered edge, or with its gradients alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from visiontune.composition.layer import Layer
from visiontune.errors import UserError

Blending = Literal["paste", "gaussian", "poisson"]


def blend(layer: Layer, canvas: np.ndarray, how: Blending = "paste") -> np.ndarray:
    """The canvas [h, w, 3] with the object, blended as named."""
    return {"paste": paste, "gaussian": gaussian, "poisson": poisson}[how](layer, canvas)


def paste(layer: Layer, canvas: np.ndarray) -> np.ndarray:
    """m F + (1 - m) B; the canvas to the bit where the mask is 0."""
    m = layer.mask[..., None]
    return np.where(m == 0, canvas, m * layer.picture + (1 - m) * canvas)


def gaussian(layer: Layer, canvas: np.ndarray, sigma: float | None = None) -> np.ndarray:
    """`paste` with the mask's edge drawn inwards over about two `sigma` pixels.

    A blurred mask alone would show, around the object, pixels of its picture that are not of it.

    Args:
        sigma: None for a fiftieth of the box's shorter side, 5 pixels of an object of 250.
    """
    if sigma is None:
        left, top, right, bottom = layer.box
        sigma = min(right - left, bottom - top) / 50
    if sigma <= 0:
        return paste(layer, canvas)
    soft = (2 * ndimage.gaussian_filter(layer.mask, sigma) - 1).clip(0, 1)
    return paste(Layer(picture=layer.picture, mask=np.minimum(soft, layer.mask), box=layer.box), canvas)


def poisson(layer: Layer, canvas: np.ndarray, mixed: bool = False) -> np.ndarray:
    """The object's gradients, on the canvas' colours at its border (Perez et al., 2003, equations 10 and 12).

    Inside of the mask, binarised at one half, the result has the Laplacian of the object; around it the canvas is
    unchanged. The object may touch the edge of the canvas, where nothing is asked of the result.

    Args:
        mixed: take the canvas' gradient wherever it is the stronger one, so that its texture shows through.

    Raises:
        UserError: the mask covers the whole canvas, so that there are no colours to start from.
    """
    inside = layer.mask > 0.5
    if inside.all():
        raise UserError("poisson needs some of the canvas around the object: take a smaller box or mask")
    if not inside.any():
        return canvas.copy()
    system, border, (first, second, row) = _laplacian(inside)
    left, top, right, bottom = layer.box
    boxed = np.zeros_like(inside)
    boxed[top:bottom, left:right] = True
    result, values = canvas.copy(), []
    for channel in range(3):
        own, under = layer.picture[..., channel].ravel(), canvas[..., channel].ravel()
        beneath = under[first] - under[second]
        # Beyond its box nothing is known of the object's picture.
        gradient = np.where(boxed.ravel()[second], own[first] - own[second], beneath)
        if mixed:
            gradient = np.where(abs(beneath) > abs(gradient), beneath, gradient)
        asked = np.bincount(row, gradient, minlength=system.shape[0])
        values.append(spsolve(system, asked + border @ under))
    result[inside] = np.stack(values, -1)
    return result


def _laplacian(inside: np.ndarray) -> tuple[Any, Any, tuple[np.ndarray, ...]]:
    """The equations of the pixels inside.

    Returns:
        The matrix [n, n] of the unknown pixels, that [n, h w] of what the known ones around give, and of every pair
        of neighbours of which the first is unknown: both pixels and the number of the unknown, [pairs] each.
    """
    height, width = inside.shape
    numbers = np.full(inside.size, -1)
    numbers[inside.ravel()] = np.arange(inside.sum())
    places = np.arange(inside.size).reshape(height, width)
    pairs = []
    for one, other in ((places[:, :-1], places[:, 1:]), (places[:-1], places[1:])):
        pairs += [(one.ravel(), other.ravel()), (other.ravel(), one.ravel())]
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    mine = numbers[first] >= 0
    first, second = first[mine], second[mine]
    row, count = numbers[first], int(inside.sum())
    unknown = numbers[second] >= 0
    degree = sparse.diags(np.bincount(row, minlength=count).astype(float))
    ones = np.ones(len(row))
    between = sparse.csr_matrix((ones[unknown], (row[unknown], numbers[second[unknown]])), (count, count))
    border = sparse.csr_matrix((ones[~unknown], (row[~unknown], second[~unknown])), (count, inside.size))
    return (degree - between).tocsc(), border, (first, second, row)
