"""What a ruined model shows before anyone looks: numbers of pictures and of weights.

Pictures are ``uint8 [prompts, seeds, (f), h, w, 3]``; distances count [0, 255] as 1. Of clips every frame is a picture,
but for diversity, which compares whole clips.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch

from visiontune.adapters._quantised import weight_of
from visiontune.ops.shards import whole


def diversity(images: np.ndarray) -> float:
    """Mean distance (root mean square over pixels, in [0, 1]) between two seeds of one prompt; 0 with one seed."""
    pairs = list(combinations(range(images.shape[1]), 2))
    return float(np.mean([rms(seeds[i], seeds[j]) for seeds in images for i, j in pairs])) if pairs else 0.0


def distance(images: np.ndarray, start: np.ndarray) -> float:
    """Root mean square over all pixels of all pictures, in [0, 1]."""
    squares = [rms(one, other) ** 2 for one, other in zip(_flat(images), _flat(start), strict=True)]
    return float(np.sqrt(np.mean(squares)))


def high_frequency(images: np.ndarray, cutoff: float) -> float:
    """Share of the spectral energy at more than ``cutoff`` cycles a pixel, mean over the pictures.

    The mean colour does not count as energy; a picture of one colour has none, and its share is 0. White noise has
    ``1 - pi cutoff^2``.
    """
    height, width = images.shape[-3:-1]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    return float(np.mean([_share(image, frequency > cutoff) for image in _flat(images)]))


def blank(images: np.ndarray, std: float) -> float:
    """Share of pictures in which no colour channel has a standard deviation of ``std`` or more."""
    return float(np.mean([(image.std((0, 1), dtype=np.float64) / 255).max() < std for image in _flat(images)]))


@torch.no_grad()
def change(adapters: Any) -> float:
    """Frobenius norm of what an ``AdapterSet`` adds to weights and biases, relative to theirs; one layer at a time."""
    moved, whole = 0.0, 0.0
    for name, layer in adapters.base_layers().items():
        moved += sum(_squares(part) for part in adapters.change(name))
        whole += sum(_squares(part) for part in (weight_of(layer), getattr(layer, "bias", None)))
    return (moved / whole) ** 0.5 if whole else 0.0


def rms(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference of two pictures, in [0, 1]."""
    return float(np.sqrt(np.mean((one.astype(np.float64) - other) ** 2)) / 255)


def _share(image: np.ndarray, high: np.ndarray) -> float:
    centred = image - image.mean((0, 1), dtype=np.float64)
    energy = (np.abs(np.fft.fft2(centred, axes=(0, 1))) ** 2).sum(2)
    total = energy.sum()
    # Rounding of the mean leaves some energy in a picture of one colour.
    return float(energy[high].sum() / total) if total > 1e-9 * image.size else 0.0


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, *images.shape[-3:])


def _squares(values: Any) -> float:
    return 0.0 if values is None else float(whole(values.detach()).double().square().sum())
