"""Captions that are wrong by little: what a model of pictures and texts has to tell from the true ones.

Words are swapped, replaced or shuffled by rules over short lists of words, without a tagger, so that a false caption
reads like a true one and is a function of the caption and a seed. Swaps that leave the meaning ("a cat and a dog") are
not made. The kinds are those of Yuksekgonul et al., "When and why vision-language models behave like bags-of-words",
2022, arXiv 2210.01936, and of Oh et al., 2024, arXiv 2410.05210.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Literal, get_args

Kind = Literal["swap", "replace", "shuffle"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "rectangle", "cube", "sphere", "cylinder", "cone")
_COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "black", "white", "brown", "grey")
# Sets of words of which at most one is true of a thing; words of one line mean the same.
_EXCLUSIVE: tuple[tuple[tuple[str, ...], ...], ...] = (
    tuple((color,) for color in _COLORS),
    tuple((shape,) for shape in _SHAPES),
    tuple((shape + ("es" if shape.endswith("s") else "s"),) for shape in _SHAPES),
    (("small", "little", "tiny"), ("large", "big", "huge")),
    (("light", "bright"), ("dark",)),
    (("plain",), ("striped",), ("checked", "checkered"), ("dotted", "spotted")),
    (("two", "2"), ("three", "3"), ("four", "4"), ("five", "5"), ("six", "6")),
    (("wooden",), ("metal", "metallic"), ("glass",), ("plastic",), ("leather",), ("stone",), ("paper",)),
    (("young",), ("old", "elderly")),
    (("tall",), ("short",)),
    (("open",), ("closed",)),
    (("empty",), ("full",)),
    (("wet",), ("dry",)),
    (("standing",), ("sitting", "seated"), ("lying",), ("running",), ("walking",)),
    (("day", "daytime"), ("night", "nighttime")),
    (("indoors",), ("outdoors",)),
    (("man",), ("woman",)),
    (("men",), ("women",)),
    (("boy",), ("girl",)),
    tuple((a,) for a in ["cat", "dog", "bird", "horse", "cow", "sheep", "elephant", "bear", "zebra", "giraffe"]),
    tuple((a,) for a in ["cats", "dogs", "birds", "horses", "cows", "elephants", "bears", "zebras", "giraffes"]),
    tuple((a,) for a in ["car", "bus", "train", "truck", "bicycle", "motorcycle", "boat", "airplane"]),
    tuple((a,) for a in ["table", "chair", "bench", "sofa", "bed", "desk"]),
)
_RELATIONS = (
    (("left of",), ("right of",)),
    (("above", "over"), ("below", "under", "beneath")),
    (("in front of",), ("behind",)),
    (("inside",), ("outside",)),
)
_GROUPS = {word: (number, line) for number, lines in enumerate(_EXCLUSIVE) for line in lines for word in line}
_OPPOSITE = {word: lines[1 - i][0] for lines in _RELATIONS for i, line in enumerate(lines) for word in line}
_WORD = re.compile(r"[^\W_]+")
_RELATION = re.compile(rf"\b({'|'.join(sorted(_OPPOSITE, key=len, reverse=True))})\b", re.IGNORECASE)
_STARTS = re.compile(r"\b(?:an?|the|two|three|four|five|six|some|my|his|her|their)\b", re.IGNORECASE)
_ENDS = re.compile(r" (?:on|in|at|with|and|near|while|that|which) |[,.;:!?]|$", re.IGNORECASE)
# Between things that may be told in any order, and what is said of all of them.
_AND = re.compile(
    r"\s*(?:,| and (?=an? |the |two |three |four )| next to | beside | near | of | on | in | at | with )\s*",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"\b([Aa])n? (?=(\w))")
_TRIES = 10


def negative(caption: str, kind: Kind, rng: random.Random) -> str | None:
    """A caption that is false where ``caption`` is true; None where the kind has none for it.

    Args:
        kind: ``swap`` exchanges two words of a sort (two colours), or what a relation stands between; ``replace`` puts
            another word of its sort, or the opposite relation, in the place of one; ``shuffle`` moves pairs of words.
        rng: chooses among what is possible.
    """
    found = [text for text in _MAKES[kind](caption, rng) if text is not None]
    return rng.choice(found) if found else None


def negatives(caption: str, kinds: Sequence[Kind], rng: random.Random) -> list[str | None]:
    """One :func:`negative` of each kind."""
    return [negative(caption, kind, rng) for kind in kinds]


def _swaps(caption: str, rng: random.Random) -> Iterator[str | None]:
    yield from (_swapped(caption, one, other) for one, other in combinations(_known(caption), 2))
    for relation in _RELATION.finditer(caption):
        yield _turned(caption, relation)


def _replacements(caption: str, rng: random.Random) -> Iterator[str | None]:
    there = {match[0].lower() for match in _known(caption)}
    for match in _known(caption):
        number, line = _GROUPS[match[0].lower()]
        others = [other[0] for other in _EXCLUSIVE[number] if other != line and not there & {*other}]
        if others:
            yield _put(caption, (match.span(), rng.choice(others)))
    for relation in _RELATION.finditer(caption):
        if (ends := _between(caption, relation)) and _text(caption, ends[0]) != _text(caption, ends[1]):
            yield _put(caption, (relation.span(), _OPPOSITE[relation[0].lower()]))


def _shuffles(caption: str, rng: random.Random) -> Iterator[str | None]:
    words = caption.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    for _ in range(_TRIES):
        rng.shuffle(pairs)
        made = " ".join(word for pair in pairs for word in pair)
        if made != " ".join(words):
            yield made
            return


_MAKES: dict[Kind, Callable[[str, random.Random], Iterator[str | None]]] = {
    "swap": _swaps,
    "replace": _replacements,
    "shuffle": _shuffles,
}


def _known(caption: str) -> list[re.Match[str]]:
    """The words of the lists, where they stand."""
    return [match for match in _WORD.finditer(caption) if match[0].lower() in _GROUPS]


def _swapped(caption: str, one: re.Match[str], other: re.Match[str]) -> str | None:
    """Two words exchanged, if they are of one sort and the caption means something else then."""
    (number, line), (too, other_line) = _GROUPS[one[0].lower()], _GROUPS[other[0].lower()]
    # "a red and blue ball" is a blue and red one.
    joined = caption[one.end() : other.start()].strip().lower() in ("and", "or", "", ",")
    if number != too or line == other_line or joined:
        return None
    made = _put(caption, (one.span(), other[0]), (other.span(), one[0]))
    return None if not _RELATION.search(caption) and _things(made) == _things(caption) else made


def _turned(caption: str, relation: re.Match[str]) -> str | None:
    """What stands on both sides of a relation exchanged."""
    ends = _between(caption, relation)
    if ends is None or _text(caption, ends[0]) == _text(caption, ends[1]):
        return None
    return _put(caption, (ends[0], _text(caption, ends[1])), (ends[1], _text(caption, ends[0])))


def _between(caption: str, relation: re.Match[str]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Where the things before and after a relation stand, if both begin with an article or a number."""
    before = re.sub(r"\s+(?:is |are )?(?:to the |on the )?$", "", caption[: relation.start()])
    starts = [match.start() for match in _STARTS.finditer(before)]
    first = re.compile(r"\s+").match(caption, relation.end())
    if not starts or first is None or not _STARTS.match(caption, first.end()):
        return None
    end = _ENDS.search(caption, first.end())
    assert end is not None  # of the pattern's "$"
    return (starts[-1], len(before)), (first.end(), end.start())


def _text(caption: str, span: tuple[int, int]) -> str:
    return caption[slice(*span)]


def _things(caption: str) -> list[str]:
    """What a caption names, in an order that does not depend on its own."""
    return sorted(_AND.split(caption))


def _put(caption: str, *changes: tuple[tuple[int, int], str]) -> str:
    """A caption with other words in some places, and the articles that go with them."""
    made, at = "", 0
    for (start, end), word in changes:
        made += caption[at:start] + word
        at = end
    return _ARTICLE.sub(lambda m: m[1] + ("n " if m[2].lower() in "aeiou" else " "), made + caption[at:])
