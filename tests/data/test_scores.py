"""Ratings of pictures: from tables to what rows are told, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data.base import Config
from visiontune.data.inventory import inventory, unrated
from visiontune.data.preflight import preflight
from visiontune.data.procedural import Spec, samples
from visiontune.data.readers import read
from visiontune.data.rows import Pick, Rows
from visiontune.data.scores import asked
from visiontune.errors import UserError
from visiontune.pocket import oracle
from visiontune.pocket.spoilt import RATINGS
from visiontune.schema import from_mapping

RANGES = {"quality": [0, 5], "watermark": [1, 0]}


@pytest.fixture
def folder(tmp_path):
    """Writes pictures with ratings: ``folder(lines, options)`` gives the config."""

    place = tmp_path / "rated"
    place.mkdir(exist_ok=True)

    def write(*rated, **options):
        for i, _ in enumerate(rated):
            Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(place / f"{i}.png")
        lines = [{"file_name": f"{i}.png", "text": f"picture {i}", **told} for i, told in enumerate(rated)]
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return from_mapping(Config, {"root": str(place), "scores": RANGES, **options})

    return write


def test_ratings_are_shares_between_the_worst_and_the_best(folder):
    found = read(folder({"quality": 5, "watermark": 0.25}, {"quality": 1}, {"quality": None, "watermark": 1}))
    assert [s.scores[0] for s in found[:2]] == [1.0, 0.2] and [found[i].scores[1] for i in (0, 2)] == [0.75, 0.0]
    assert math.isnan(found[1].scores[1]) and math.isnan(found[2].scores[0])
    config = folder({"quality": 5, "watermark": 0.25}, {"quality": 1}, {"quality": None, "watermark": 1})
    assert unrated(found, config) == [
        "1 of 3 pictures have no 'quality': 2.png",
        "1 of 3 pictures have no 'watermark': 1.png",
    ]
    assert "quality: 2 pictures, 50% at the best, mean 0.60 of the way there" in inventory(found, config)


def test_csv_and_parquet_have_them_too(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,quality\na.png,a,4\n")
    config = Config(root=str(tmp_path), scores={"quality": (0, 5)})
    assert read(config)[0].scores == (0.8,)
    pandas, bytes_ = pytest.importorskip("pandas"), (tmp_path / "a.png").read_bytes()
    table = pandas.DataFrame({"image": [{"bytes": bytes_, "path": "a.png"}], "text": ["a"], "quality": [2.5]})
    table.to_parquet(tmp_path / "t.parquet")
    assert read(Config(root=str(tmp_path / "t.parquet"), scores={"quality": (0, 5)}))[0].scores == (0.5,)


@pytest.mark.parametrize("wrong", [6, -0.1, "much", True, [1], float("nan")])
def test_what_is_no_rating_is_named(folder, wrong):
    with pytest.raises(UserError, match=r"line 2: 'quality' is a number from 0 to 5, not "):
        read(folder({"quality": 1, "watermark": 0}, {"quality": wrong, "watermark": 0}))


def test_a_rating_that_no_picture_has_is_refused(folder):
    with pytest.raises(UserError, match=r"no picture of .* has a 'watermark': write it into metadata\.jsonl"):
        read(folder({"quality": 1}, {"quality": 2}))
    with pytest.raises(UserError, match="no picture of pocket/bumble has a 'quality'"):
        read(Config(root="pocket/bumble", scores={"quality": (0, 5)}))
    with pytest.raises(UserError, match=r"scores\.quality goes from 3 to 3, which rates nothing"):
        from_mapping(Config, {"root": "x", "scores": {"quality": [3, 3]}}, "data")


def test_rows_are_told_their_own_and_a_share_of_ratings_is_left_out(folder, model, tmp_path):
    config = folder({"quality": 5, "watermark": 0}, {"quality": 1, "watermark": 1}, score_dropout=0.0)
    rows = Rows(model, read(config), config, tmp_path / "cache")
    told = rows.collate([Pick(index=i, size=(32, 32), seed=i) for i in (1, 0)]).data["scores"]
    assert torch.equal(told, torch.tensor([[0.2, 0.0], [1.0, 1.0]]))
    config = folder({"quality": 5, "watermark": 0}, score_dropout=0.25)
    rows = Rows(model, read(config), config, tmp_path / "cache")
    picks = [Pick(index=0, size=(32, 32), seed=i) for i in range(400)]
    left = rows.collate(picks).data["scores"].isnan()
    assert 0.19 < left.float().mean() < 0.31 and 0.02 < left.all(1).float().mean() < 0.11
    assert torch.equal(left, rows.collate(picks).data["scores"].isnan())
    assert "scores" not in Rows(model, read(config), Config(root="x"), tmp_path / "cache").collate(picks[:1]).data


def test_prior_rows_are_told_nothing(folder, model, tmp_path):
    from dataclasses import replace

    config = folder({"quality": 5, "watermark": 0}, score_dropout=0.0)
    own = read(config)[0]
    rows = Rows(model, [own, replace(own, prior=True, scores=())], config, tmp_path / "cache")
    told = rows.collate([Pick(index=i, size=(32, 32), seed=i) for i in (0, 1)]).data["scores"]
    assert told[0].tolist() == [1.0, 1.0] and told[1].isnan().all()


def test_what_is_asked_is_the_best_unless_it_is_said():
    ranges = {"quality": (0.0, 5.0), "watermark": (1.0, 0.0)}
    assert asked(None, ranges) == [1.0, 1.0] and asked({"quality": 1, "watermark": None}, ranges) == [0.2, None]
    with pytest.raises(UserError, match=r"scores\.qualty: the adapter was told no such rating; did you mean 'quality'"):
        asked({"qualty": 1}, ranges)
    with pytest.raises(UserError, match=r"scores: 'quality' is a number from 0 to 5, not 7"):
        asked({"quality": 7}, ranges)


def test_spoilt_scenes_are_rated_as_they_look():
    spec = from_mapping(Spec, {"source": "procedural", "world": "scenes", "spoilt": 0.5, "count": 60, "seed": 3})
    made = samples(spec, "set", trigger="sks", class_noun="circle", ranges=RATINGS)
    preflight(made)
    scores = np.array([s.scores for s in made])
    assert all(0.3 < share < 0.7 for share in (scores == 1).mean(0))
    pictures = [np.asarray(s.sources["image"].open()) for s in made]
    for sample, picture, (faithful, clean) in zip(made, pictures, scores, strict=True):
        if clean == 1:
            assert oracle.matches(picture, sample.caption) == bool(faithful)
    rough = [np.abs(np.diff(picture.astype(float), axis=0)).mean() for picture in pictures]
    assert np.corrcoef(rough, scores[:, 1])[0, 1] < -0.8
    with pytest.raises(UserError, match="spoilt is of plain pictures of the worlds scenes and edits"):
        from_mapping(Spec, {"source": "procedural", "world": "style", "spoilt": 0.5})
