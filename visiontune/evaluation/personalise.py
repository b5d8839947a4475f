"""How well a pocket model has learnt a subject, and what it has forgotten, on fixed prompts and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from visiontune.evaluation.metrics import (
    clip_image_similarity,
    ground_accuracy,
    memorisation,
    prompt_accuracy,
    subject_fidelity,
    subject_recognition,
)
from visiontune.models.clip import load_clip
from visiontune.pocket import oracle
from visiontune.pocket.scenes import article, stream
from visiontune.pocket.world import COLORS, RELATIONS, SHAPES, SUBJECTS, Subject
from visiontune.sampling.pipeline import images

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

_OPENINGS = ("a photo of a", "a picture of a", "a", "a large")
_SEEDS = (101, 102, 103, 104)


@dataclass(frozen=True, kw_only=True)
class Personalisation:
    """Scores in [0, 1] of a model and a subject; the pictures are ``uint8 [n, 64, 64, 3]``.

    Attributes:
        subject_oracle: mean likeness of the drawn subject to the real one, by the oracle.
        subject_known: share of pictures of it in which the oracle recognises the subject.
        subject_composed: share of pictures of it beside another object in which both are right, and where they stand.
        subject_clip: mean CLIP cosine between drawn and reference pictures.
        prompt_accuracy: share of ordinary held-out prompts that are drawn right, but for the ground.
        ground_accuracy: share of those which name a ground that stand on it.
        class_kept: share of plain "a red <class>" prompts that give the plain class, without a trace of the subject.
        memorised: share of pictures of the subject that repeat a training picture.
    """

    subject_oracle: float
    subject_known: float
    subject_composed: float
    subject_clip: float
    prompt_accuracy: float
    ground_accuracy: float
    class_kept: float
    memorised: float
    subject_pictures: np.ndarray
    ordinary_pictures: np.ndarray

    def scores(self) -> dict[str, float]:
        """The numbers alone, rounded for a report."""
        return {k: round(v, 4) for k, v in vars(self).items() if isinstance(v, float)}


def subject_prompts(subject: Subject, trigger: str) -> list[str]:
    """Four ways in which the subject is asked for."""
    return [f"{opening} {trigger} {subject.shape}" for opening in _OPENINGS]


def composed_prompts(subject: Subject, trigger: str) -> dict[str, tuple[str, oracle.Wanted]]:
    """Prompts for the subject beside another object, with the relation and that object.

    The other has another shape, and neither of the subject's colours.
    """
    shapes = [shape for shape in SHAPES if shape != subject.shape]
    colors = [color for color in COLORS if color not in (subject.color, subject.accent)]
    others = [oracle.Wanted(shape=s, color=c) for s, c in zip(shapes, colors, strict=False)]
    return {
        f"a {trigger} {subject.shape} {relation} {article(f'{other.color} {other.shape}')}": (relation, other)
        for relation, other in zip(RELATIONS, others, strict=False)
    }


def class_prompts(subject: Subject) -> list[str]:
    """Prompts for the plain class with a colour named, which must not give the subject."""
    return [f"{article(color)} {subject.shape}" for color in ("red", "blue", "green", "purple")]


def ordinary_prompts(n: int = 100) -> list[str]:
    """Held-out prompts, each once, by turns with one object and with two in a relation."""
    sources = itertools.cycle([stream(505, "one", holdout=True), stream(505, "two", holdout=True)])
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[next(text for _, text in next(sources) if text not in prompts)] = None
    return list(prompts)


def measure(
    model: PipelineModel,
    subject: str,
    trigger: str,
    references: np.ndarray,
    *,
    ordinary: int = 100,
    seeds: Sequence[int] = _SEEDS,
    steps: int = 25,
    cfg_scale: float = 4.0,
) -> Personalisation:
    """Sample and judge.

    Args:
        model: a pocket text-to-image model with its adapters attached.
        subject: name of the pocket-world subject it was trained on.
        trigger: the word that stands for it.
        references: the training pictures, ``uint8 [n, 64, 64, 3]``.
        ordinary: number of held-out prompts.
        seeds: seeds of each subject prompt and class prompt.
        steps: DDIM steps.
        cfg_scale: scale of classifier-free guidance.
    """
    individual = SUBJECTS[subject]

    def draw(prompts: Sequence[str], own_seeds: Sequence[int]) -> tuple[list[str], np.ndarray]:
        pairs = [(p, s) for p in prompts for s in own_seeds]
        every, every_seed = [p for p, _ in pairs], [s for _, s in pairs]
        return every, images(model, every, every_seed, steps=steps, cfg_scale=cfg_scale, batch_size=50)

    _, subject_pictures = draw(subject_prompts(individual, trigger), seeds)
    composed = composed_prompts(individual, trigger)
    together, composed_pictures = draw(list(composed), seeds)
    classes, class_pictures = draw(class_prompts(individual), seeds)
    ordinary_texts, ordinary_pictures = draw(ordinary_prompts(ordinary), seeds[:1])
    return Personalisation(
        subject_oracle=subject_fidelity(subject_pictures, subject),
        subject_known=subject_recognition(subject_pictures, subject),
        subject_composed=float(
            np.mean(
                [
                    oracle.composed(image, subject, *composed[prompt])
                    for image, prompt in zip(composed_pictures, together, strict=True)
                ]
            )
        ),
        subject_clip=clip_image_similarity(subject_pictures, references, load_clip("pocket/clip")),
        prompt_accuracy=prompt_accuracy(ordinary_pictures, ordinary_texts),
        ground_accuracy=ground_accuracy(ordinary_pictures, ordinary_texts),
        class_kept=prompt_accuracy(class_pictures, classes),
        memorised=memorisation(subject_pictures, references),
        subject_pictures=subject_pictures,
        ordinary_pictures=ordinary_pictures,
    )
