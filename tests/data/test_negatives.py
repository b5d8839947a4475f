"""Captions that are false by little: checked against the pocket world, whose oracle knows what is true."""

from __future__ import annotations

import random

import numpy as np
import pytest

from visiontune.data.negatives import KINDS, negative, negatives
from visiontune.pocket import oracle
from visiontune.pocket.scenes import caption, sample_scene
from visiontune.pocket.world import COLORS, render


def every(text: str, kind: str, tries: int = 60) -> set[str]:
    return {found for seed in range(tries) if (found := negative(text, kind, random.Random(seed))) is not None}


def test_swapped_captions_of_the_pocket_world_are_false():
    rng, chance, asked = np.random.default_rng(3), random.Random(3), 0
    while asked < 150:
        scene = sample_scene(rng)
        true, picture = caption(scene, rng), render(scene)
        false = negative(true, "swap", chance)
        if false is None or not oracle.matches(picture, true):
            continue
        asked += 1
        assert not oracle.matches(picture, false), (true, false)
        words = [sorted(text.replace("an ", "a ").replace(",", "").split()) for text in (true, false)]
        assert words[0] == words[1]


def test_replaced_captions_of_the_pocket_world_are_false_in_one_word_or_relation():
    rng, chance, asked = np.random.default_rng(4), random.Random(4), 0
    while asked < 150:
        scene = sample_scene(rng)
        true, picture = caption(scene, rng), render(scene)
        false = negative(true, "replace", chance)
        assert false is not None and false != true
        one, other = (text.replace("an ", "a ").split() for text in (true, false))
        changed = [pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]]
        assert len(one) != len(other) or len(changed) == 1
        # The oracle does not look at grounds, nor at colours that the world does not have.
        if oracle.matches(picture, true) and changed[0][1] in {*COLORS, "left", "right", "small", "large"}:
            asked += 1
            assert not oracle.matches(picture, false), (true, false)


@pytest.mark.parametrize(
    "text, kind, found",
    [
        ("a cat and a dog", "swap", set()),
        ("a red and blue ball", "swap", set()),
        ("a horse next to a cow", "swap", set()),
        ("a red cat and a red dog", "swap", set()),
        ("a dog", "swap", set()),
        ("a red cup and a blue cup", "swap", set()),
        ("a red cup left of a blue cup", "swap", {"a blue cup left of a red cup"}),
        ("two dogs behind a fence", "swap", {"a fence behind two dogs"}),
        ("the book is on top of an orange box", "swap", set()),
        ("a lamp to the left of the sofa.", "swap", {"the sofa to the left of a lamp."}),
        ("a cup above a cup", "replace", set()),
        ("an orange cup inside the box", "replace", {"an orange cup outside the box"}),
        ("dog", "shuffle", set()),
    ],
)
def test_what_is_made_of_a_caption(text, kind, found):
    made = every(text, kind)
    assert found <= made and (found or not made)


def test_articles_go_with_their_words():
    assert every("a red cup left of an orange pan", "swap") >= {"an orange cup left of a red pan"}
    assert all(" a o" not in f" {text}" and " an r" not in f" {text}" for text in every("an orange car", "replace"))


def test_a_kind_without_an_answer_is_none_and_the_same_seed_makes_the_same():
    assert negatives("two", ["swap", "shuffle"], random.Random(0)) == [None, None]
    text = "a black cat left of a white dog on a red sofa"
    assert negatives(text, KINDS, random.Random(5)) == negatives(text, KINDS, random.Random(5))
    assert len({negatives(text, KINDS, random.Random(seed))[1] for seed in range(20)}) > 5
    shuffled = every(text, "shuffle")
    assert text not in shuffled and all(sorted(one.split()) == sorted(text.split()) for one in shuffled)
