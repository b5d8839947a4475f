"""Reports of what is told apart, against judges whose scores are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.errors import UserError
from visiontune.evaluation.contrast import Report, better, compared, on_pictures, top
from visiontune.models.contrastive import Features

CAPTIONS = ["a red cup left of a blue cup", "a green dog", "two birds", "a black horse", "a white horse", "a tall tree"]


class Judge:
    """Knows captions by heart: the first pixel of a picture is the number of its own."""

    source, resolution, device = "judge", 8, torch.device("cpu")

    def __init__(self, sees=True, known=CAPTIONS) -> None:
        self.sees, self.known = sees, list(known)

    def image_features(self, images):
        numbers = (images[:, 0, 0, 0] * 255).round().long()
        if not self.sees:
            numbers = torch.zeros_like(numbers)
        return Features(pooled=torch.eye(16)[numbers], dense=torch.zeros(len(images), 1, 16))

    def text_features(self, prompts):
        numbers = torch.tensor([self.known.index(p) if p in self.known else 15 for p in prompts])
        return Features(
            pooled=torch.eye(16)[numbers if self.sees else numbers * 0], dense=torch.zeros(len(prompts), 1, 16)
        )


def pictures(count):
    return [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(count)]


def rows_of(judge, captions=CAPTIONS):
    return {row["what"]: row for row in on_pictures(judge, pictures(len(captions)), captions).rows}


def test_a_judge_that_sees_is_right_and_one_that_does_not_scores_chance():
    seen, blind = rows_of(Judge()), rows_of(Judge(sees=False))
    assert all(row["value"] == 1 for row in seen.values())
    for name, row in blind.items():
        assert row["value"] == pytest.approx(row["chance"]), name
    assert {row["kind"] for row in seen.values()} == {"retrieval", "composition"}
    assert seen["caption of a picture, top-1 of 6"]["chance"] == pytest.approx(1 / 6)
    assert seen["picture of a caption, top-5 of 6"]["chance"] == pytest.approx(5 / 6)


def test_what_captions_give_away_is_told_beside_the_score():
    """A judge that likes every true caption, whatever it is shown."""

    class Reader(Judge):
        def text_features(self, prompts):
            true = torch.tensor([float(prompt in CAPTIONS) for prompt in prompts])
            return Features(pooled=torch.stack([true, 1 - true], 1), dense=torch.zeros(len(prompts), 1, 2))

        def image_features(self, images):
            return Features(
                pooled=torch.tensor([[1.0, 0.0]]).expand(len(images), 2), dense=torch.zeros(len(images), 1, 2)
            )

    row = rows_of(Reader())["its caption, not one with words replaced"]
    assert row["value"] == row["blind"] == 1


def test_equal_captions_are_all_right():
    captions = ["a dog", "a dog", "a cat"]
    found = on_pictures(Judge(known=["a dog", "", "a cat"]), pictures(3), captions)
    row = next(row for row in found.rows if row["what"] == "caption of a picture, top-1 of 2")
    assert row["value"] == pytest.approx(5 / 6)  # the second picture is none that it knows: a guess among two
    assert row["chance"] == 1 / 2


@pytest.mark.parametrize("most", [1, 2, 3])
def test_ties_are_broken_by_chance(most):
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    truth = torch.tensor([[False, False, True, True, False], [False, True, False, False, False]])
    found = top(scores, truth, most)
    for row in range(2):
        hits = []
        for order in itertools.permutations(range(5)):
            ranked = sorted(order, key=lambda i: -float(scores[row, i]))  # a stable sort keeps the order of ties
            hits.append(bool(truth[row, ranked[:most]].any()))
        assert float(found[row]) == pytest.approx(np.mean(hits))


def test_a_tie_of_two_captions_is_half_right():
    assert better(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_one_caption_for_all_is_refused():
    with pytest.raises(UserError, match="two different ones"):
        on_pictures(Judge(), pictures(2), ["a dog", "a dog"])


def test_means_are_of_each_kind_and_compared():
    rows = [{"what": "a", "kind": "x", "n": 1, "value": 0.5, "chance": 0.1}]
    more = [{**rows[0], "value": 0.75}, {**rows[0], "what": "b", "kind": "y", "blind": 0.2}]
    report, base = Report(model="new", rows=more), Report(model="old", rows=[*rows, {**more[1], "value": 0.4}])
    assert report.summary() == {"x": 0.75, "y": 0.5}
    assert compared(report, base) == "new beside old: x +0.250, y +0.100"
    assert "    -" in report.table() and "means: x 0.750, y 0.500" in report.table()
