"""How many tokens of a prompt a pipeline reads, and what is said of the others."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.outside import shown

_log = logging.getLogger(__name__)
_SHOWN = 10
_CHUNK = 1024
_ENDS = 3  # of T5, whose first token may be an empty word, and of CLIP, with its two marks
# What diffusers and transformers say of a prompt that is cut, at every call and by the words that are lost alone.
_THEIRS = ("input was truncated because", "sequence length is longer than the specified maximum")


class Reader:
    """The tokenizer that reads the most of a prompt, and how much that is.

    Args:
        tokenizer: of transformers.
        limit: tokens that its encoder takes, those that mark beginning and end included.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self._known: set[str] = set()

    def cut(self, prompts: Sequence[str]) -> dict[str, int]:
        """The prompts that are longer than the limit, with the tokens that they have. They count as said."""
        self._known.update(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if not self._short(prompt)]
        found: dict[str, int] = {}
        with quiet():
            for start in range(0, len(new), _CHUNK):
                chunk = new[start : start + _CHUNK]
                found |= zip(chunk, map(len, self.tokenizer(chunk)["input_ids"]), strict=True)
        return {prompt: count for prompt, count in found.items() if count > self.limit}

    def _short(self, prompt: str) -> bool:
        """Whether a prompt is read whole for certain: a token has a letter at least, but for those at the ends."""
        return prompt.isascii() and len(prompt) <= self.limit - _ENDS

    def lost(self, kind: str, named: Sequence[tuple[str, str]]) -> list[str]:
        """One line on the texts that are cut, or none.

        Args:
            kind: what a text is, ``caption``. named: what it is called, and its words.
        """
        cut = self.cut([text for _, text in named])
        names = [f"{name} ({cut[text]} tokens)" for name, text in named if text in cut]
        if not names:
            return []
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        some = f"1 {kind} is" if len(names) == 1 else f"{len(names)} {kind}s are"
        return [
            f"{some} longer than the {self.limit} tokens that the model reads, and the words after them are lost: "
            f"{', '.join(names[:_SHOWN])}{more}"
        ]

    def say(self, prompts: Sequence[str]) -> None:
        """Warn of prompts that are cut, once of each."""
        new = dict.fromkeys(prompt for prompt in prompts if prompt not in self._known)
        for line in self.lost("prompt", [(f"'{shown(prompt)[:80]}'", prompt) for prompt in new]):
            _log.warning("%s", line)


def lost(model: Any, texts: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    """What is said of texts that a model reads in part: :meth:`Reader.lost` of each kind; nothing without a reader."""
    reader = getattr(model, "reader", None)
    return [] if reader is None else [line for kind, named in texts.items() for line in reader.lost(kind, named)]


def places(model: Any, prompt: str, words: str) -> list[int]:
    """Where some words of a prompt stand along the tokens that a family's pipeline makes of it.

    Args:
        model: with a `STRUCTURE`. words: they count wherever they stand in the prompt, in any case of their letters.

    Raises:
        UserError: the prompt does not have the words, or the model does not read so far.
    """
    names = [name for name in model.STRUCTURE.tokenizers if getattr(model.pipe, name) is not None]
    found, before = list[int](), 0
    for name in names:
        tokenizer = getattr(model.pipe, name)
        limit = model.reader.limit if name == names[-1] else int(tokenizer.model_max_length)
        text = model.pipe._text_preprocessing(prompt)[0] if hasattr(model.pipe, "_text_preprocessing") else prompt
        spans = [one.span() for one in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE)]
        with quiet():
            tokens = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][:limit]
        found += [
            before + i for i, (first, last) in enumerate(tokens) if any(first < end and last > at for at, end in spans)
        ]
        before += limit
    if not found:
        raise UserError(f"'{shown(words)}' is not among the words that are read of the prompt '{shown(prompt)[:80]}'")
    return found


def rows_of(model: Any, word: str, known: str = "") -> dict[str, tuple[nn.Embedding, dict[str, list[int]], set[int]]]:
    """Where a pipeline's text encoders look a word up, as :func:`visiontune.adapters.attach` takes it.

    Args:
        word: one or several. known: words that keep their meaning: of "sks dog" the dog.

    Returns:
        Name of the embedding -> the embedding, the rows of ``word``, and those of ``known``.

    Raises:
        UserError: the model has no text encoders; one of them does not know the word, or nothing of it but what is
            known, or reads it otherwise in a prompt than in other sentences.
    """
    encoders = model.of(*model.roles().get("text", ()))
    if not encoders:
        raise UserError(f"'{model.source}' ({model.family}) has no text encoders: leave trigger out of train.parts")
    seen = _looked_up(encoders, lambda: model.look_up(f"a {word}"))
    found = {}
    for name, encoder in encoders.items():
        tokenizer = getattr(model.pipe, name.replace("text_encoder", "tokenizer"))
        ids = inside(tokenizer, word)
        kept = {*inside(tokenizer, known)} if known else set()
        if not {*ids} - kept or tokenizer.unk_token_id in ids:
            raise UserError(f"data.trigger: {name} does not know the word '{shown(word)}': take another")
        # Positions are looked up too, in tables of few rows.
        tables = [m for m in encoder.modules() if m in seen and m.num_embeddings >= len(tokenizer)]
        layer = next((table for table in tables if {*ids} <= seen[table]), None)
        if layer is None:
            raise UserError(f"data.trigger: {name} reads '{shown(word)}' otherwise in a prompt: take another word")
        own = next(path for path, module in encoder.named_modules() if module is layer)
        found[f"{name}.{own}"] = (layer, {word: list(ids)}, kept)
    return found


def rows_of_each(
    model: Any, words: Mapping[str, str]
) -> dict[str, tuple[nn.Embedding, dict[str, list[int]], set[int]]]:
    """:func:`rows_of` of several words, which are trained beside each other.

    Args:
        words: each with those of it that keep their meaning.

    Raises:
        UserError: as of :func:`rows_of`; two of the words are read with a token in common.
    """
    found: dict[str, tuple[nn.Embedding, dict[str, list[int]], set[int]]] = {}
    for word, known in words.items():
        for name, (layer, own, kept) in rows_of(model, word, known).items():
            _, others, theirs = found.setdefault(name, (layer, {}, set()))
            taken = {i for ids in others.values() for i in ids} - theirs
            if shared := taken & ({*own[word]} - kept):
                token = getattr(model.pipe, name.partition(".")[0].replace("text_encoder", "tokenizer")).decode(
                    min(shared)
                )
                raise UserError(
                    f"data.subjects: '{shown(word)}' is read with the token '{token}', as the word of another subject "
                    "is, and would share its meaning: take another word"
                )
            others |= own
            theirs |= kept
    return found


def inside(tokenizer: Any, words: str) -> list[int]:
    """What words are read as inside of a sentence, where some tokenizers have a space in front of them."""
    before, all_ = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", f"a {words}"))
    return all_[len(before) :]


def _looked_up(encoders: Mapping[str, nn.Module], read: Callable[[], object]) -> dict[nn.Embedding, set[int]]:
    """The rows that every embedding of the encoders is asked for while a text is read."""
    seen: dict[nn.Embedding, set[int]] = {}

    def note(layer: nn.Embedding, asked: tuple[Tensor, ...]) -> None:
        seen.setdefault(layer, set()).update(asked[0].flatten().tolist())

    layers = [m for encoder in encoders.values() for m in encoder.modules() if isinstance(m, nn.Embedding)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            read()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own words on prompts that are cut left out for a while."""
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_new_to_us)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_new_to_us)


def _new_to_us(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _THEIRS)
