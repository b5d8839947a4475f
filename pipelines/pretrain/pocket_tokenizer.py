"""The CLIP tokenizer of the pocket models: real byte-level BPE, with a vocabulary of the pocket world's words.

Any other word falls back on its bytes, as in the full-size tokenizer.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from visiontune.pocket.scenes import vocabulary

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def merges() -> list[tuple[str, str]]:
    """BPE merges learned until every word of the pocket vocabulary is one token.

    The learner of the tokenizers library breaks ties at random; here the first pair in the alphabet wins, so that the
    same words always have the same ids.
    """
    words = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary()]
    learned = []
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        words = [_merge(word, best) for word in words]
    return learned


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer() -> CLIPTokenizer:
    """Vocabulary order as in CLIP: bytes, word-final bytes, merges, start, end (the highest id)."""
    pairs = merges()
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in pairs), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_LENGTH)


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and the classic ``vocab.json`` and ``merges.txt``."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
