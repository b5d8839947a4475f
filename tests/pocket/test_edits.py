"""Edits of the pocket world: what is drawn is what the judge wants, and nothing less passes for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from visiontune.pocket.edits import KINDS, Verdict, judge, stream
from visiontune.pocket.oracle import holds
from visiontune.pocket.scenes import held_out
from visiontune.pocket.world import TONES, Scene, render

RIGHT = Verdict(changed=True, kept=True)


@pytest.fixture(scope="module")
def edits():
    return list(islice(stream(5), 60))


def shown(scene: Scene) -> np.ndarray:
    return render(scene)


def test_the_truth_is_right_and_the_source_is_an_edit_that_was_not_made(edits):
    assert [edit.kind for edit in edits] == [*KINDS] * 12
    assert [judge(shown(edit.after), edit) for edit in edits] == [RIGHT] * 60
    assert [judge(shown(edit.before), edit) for edit in edits] == [Verdict(changed=False, kept=True)] * 60


def test_the_answer_to_another_instruction_is_none_to_this_one(edits):
    for edit, other in zip(edits, edits[5:], strict=False):
        found = judge(shown(other.after), edit)
        assert not found.kept and (not found.changed or edit.kind == "remove")


def test_what_the_edit_leaves_alone_must_stay(edits):
    for edit in edits:
        tone = next(tone for tone in TONES if tone != edit.after.tone)
        assert judge(shown(replace(edit.after, tone=tone)), edit) == Verdict(changed=True, kept=False)
        for thing in edit.kept:
            moved = replace(thing, x=thing.x + (6 if thing.x < 32 else -6))
            spoilt = replace(edit.after, things=tuple(moved if one == thing else one for one in edit.after.things))
            assert not judge(shown(spoilt), edit).kept
            gone = replace(edit.after, things=tuple(one for one in edit.after.things if one != thing))
            assert not judge(shown(gone), edit).kept


def test_a_thing_that_nobody_asked_for_spoils_both(edits):
    edit = next(edit for edit in edits if edit.kind == "recolour" and len(edit.after.things) == 1)
    thing = edit.after.things[0]
    extra = replace(thing, shape="star", radius=9.0, x=52.0 if thing.x < 32 else 12.0, y=52.0 if thing.y < 32 else 12.0)
    more = replace(edit.after, things=(thing, extra))
    assert judge(shown(more), edit) == Verdict(changed=False, kept=False)


def test_where_a_thing_is_put_is_open_but_for_its_relation(edits):
    for edit in edits:
        if edit.kind not in ("add", "move"):
            continue
        (new,) = edit.changed
        assert edit.anchor in edit.kept and holds(edit.relation, new, edit.anchor)
        beside = replace(new, y=64 - new.y) if edit.relation in ("left of", "right of") else replace(new, x=64 - new.x)
        alone = all(np.hypot(beside.x - t.x, beside.y - t.y) > beside.radius + t.radius + 3 for t in edit.kept)
        if alone:
            elsewhere = replace(edit.after, things=(*edit.kept, beside))
            stands = holds(edit.relation, beside, edit.anchor)
            assert judge(shown(elsewhere), edit).changed == stands


def test_instructions_name_one_thing_each_and_keep_to_their_side(edits):
    for edit in edits:
        names = [(thing.color, thing.shape) for thing in edit.before.things]
        assert len({*names}) == len(names) and not held_out(edit.instruction)
        assert len(edit.changed) == {"remove": 0, "swap": 2}.get(edit.kind, 1)
    assert all(held_out(edit.instruction) for edit in islice(stream(5, holdout=True), 10))
    assert {edit.kind for edit in islice(stream(0, ["swap"]), 5)} == {"swap"}
    assert list(islice(stream(5), 60)) == edits
