"""Several subjects of the pocket world in one model: is each known, alone and beside another, and do their looks mix?

Of every object the oracle asks what it is most like: one of the subjects, a subject's shape in a plain colour, or a
mixture, a subject's shape in another's two colours, with its own pattern or the other's. An object that is most like
another subject than the one that was asked for, or like a mixture, has *bled*.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.evaluation.personalise import class_prompts, ordinary_prompts, subject_prompts
from visiontune.pocket import oracle
from visiontune.pocket.world import COLORS, RELATIONS, SUBJECTS, Subject
from visiontune.sampling.pipeline import images

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

_SEEDS = (101, 102, 103, 104)
PLAIN, MIXED = "plain", "mixed"


@dataclass(frozen=True, kw_only=True)
class Together:
    """Shares in [0, 1] of a model that learnt several subjects.

    Attributes:
        known: pictures of one subject alone in which the oracle recognises it, the mean over subjects; each: of each.
        bleed_alone: pictures of one subject alone with an object that has bled.
        both: pictures of two subjects with these two and nothing else. placed: in which they also stand as asked.
        bleed: pictures of two subjects with an object that has bled, or one of them twice.
        prompt_accuracy, class_kept: ordinary prompts, and those for plain classes, that are drawn right.
        pictures: of two subjects, ``uint8 [n, 64, 64, 3]``.
    """

    known: float
    each: Mapping[str, float]
    bleed_alone: float
    both: float
    placed: float
    bleed: float
    prompt_accuracy: float
    class_kept: float
    pictures: np.ndarray

    def scores(self) -> dict[str, float]:
        """The numbers alone, rounded for a report."""
        found = {k: round(v, 4) for k, v in vars(self).items() if isinstance(v, float)}
        return {**found, **{f"known_{name}": round(value, 4) for name, value in self.each.items()}}


def mixtures(subjects: Sequence[str]) -> list[Subject]:
    """Each subject's shape in another's colours, in either pattern; none of them is a subject."""
    found = []
    for one, other in itertools.permutations([SUBJECTS[name] for name in subjects], 2):
        painted = replace(one, color=other.color, accent=other.accent)
        found += [painted, replace(painted, pattern=other.pattern)]
    return found


def most_like(image: np.ndarray, found: oracle.Found, subjects: Sequence[str]) -> str:
    """What an object of a picture ``uint8 [64, 64, 3]`` is most like: a subject's name, ``plain`` or ``mixed``."""
    own = [SUBJECTS[name] for name in subjects]
    plain = [replace(one, pattern="solid", color=color) for one in own for color in COLORS]
    kinds = [*((one.name, one) for one in own), *((PLAIN, one) for one in plain)]
    kinds += [(MIXED, one) for one in mixtures(subjects)]
    return max(kinds, key=lambda kind: oracle.likeness(image, found, kind[1]))[0]


def seen(image: np.ndarray, subjects: Sequence[str]) -> list[str]:
    """What each object of a picture is most like, the largest first."""
    return [most_like(image, found, subjects) for found in oracle.read(image)]


def has_bled(likes: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether a picture of ``asked`` subjects has a mixture, another subject, or one twice.

    Args:
        likes: as :func:`seen` gives them.
    """
    named = [like for like in likes if like != PLAIN]
    return any(like not in asked for like in named) or len(set(named)) < len(named)


def pair_prompts(triggers: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
    """Prompts for two subjects in each relation, with their names and the relation.

    Args:
        triggers: of each subject, by its name.
    """
    found = {}
    for (one, other), relation in itertools.product(itertools.permutations(triggers, 2), RELATIONS[::2]):
        words = (f"a {triggers[name]} {SUBJECTS[name].shape}" for name in (one, other))
        found[f" {relation} ".join(words)] = (one, other, relation)
    return found


def both_there(image: np.ndarray, one: str, other: str, relation: str) -> tuple[bool, bool]:
    """Whether a picture shows two subjects and nothing else, and whether they also stand so."""
    objects = oracle.read(image)
    names = {oracle.recognise_object(image, found): found.thing for found in objects}
    if len(objects) != 2 or names.keys() != {one, other}:
        return False, False
    return True, oracle.holds(relation, names[one], names[other])


def measure(
    model: PipelineModel,
    triggers: Mapping[str, str],
    *,
    ordinary: int = 60,
    seeds: Sequence[int] = _SEEDS,
    steps: int = 25,
    cfg_scale: float = 4.0,
) -> Together:
    """Sample and judge.

    Args:
        model: a pocket text-to-image model with its adapters attached.
        triggers: of each subject's name the word that stands for it.
        ordinary: number of held-out prompts. seeds: of every other prompt.
        steps, cfg_scale: of DDIM.
    """

    def draw(prompts: Sequence[str], own: Sequence[int]) -> np.ndarray:
        pairs = [(prompt, seed) for prompt in prompts for seed in own]
        every, every_seed = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
        return images(model, every, every_seed, steps=steps, cfg_scale=cfg_scale, batch_size=50)

    names, each, bled = list(triggers), {}, list[bool]()
    for name, trigger in triggers.items():
        alone = draw(subject_prompts(SUBJECTS[name], trigger), seeds)
        each[name] = float(np.mean([oracle.recognise(image) == name for image in alone]))
        bled += [has_bled(seen(image, names), [name]) for image in alone]
    asked = pair_prompts(triggers)
    pictures = draw(list(asked), seeds)
    wanted = [pair for pair in asked.values() for _ in seeds]
    there = [both_there(image, *pair) for image, pair in zip(pictures, wanted, strict=True)]
    mixed = [has_bled(seen(image, names), pair[:2]) for image, pair in zip(pictures, wanted, strict=True)]
    everyday = ordinary_prompts(ordinary)
    classes = [prompt for name in names for prompt in class_prompts(SUBJECTS[name])]
    return Together(
        known=float(np.mean(list(each.values()))),
        each=each,
        bleed_alone=float(np.mean(bled)),
        both=float(np.mean([one for one, _ in there])),
        placed=float(np.mean([also for _, also in there])),
        bleed=float(np.mean(mixed)),
        prompt_accuracy=prompt_accuracy(draw(everyday, seeds[:1]), everyday),
        class_kept=prompt_accuracy(draw(classes, seeds[:1]), classes),
        pictures=pictures,
    )
