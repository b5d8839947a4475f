"""The CLIP tokenizer of the pocket models: real byte-level BPE, with a vocabulary of the pocket world's words.

Any other word falls back on its bytes, as in the full-size tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import CLIPTokenizer

from visiontune.data.pocket_world import vocabulary

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def merges() -> list[tuple[str, str]]:
    """BPE merges learned until every word of the pocket vocabulary is one token."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(vocabulary(), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


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
