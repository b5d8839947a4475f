"""Prompts for models of everyday pictures by what they ask to be put together, and rewards as their judges.

Prompts are made of short lists of words, so that what each asks for is known and no tagger has to find it. A reward in
[0, 1], such as the yes of a vision-language model (`vqa_score`), is asked for each phrase by itself, and the prompt is
right as often as all are: the product, as the paper takes of its questions. Any other, such as the cosine of a CLIP,
is asked for the whole prompt.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visiontune.data.captions import read_text
from visiontune.errors import UserError
from visiontune.evaluation.compose import CATEGORIES, Task, Verdict
from visiontune.ops.pixels import to_tensor
from visiontune.outside import parse_json, shown
from visiontune.rewards.base import Reward

_THINGS = ("car", "bench", "cup", "chair", "bird", "cat", "dog", "book", "clock", "vase", "backpack", "bicycle")
_COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple")
_SHAPED = {
    "round": ("table", "mirror", "rug", "plate"),
    "square": ("clock", "box", "window", "cushion"),
    "long": ("bench", "sofa", "boat", "bridge"),
    "tall": ("tower", "lamp", "vase", "tree"),
}
_MADE = {
    "wooden": ("chair", "spoon", "door", "boat"),
    "metal": ("bucket", "gate", "lamp", "kettle"),
    "glass": ("bottle", "bowl", "vase", "jar"),
    "leather": ("jacket", "boot", "sofa", "bag"),
}
_RELATIONS = ("to the left of", "to the right of", "above", "below")
_NUMBERS = ("two", "three", "four")
_Prompt = tuple[str, tuple[str, ...]]


def _named(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _both(one: str, other: str) -> _Prompt:
    return f"{_named(one)} and {_named(other)}", (_named(one), _named(other))


def _colour(rng: random.Random) -> _Prompt:
    things, colors = rng.sample(_THINGS, 2), rng.sample(_COLORS, 2)
    return _both(*(f"{color} {thing}" for color, thing in zip(colors, things, strict=True)))


def _bound(words: Mapping[str, Sequence[str]]) -> Callable[[random.Random], _Prompt]:
    def made(rng: random.Random) -> _Prompt:
        kinds = rng.sample(sorted(words), 2)
        return _both(*(f"{kind} {rng.choice(words[kind])}" for kind in kinds))

    return made


def _spatial(rng: random.Random) -> _Prompt:
    one, other = map(_named, rng.sample(_THINGS, 2))
    whole = f"{one} {rng.choice(_RELATIONS)} {other}"
    return whole, (one, other, whole)


def _numeracy(rng: random.Random) -> _Prompt:
    one, other = rng.sample(_THINGS, 2)
    phrase = f"{rng.choice(_NUMBERS)} {one}s"
    return (phrase, (phrase,)) if rng.random() < 0.5 else (f"{phrase} and {_named(other)}", (phrase, _named(other)))


def _complex(rng: random.Random) -> _Prompt:
    made, color = rng.choice(sorted(_MADE)), rng.choice(_COLORS)
    one, other = _named(f"{color} {rng.choice(_THINGS)}"), _named(f"{made} {rng.choice(_MADE[made])}")
    whole = f"{one} {rng.choice(_RELATIONS)} {other}"
    return whole, (one, other, whole)


_MAKES: dict[str, Callable[[random.Random], _Prompt]] = {
    "colour": _colour,
    "shape": _bound(_SHAPED),
    "texture": _bound(_MADE),
    "spatial": _spatial,
    "numeracy": _numeracy,
    "complex": _complex,
}


def tasks(count: int, seed: int = 707, without: Collection[str] = ()) -> list[Task]:
    """Everyday prompts, ``count`` of each category and each once; none of those in ``without``."""
    found: list[Task] = []
    for category in CATEGORIES:
        rng, own = random.Random(f"{seed} {category}"), dict[str, tuple[str, ...]]()
        while len(own) < count:
            prompt, phrases = _MAKES[category](rng)
            if prompt not in without:
                own[prompt] = phrases
        found += [Task(category=category, prompt=prompt, phrases=phrases) for prompt, phrases in own.items()]
    return found


def read_tasks(file: str | Path) -> list[Task]:
    """Prompts of a ``.jsonl`` file: lines ``{"category": ..., "prompt": ..., "phrases": [...]}``.

    Phrases may be left out: then the prompt is what is asked for.

    Raises:
        UserError: the file cannot be read, or a line is something else; the message names it.
    """
    lines = [(i, line) for i, line in enumerate(read_text(file, "prompts file").split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompts file {shown(str(file))} is empty: write one prompt a line")
    return [_task(parse_json(line, f"{file} line {i}"), f"{file} line {i}") for i, line in lines]


def _task(line: Any, where: str) -> Task:
    match line:
        case {"category": str() as category, "prompt": str() as prompt, **rest} if category and prompt.strip():
            phrases = rest.pop("phrases", [])
            if not rest and isinstance(phrases, list) and all(isinstance(p, str) and p.strip() for p in phrases):
                return Task(category=category, prompt=prompt, phrases=tuple(phrases))
    raise UserError(
        f'{where} is no prompt of a category: write {{"category": "colour", "prompt": "a red car and a blue cup", '
        '"phrases": ["a red car", "a blue cup"]}'
    )


class ByReward:
    """A reward as a judge; see the module.

    Raises:
        UserError: the reward compares pictures with each other.
    """

    def __init__(self, reward: Reward, device: str = "cpu", batch_size: int = 16) -> None:
        if reward.groupwise:
            raise UserError(f"reward '{reward.name}' compares the pictures of a prompt: take one that scores each")
        self.reward, self.device, self.batch_size = reward, device, batch_size
        self.asks = reward.range == (0.0, 1.0)

    def __call__(self, pictures: np.ndarray, tasks: Sequence[Task]) -> list[Verdict]:
        asked = [(task.phrases if self.asks else ()) or (task.prompt,) for task in tasks]
        pairs = [(i, phrase) for i, phrases in enumerate(asked) for phrase in phrases]
        scores = iter(
            score
            for start in range(0, len(pairs), self.batch_size)
            for score in self._scores(pictures, pairs[start : start + self.batch_size])
        )
        found = [list(itertools.islice(scores, len(phrases))) for phrases in asked]
        return [Verdict(right=math.prod(own), graded=math.fsum(own) / len(own)) for own in found]

    def _scores(self, pictures: np.ndarray, pairs: Sequence[tuple[int, str]]) -> list[float]:

        shown = to_tensor(pictures[[i for i, _ in pairs]], self.device)
        with torch.no_grad():
            scores: list[float] = self.reward(shown, [phrase for _, phrase in pairs]).tolist()
        return scores
