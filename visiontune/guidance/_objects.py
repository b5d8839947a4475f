"""Where an object is, by how much its words are attended to."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor


def drawn(attention: Tensor, box: Tensor, *, threshold: float, dilation: int, tight: bool) -> Tensor:
    """Masks [b, 1, h, w] of what is drawn, 1 inside, on the grid of a box.

    Where no object is found (a map that is the same everywhere, or one whose object does not touch the box) it is the
    box.

    Args:
        attention: [b, gh, gw] how much the words of the object are attended to.
        box: [1, 1, h, w], 1 where the object shall be.
        threshold, dilation: of `component`.
        tight: the object's outline alone, and else the box and the object's bounding box.
    """
    found = []
    for values in attention.float().cpu().numpy():
        inside = component(values, threshold, dilation)
        shown = torch.from_numpy(inside if tight else bounded(inside))[None, None].to(box)
        mask = F.interpolate(shown, size=box.shape[-2:], mode="nearest-exact")
        meets = bool((mask * box).any())
        found.append((mask if tight else mask.maximum(box)) if meets else box)
    return torch.cat(found)


def component(values: np.ndarray, threshold: float, dilation: int) -> np.ndarray:
    """The largest connected part, bool [h, w], of where values [h, w] are above a share of their range.

    Args:
        threshold: the share. dilation: side of the square by which what is above it is dilated before.
    """
    low, high = float(values.min()), float(values.max())
    above = values > low + threshold * (high - low)
    above = ndimage.binary_dilation(above, np.ones((dilation, dilation), bool))
    parts, count = ndimage.label(above)
    largest: np.ndarray = (
        parts == 1 + np.argmax(ndimage.sum_labels(above, parts, range(1, count + 1))) if count else above
    )
    return largest


def bounded(mask: np.ndarray) -> np.ndarray:
    """The bounding box of a mask [h, w], as a mask; empty where that is."""
    found = np.zeros_like(mask)
    for part in ndimage.find_objects(mask.astype(int)):
        found[part] = True
    return found
