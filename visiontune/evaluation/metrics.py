"""Metrics of image sets. Images are ``uint8 [n, h, w, 3]`` arrays; results are Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.clip import ClipEncoder
from visiontune.ops.pixels import to_tensor
from visiontune.pocket import oracle
from visiontune.pocket.world import SUBJECTS
from visiontune.schema import nearest


def prompt_accuracy(images: np.ndarray, prompts: Sequence[str]) -> float:
    """Share of 64x64 images in which the oracle finds just what the prompt asks, in [0, 1]."""
    _same_number(images, prompts)
    return float(np.mean([oracle.matches(image, prompt) for image, prompt in zip(images, prompts, strict=True)]))


def ground_accuracy(images: np.ndarray, prompts: Sequence[str]) -> float:
    """Share of 64x64 images that show the ground that their prompt names, in [0, 1]; chance is 1/8.

    Images whose prompt names none are left out.
    """
    _same_number(images, prompts)
    asked = [(image, oracle.read_caption(prompt).ground) for image, prompt in zip(images, prompts, strict=True)]
    right = [oracle.ground_of(image) == ground for image, ground in asked if ground is not None]
    if not right:
        raise UserError("no prompt names a ground: 'a red star on a dark dotted background'")
    return float(np.mean(right))


def subject_fidelity(images: np.ndarray, subject: str) -> float:
    """Mean likeness to a pocket subject of the best object of each 64x64 image, in [0, 1] (see the oracle)."""
    _same_number(images, images)
    return float(np.mean([oracle.subject_fidelity(image, SUBJECTS[_subject(subject)]) for image in images]))


def subject_recognition(images: np.ndarray, subject: str) -> float:
    """Share of 64x64 images in which the oracle recognises a pocket subject, rather than another one or none."""
    _same_number(images, images)
    return float(np.mean([oracle.recognise(image) == _subject(subject) for image in images]))


def clip_image_similarity(images: np.ndarray, references: np.ndarray, encoder: ClipEncoder) -> float:
    """Mean cosine of CLIP image features over all pairs (image, reference), in [-1, 1].

    CLIP-I of Ruiz et al., "DreamBooth", CVPR 2023.
    """
    _same_number(images, images)
    _same_number(references, references)
    return float((image_features(images, encoder) @ image_features(references, encoder).T).mean())


def memorisation(images: np.ndarray, references: np.ndarray, ratio: float = 0.5) -> float:
    """Share of images that repeat one training picture, in [0, 1].

    Those whose root-mean-square distance to the nearest reference is below ``ratio`` times that to the second nearest:
    a picture of its own is about as far from one reference as from another.
    """
    if len(references) < 2 or images.shape[1:] != references.shape[1:] or not len(images):
        raise UserError("memorisation compares images with at least two references of their size")
    one, other = (a.astype(np.float64).reshape(len(a), -1) for a in (images, references))
    distances = np.sqrt(((one[:, None] - other[None]) ** 2).mean(2))
    distances.sort(axis=1)
    return float(np.mean(distances[:, 0] < ratio * distances[:, 1]))


def hyperspherical_energy(weight: Tensor) -> float:
    """Mean of ``1 / |w_i - w_j|`` over pairs of a weight's rows, each flattened and of unit length.

    The sum is the energy of Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, section
    3; rotations of the inputs leave it as it is. Rows of zeros are left out.
    """
    rows = weight.detach().flatten(1).double()
    rows = rows[rows.norm(dim=1) > 0]
    distances = torch.pdist(rows / rows.norm(dim=1, keepdim=True))
    if not len(distances):
        raise UserError("the energy needs at least two rows that are not zero")
    return float(distances.clamp_min(1e-12).reciprocal().mean())


def psnr(images: np.ndarray, references: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 255, over all pixels of all images; inf when equal."""
    if images.shape != references.shape:
        raise UserError(f"psnr compares equal shapes, not {images.shape} with {references.shape}")
    error = float(np.mean((images.astype(np.float64) - references.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def retrieval_top1(images: np.ndarray, prompts: Sequence[str], encoder: ClipEncoder, pool: int = 100) -> float:
    """Share of images whose own prompt is the nearest of ``pool`` prompts in CLIP space; chance is ``1 / pool``.

    The prompts of a pool are those of consecutive images; a last, smaller pool is left out (unless it is the only
    one), since it would be easier. A prompt that occurs twice in a pool counts as found under either copy.
    """
    _same_number(images, prompts)
    image, text = image_features(images, encoder), encoder.text_features(prompts)
    whole = len(prompts) // pool * pool or len(prompts)
    hits = []
    for start in range(0, whole, pool):
        chunk = slice(start, min(start + pool, whole))
        best = (image[chunk] @ text[chunk].T).argmax(-1).tolist()
        own = list(prompts[chunk])
        hits += [own[b] == prompt for b, prompt in zip(best, own, strict=True)]
    return float(np.mean(hits))


@torch.no_grad()
def image_features(images: np.ndarray, encoder: ClipEncoder, batch_size: int = 64) -> Tensor:
    """Unit CLIP features ``[n, d]`` of images, on the encoder's device."""
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat([encoder.image_features(to_tensor(part, encoder.mean.device)) for part in parts])


def _same_number(images: np.ndarray, others: Sequence | np.ndarray) -> None:
    if not len(images) or len(images) != len(others):
        raise UserError(f"a metric needs images and as many prompts, not {len(images)} and {len(others)}")


def _subject(name: str) -> str:
    if name not in SUBJECTS:
        raise UserError(f"subject '{name}' is not in the pocket world{nearest(name, SUBJECTS)}")
    return name
