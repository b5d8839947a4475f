"""Composition of pictures without training: an object placed, blended and coloured to belong where it is put.

Pictures are float arrays [h, w, 3] in [0, 1], masks [h, w] in [0, 1], and boxes (left, top, right, bottom) in pixels.
"""

from visiontune.composition.blending import blend, gaussian, paste, poisson
from visiontune.composition.colour import harmonise
from visiontune.composition.layer import Layer, as_mask, as_picture, as_pillow
from visiontune.composition.placement import Place, places, suppress

__all__ = [
    "Layer",
    "Place",
    "as_mask",
    "as_picture",
    "as_pillow",
    "blend",
    "gaussian",
    "harmonise",
    "paste",
    "places",
    "poisson",
    "suppress",
]
