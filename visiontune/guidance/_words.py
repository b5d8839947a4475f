"""Words of a prompt: where they stand among its tokens, and layers that read others in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.guidance._taps import Forward, bound, replaced
from visiontune.guidance.base import Point, Run, Term
from visiontune.models.words import inside
from visiontune.outside import shown


def tokens_of(model: Any, prompt: str, term: str) -> list[int]:
    """The tokens of a prompt as they are read, with the marks of beginning and end.

    Raises:
        UserError: the text encoders of the model read it as other tokens.
    """
    read = [_read(tokenizer, prompt) for tokenizer in _tokenizers(model)]
    if any(other != read[0] for other in read[1:]):
        raise UserError(f"{term}: the text encoders of '{model.source}' read a prompt differently: leave it out")
    return read[0]


def places(model: Any, prompt: str, words: str, term: str, number: int = 0) -> list[int]:
    """Where words stand among the tokens of a prompt, the first time or a later one (`number`).

    Raises:
        UserError: they do not, as far as the prompt is read.
    """
    read, own = tokens_of(model, prompt, term), inside(_tokenizers(model)[0], words)
    starts = [i for i in range(1, len(read) - len(own)) if read[i : i + len(own)] == own] if own else []
    if number >= len(starts):
        often = "" if number == 0 else f" {number + 1} times"
        raise UserError(
            f"{term}: '{shown(words)}' does not stand{often} in what is read of the prompt '{shown(prompt)}': take its "
            "words as they are there"
        )
    return [*range(starts[number], starts[number] + len(own))]


def prompts_of(run: Run, own: str | None, term: str) -> Sequence[str]:
    """The prompts of the rows, or the one of all that a term was told; empty where there are none yet, as in a plan.

    Raises:
        UserError: they are not known.
    """
    if own is not None:
        return [own]
    if run.prompts is None:
        raise UserError(
            f"{term}: the prompts of the pictures are not known here: set its prompt, or give them to attach"
        )
    return run.prompts


def told(rows: int, side: str) -> slice:
    """Which rows of a call are told the prompt; `side` as of `Shaping.shaping`."""
    return slice(rows // 2 if side == "both" else 0, rows)


def spread(values: Sequence[Any], rows: int) -> list[Any]:
    """One of the values for each row: pipelines draw several pictures of a prompt one after the other."""
    return [values[i * len(values) // rows] for i in range(rows)]


def strengths(term: Term, point: Point, rows: int) -> list[float]:
    """Of each row told the prompt its strength; a point may have the rows of both sides, the prompt's last."""
    return [term.at(level) for level in point.levels[-rows:]]


@contextmanager
def reading(layers: Mapping[str, nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In the block, the layers read `change(words)`, of words [rows, n, d], in their place."""

    def make(name: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def changed(*args: Any, **kwargs: Any) -> Any:
            call = bound(forward, args, kwargs)
            more = call.pop("cross_attention_kwargs", {})
            return forward(**{**call, "encoder_hidden_states": change(call["encoder_hidden_states"])}, **more)

        return changed

    with replaced(layers, make):
        yield


def added(words: Tensor, offsets: Sequence[Sequence[tuple[int, Tensor]]], side: str) -> Tensor:
    """Words [rows, n, d] to which the rows that are told the prompt have, at some tokens, vectors [d] added."""
    rows, delta = told(len(words), side), torch.zeros_like(words)
    for row, pairs in zip(range(rows.start, rows.stop), offsets, strict=True):
        for at, offset in pairs:
            delta[row, at] = offset.to(words)
    return words + delta


def kept(point: Point, key: str, make: Callable[[], Any]) -> Any:
    """What is found once in a run."""
    if key not in point.memory:
        point.memory[key] = make()
    return point.memory[key]


def _tokenizers(model: Any) -> list[Any]:
    return [part for name, part in sorted(model.pipe.components.items()) if name.startswith("tokenizer") and part]


def _read(tokenizer: Any, prompt: str) -> list[int]:
    found: list[int] = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    return found
