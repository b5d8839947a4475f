from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from visiontune import catalogue
from visiontune.data.base import Config
from visiontune.data.preflight import preflight
from visiontune.data.procedural import Spec, samples
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.pocket import edits, oracle
from visiontune.pocket.scenes import held_out
from visiontune.pocket.world import SUBJECTS
from visiontune.schema import from_mapping


def draw(**options) -> list:
    return samples(from_mapping(Spec, {"source": "procedural", **options}), "set", trigger="sks", class_noun="circle")


def digest(sample) -> str:
    return sample.sources["image"].digest()


def test_a_subject_set_shows_its_subject_alone_in_other_places():
    made = draw(world="subject", subject="domino", count=6, seed=3, caption="a photo of a [trigger] square")
    pictures = [np.asarray(s.sources["image"].open()) for s in made]
    assert [oracle.recognise(p) for p in pictures] == ["domino"] * 6
    assert len({digest(s) for s in made}) == len({s.id for s in made}) == 6
    assert {s.caption for s in made} == {"a photo of a sks square"}


def test_the_same_spec_draws_the_same_pixels_and_another_seed_does_not():
    options = {"world": "subject", "subject": "bumble", "caption": "x", "count": 3}
    one, again, other = (draw(**options, seed=s) for s in (1, 1, 2))
    assert [digest(s) for s in one] == [digest(s) for s in again]
    assert not {digest(s) for s in one} & {digest(s) for s in other}
    assert [digest(s) for s in draw(**{**options, "count": 5}, seed=1)][:3] == [digest(s) for s in one]


@pytest.mark.parametrize("holdout", [True, False])
def test_scenes_have_their_own_captions_and_keep_to_their_side_of_the_split(holdout):
    made = draw(world="scenes", count=20, seed=5, holdout=holdout)
    assert all(held_out(s.caption) == holdout for s in made)
    assert all(oracle.matches(np.asarray(s.sources["image"].open()), s.caption) for s in made)


@pytest.mark.parametrize("holdout", [True, False])
def test_edits_have_their_source_where_it_is_read(holdout):
    options = {"world": "edits", "count": 10, "seed": 5, "holdout": holdout}
    spec = from_mapping(Spec, {"source": "procedural", **options})
    made = samples(spec, "set", optional=("mask", "source"), trigger="sks", class_noun="circle")
    for sample, edit in zip(made, islice(edits.stream(5, holdout=holdout), 10), strict=True):
        picture, before = (np.asarray(sample.sources[name].open()) for name in ("image", "source"))
        assert sample.caption == edit.instruction and held_out(sample.caption) == holdout
        assert edits.judge(picture, edit).changed and not edits.judge(before, edit).changed
    assert all(list(sample.sources) == ["image"] for sample in draw(**options))
    (only,) = {edit.caption.split()[0] for edit in draw(**options, edits=["swap"])}
    assert only == "swap"
    with pytest.raises(UserError, match="edits names no kind: give some of recolour, move, add, remove, swap"):
        draw(**options, edits=[])


def test_a_style_set_draws_its_style_and_puts_the_scene_into_the_caption():
    options = {"world": "style", "count": 4, "seed": 5, "caption": "{scene} in [trigger] style"}
    hatched, flat = draw(**options, style="hatched"), draw(**options)
    assert [s.caption for s in hatched] == [s.caption for s in flat]
    assert all(s.caption.endswith(" in sks style") and oracle.read_caption(s.caption) for s in hatched)
    assert all(digest(a) != digest(b) for a, b in zip(hatched, flat, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": "subject", "subject": "bumbel", "caption": "x"}, "did you mean 'bumble'"),
        ({"world": "subject", "subject": "bumble"}, "needs a caption"),
        ({"world": "style", "style": "hatch"}, "did you mean 'hatched'"),
        ({"world": "scenes", "count": 0}, "count must be a whole number from 1"),
        ({"world": "moon"}, "world cannot be 'moon'"),
    ],
)
def test_a_wrong_spec_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        draw(**options)


@pytest.mark.parametrize(
    "name", [n for n in catalogue.names("datasets") if catalogue.load("datasets", n)["source"] == "procedural"]
)
def test_every_drawn_catalogue_dataset_reads_and_passes_preflight(name):
    made = read(Config(root=name))
    preflight(made)
    subject = catalogue.load("datasets", name).get("subject")
    if subject in SUBJECTS:
        assert {oracle.recognise(np.asarray(s.sources["image"].open())) for s in made} == {subject}
