"""Several subjects in one model: what counts as known and what as bled, on pictures that are known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from visiontune.evaluation import together
from visiontune.pocket import oracle
from visiontune.pocket.world import RADII, SUBJECTS, Scene, Subject, Thing, render

PAIRS = [("bumble", "domino"), ("ember", "lagoon"), ("poppy", "mallow")]
TRIGGERS = {"bumble": "sks", "domino": "zwx"}


def pictured(*things: Thing) -> np.ndarray:
    return render(Scene(things=things))


def at(subject: Subject, x: float = 32, y: float = 32) -> Thing:
    return subject.thing(x, y, 13.0)


@pytest.mark.parametrize("pair", PAIRS)
def test_subjects_plain_shapes_and_mixtures_are_told_apart(pair):
    for name in pair:
        assert together.seen(pictured(at(SUBJECTS[name])), pair) == [name]
        for color in ("red", "green"):
            plain = Thing(shape=SUBJECTS[name].shape, color=color, x=32, y=32, radius=13.0)
            assert together.seen(pictured(plain), pair) == ["plain"]
    mixed = together.mixtures(pair)
    assert len(mixed) == 4 and {one.shape for one in mixed} == {SUBJECTS[name].shape for name in pair}
    assert all(together.seen(pictured(at(one)), pair) == ["mixed"] for one in mixed)
    assert all(oracle.recognise(pictured(at(one))) is None for one in mixed)


def test_what_has_bled():
    pair = ("bumble", "domino")
    assert not together.has_bled(["bumble"], ["bumble"]) and not together.has_bled(["plain"], ["bumble"])
    assert together.has_bled(["domino"], ["bumble"]) and together.has_bled(["mixed"], ["bumble"])
    assert not together.has_bled(["domino", "bumble"], pair) and together.has_bled(["bumble", "bumble"], pair)
    assert not together.has_bled(["plain", "plain"], pair) and not together.has_bled([], pair)


def test_both_are_there_when_they_are_and_nothing_else():
    one, other = at(SUBJECTS["bumble"], 16), at(SUBJECTS["domino"], 48)
    assert together.both_there(pictured(one, other), "bumble", "domino", "left of") == (True, True)
    assert together.both_there(pictured(one, other), "domino", "bumble", "left of") == (True, False)
    assert together.both_there(pictured(one), "bumble", "domino", "left of") == (False, False)
    third = Thing(shape="star", color="red", x=32, y=52, radius=9.0)
    assert together.both_there(pictured(one, other, third), "bumble", "domino", "left of") == (False, False)


@pytest.mark.parametrize("learnt", ["both", "mixed", "nothing"])
def test_a_model_is_judged_by_what_it_draws(monkeypatch, learnt):
    """The sampler is replaced by truth: subjects, subjects in each other's paint, or plain shapes."""
    own = {"sks": SUBJECTS["bumble"], "zwx": SUBJECTS["domino"]}
    swapped = [replace(own["sks"], color="cyan", accent="red"), replace(own["zwx"], color="yellow", accent="purple")]
    paints = {"both": own, "mixed": dict(zip(own, swapped, strict=True))}.get(learnt, {})

    def draw(model, prompts, seeds, **_):
        return np.stack([_drawn(prompt, paints) for prompt in prompts])

    monkeypatch.setattr(together, "images", draw)
    found = together.measure(SimpleNamespace(), TRIGGERS, ordinary=4, seeds=(1,))
    assert (found.known, found.both, found.placed) == ((1, 1, 1) if learnt == "both" else (0, 0, 0))
    assert (found.bleed, found.bleed_alone) == ((1, 1) if learnt == "mixed" else (0, 0))
    assert found.prompt_accuracy == found.class_kept == 1
    assert found.scores()["known_bumble"] == found.known


def _drawn(prompt: str, paints: dict[str, Subject]) -> np.ndarray:
    request = oracle.read_caption(prompt)
    places = [(15, 32), (49, 32)] if request.relation in ("left of", "right of") else [(32, 15), (32, 49)]
    if request.relation in ("right of", "below"):
        places.reverse()
    triggers = iter(word for word in prompt.split() if word in ("sks", "zwx"))
    things = []
    for wanted, (x, y) in zip(request.things, places, strict=False):
        subject = paints.get(next(triggers, ""))
        plain = Thing(shape=wanted.shape, color=wanted.color or "red", x=x, y=y, radius=RADII[wanted.size or "large"])
        things.append(subject.thing(x, y, 13.0) if subject else plain)
    return pictured(*things)


def test_pairs_are_asked_for_in_either_order():
    asked = together.pair_prompts(TRIGGERS)
    assert "a sks circle left of a zwx square" in asked and "a zwx square above a sks circle" in asked
    assert {pair[:2] for pair in asked.values()} == set(itertools.permutations(TRIGGERS))
