"""Phrases of a prompt with the regions that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance import _words
from visiontune.guidance._pictures import white_of
from visiontune.guidance.base import Run
from visiontune.schema import option

# Of a phrase its words, and its nouns.
Named = tuple[str, list[str]]
# What nouns are told in the place of what they are in the prompt.
Balance = Literal["word", "phrase", "own", "none"]


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """Words of the prompt, and where what they name is to be."""

    phrase: str = option(help="words as they stand in the prompt; of equal ones each takes its next place there")
    mask: Any = option(help="file of a mask, white where that is to be; or left, top, width and height in pixels")
    nouns: list[str] | None = option(None, help="words of the phrase that name the object; null for its last one")


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A prompt.

    Attributes:
        columns: the tokens of each phrase. nouns: those of its nouns. words: of all that is neither mark nor padding.
        told: of nouns, by their tokens, the embeddings [d] that they have in other prompts.
    """

    columns: list[list[int]]
    nouns: list[list[int]]
    words: slice
    told: dict[int, Tensor]


def named(phrase: str, nouns: Sequence[str] | None = None) -> Named:
    """A phrase with its nouns, of which its last word is one where none are given."""
    return phrase, [*(nouns or phrase.split()[-1:])]


def masks_of(regions: Sequence[Phrase], run: Run, term: str, rest: bool) -> Tensor:
    """bool [r, h, w] of a run's latents; `rest`, what no region covers, is the last one.

    Raises:
        UserError: a mask is empty, or does not fit; or nothing is left uncovered.
    """
    masks = torch.cat([white_of(region.mask, run, run.shape, term)[0] > 0 for region in regions])
    if not rest:
        return masks
    bare = ~masks.any(0, keepdim=True)
    if not bare.any():
        raise UserError(f"{term}: regions cover all of the picture: leave out background, or make a region smaller")
    return torch.cat([masks, bare])


def columns_of(model: Any, prompt: str, phrases: Sequence[Named], term: str) -> list[list[int]]:
    """The tokens of each phrase; those of one that comes again are its next ones.

    Raises:
        UserError: a phrase is not in the prompt, or a noun not in its phrase.
    """
    found, words = [], [phrase for phrase, _ in phrases]
    for i, (phrase, nouns) in enumerate(phrases):
        found.append(_words.places(model, prompt, phrase, term, number=words[:i].count(phrase)))
        for noun in nouns:
            _words.places(model, phrase, noun, term)
    return found


@torch.no_grad()
def read(model: Any, prompt: str, phrases: Sequence[Named], term: str, source: Balance) -> Text:
    """A prompt, with its nouns as they are read alone (`word`) or in their phrase alone.

    Raises:
        UserError: as of `columns_of`.
    """
    columns, nouns = columns_of(model, prompt, phrases, term), []
    told: dict[int, Tensor] = {}
    for at, (phrase, names) in zip(columns, phrases, strict=True):
        inner = {name: _words.places(model, phrase, name, term) for name in names}
        nouns.append([at[place - 1] for places in inner.values() for place in places])
        for name, places in inner.items() if source in ("word", "phrase") else ():
            # Behind the mark of the beginning.
            there = places if source == "phrase" else [*range(1, 1 + len(places))]
            alone = model.embed([phrase if source == "phrase" else name]).tokens[0]
            told |= {at[place - 1]: alone[one] for place, one in zip(places, there, strict=True)}
    end = len(_words.tokens_of(model, prompt, term)) - 1
    return Text(columns=columns, nouns=nouns, words=slice(1, end), told=told)
