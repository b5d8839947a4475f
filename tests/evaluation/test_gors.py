"""GORS: what is kept of a model's pictures, and that each counts in the loss as it scored."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visiontune.data.base import Config
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation import compose, compose_pocket, compose_words, gors
from visiontune.evaluation.compose import Task, Verdict


def judge(pictures, tasks):
    return [Verdict(right=float(task.phrases[0]), graded=0) for task in tasks]


def test_pictures_above_the_threshold_are_written_with_their_scores(monkeypatch, tmp_path):
    scores = [0.9, 0.5, 0.25, 0.75]
    tasks = [Task(category="colour", prompt=f"p{i}", phrases=(str(score),)) for i, score in enumerate(scores)]
    drawn = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    monkeypatch.setattr(compose, "images", lambda *_, **__: drawn)
    model = SimpleNamespace(source="m")
    assert gors.draw(model, tasks, judge, tmp_path / "data", threshold=0.5) == 2
    found = read(Config(root=str(tmp_path / "data"), weight_column="weight"))
    assert [(s.caption, s.weight) for s in found] == [("p0", 0.9), ("p3", 0.75)]
    assert np.asarray(found[1].sources["image"].open())[0, 0, 0] == 3
    with pytest.raises(UserError, match="data"):
        gors.draw(model, tasks, judge, tmp_path / "data")
    with pytest.raises(UserError, match=r"none of 4 pictures scores above 0\.95"):
        gors.draw(model, tasks, judge, tmp_path / "none", threshold=0.95)
    assert not (tmp_path / "none").exists()


def test_what_is_trained_on_is_not_what_is_evaluated():
    evaluated = {task.prompt for task in compose_pocket.tasks(4)}
    assert not evaluated & {task.prompt for task in compose_pocket.tasks(4, holdout=False)}
    known = {task.prompt for task in compose_words.tasks(30)}
    assert not known & {task.prompt for task in compose_words.tasks(30, seed=1, without=known)}


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")

    def write(*weights):
        lines = [{"file_name": f"{i}.png", "text": "a", "score": weight} for i, weight in enumerate(weights)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Config(root=str(tmp_path), weight_column="score")

    return write


@pytest.mark.parametrize("weight", [0, -1, None, "much", True, float("nan"), [1]])
def test_a_weight_that_is_none_is_one_line(folder, weight):
    with pytest.raises(UserError, match=r"line 2: the weight of a picture is a number above 0"):
        read(folder(1.5, weight))


def test_weights_are_read_where_they_are_named_and_not_otherwise(folder, tmp_path):
    config = folder(1.5, "0.5")
    assert [sample.weight for sample in read(config)] == [1.5, 0.5]
    assert [sample.weight for sample in read(Config(root=config.root))] == [1, 1]
    table = tmp_path / "metadata.csv"
    (tmp_path / "metadata.jsonl").unlink()
    table.write_text("file_name,text,score\n0.png,a,2\n1.png,b,3\n")
    assert [sample.weight for sample in read(config)] == [2, 3]
    table.unlink()
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("a")
    with pytest.raises(UserError, match=r"has no metadata\.jsonl or metadata\.csv with 'score'"):
        read(config)
    with pytest.raises(UserError, match="have no weights"):
        read(Config(root="pocket/bumble", weight_column="score"))
