"""What is said of prompts that a pipeline reads in part."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from tiny import tiny_model

from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.models.words import Reader, lost

LONG = "a red circle " * 12


@pytest.mark.parametrize("family", ["sd", "sdxl", "amused"])
def test_what_is_named_is_what_the_encoder_does_not_read(family):
    model = tiny_model(family)
    words = LONG.split()
    texts = [" ".join(words[:n]) for n in range(len(words) + 1)]
    cut = model.reader.cut(texts)
    read = [model.embed([text]).tokens for text in texts]
    # A text is cut just where its last word makes no difference.
    assert [text in cut for text in texts[1:]] == [bool((a == b).all()) for a, b in pairwise(read)]
    assert 0 < len(cut) < len(texts)


def test_t5_reads_more_than_clip_where_it_is_there():
    model, without = tiny_model("sd3"), tiny_model("sd3", t5=False)
    assert model.reader.limit > without.reader.limit == 32
    assert LONG in without.reader.cut([LONG]) and not model.reader.cut([LONG])


def test_texts_are_listed_by_name_with_their_tokens_and_how_many_more():
    model = tiny_model("sd")
    count = len(model.reader.tokenizer(LONG)["input_ids"])
    assert lost(model, {"caption": [("a.png", LONG), ("b.png", "a circle")], "preview prompt": []}) == [
        "1 caption is longer than the 32 tokens that the model reads, and the words after them are lost: "
        f"a.png ({count} tokens)"
    ]
    (line,) = lost(model, {"caption": [(f"{i}.png", LONG) for i in range(12)]})
    assert line.startswith("12 captions are") and line.endswith(f"9.png ({count} tokens) and 2 more")
    assert lost(object(), {"caption": [("a.png", LONG)]}) == []


@pytest.fixture
def theirs():
    """What diffusers and transformers say."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(handler)
    yield said
    for library in libraries:
        library.removeHandler(handler)


def test_a_prompt_is_said_once_in_our_words_alone(caplog, theirs):
    model = tiny_model("sd")
    for _ in range(2):
        model.embed([LONG, "a circle"])
    model.draw([Request(prompt=LONG, seed=0, negative="no " + LONG)], steps=1, guidance=model.guidance(2.0))
    said = [record for record in caplog.records if record.name == Reader.__module__]
    assert [record.levelno for record in said] == [logging.WARNING] * 2
    assert LONG[:80] in said[0].getMessage() and "no a red" in said[1].getMessage()
    assert not any("truncated" in words or "longer than" in words for words in theirs)
    model.pipe.encode_prompt([LONG], "cpu", 1, False)
    assert any("truncated" in words for words in theirs)


def test_what_was_listed_is_not_said_again(caplog):
    model = tiny_model("sd")
    lost(model, {"caption": [("a.png", LONG)]})
    model.embed([LONG])
    assert not caplog.records


@pytest.mark.parametrize("half", ["weights", "precision"])
def test_a_text_encoder_that_overflows_in_float16_is_named(half):
    model = tiny_model("pixart")
    with torch.no_grad():
        for name, weight in model.of("text_encoder")["text_encoder"].named_parameters():
            if name.endswith("wo.weight"):
                weight.mul_(1e6)
    assert model.embed(["a red circle"]).tokens.isfinite().all()
    if half == "weights":
        model.of("text_encoder")["text_encoder"].half()
    else:
        model = model.at(torch.float16)
    with pytest.raises(UserError, match=r"a text encoder of 'tiny-pixart' overflows in float16: set model\.dtype"):
        model.embed(["a red circle"])
