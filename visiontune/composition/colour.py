"""An object's colours brought to those of the scene.

Reinhard et al., 2001: in a space of lightness and two colours, mean and deviation of the object become those of the
scene around it, x' = (x - mean_o) std_s / std_o + mean_s. Here in CIELAB of linear light under D65, in float64.
"""

from __future__ import annotations

import numpy as np

from visiontune.composition.layer import Layer

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(1)
_KNEE = 6 / 29
_LEAST = 1e-6  # deviation under which a colour is constant


def harmonise(layer: Layer, canvas: np.ndarray, strength: float = 1.0) -> Layer:
    """The layer with its object's colours moved towards those of the canvas around it.

    Args:
        strength: 0 leaves the object, 1 gives it the scene's mean and deviation. A colour that is constant in the
            object keeps no deviation and gets the mean.
    """
    inside = layer.mask > 0.5
    if strength == 0 or not inside.any() or inside.all():
        return layer
    own, scene = to_lab(layer.picture), to_lab(canvas)[~inside]
    mean, spread = own[inside].mean(0), own[inside].std(0)
    factor = np.where(spread > _LEAST, scene.std(0) / np.maximum(spread, _LEAST), 0.0)
    moved = from_lab((own - mean) * factor + scene.mean(0)).clip(0, 1)
    shown = np.where(layer.mask[..., None] > 0, (1 - strength) * layer.picture + strength * moved, layer.picture)
    return Layer(picture=shown, mask=layer.mask, box=layer.box)


def to_lab(picture: np.ndarray) -> np.ndarray:
    """CIELAB [..., 3] of sRGB [..., 3] in [0, 1]: lightness in [0, 100] and two colours."""
    linear = np.where(picture <= 0.04045, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > _KNEE**3, np.cbrt(ratio), ratio / (3 * _KNEE**2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """sRGB of CIELAB, outside of [0, 1] where a screen cannot show it."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    ratio = np.where(f > _KNEE, f**3, 3 * _KNEE**2 * (f - 4 / 29))
    linear = (ratio * _WHITE) @ np.linalg.inv(_TO_XYZ).T
    shown = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, shown)
