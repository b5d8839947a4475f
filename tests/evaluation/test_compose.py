"""Compositional evaluation: what its scores are, on pictures and verdicts that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visiontune.errors import UserError
from visiontune.evaluation import compose, compose_pocket, compose_words
from visiontune.evaluation.compose import Task, Verdict
from visiontune.pocket.asked import shown
from visiontune.pocket.scenes import held_out
from visiontune.pocket.world import Scene, Thing, render
from visiontune.rewards.base import FunctionReward


@pytest.fixture(scope="module")
def pocket() -> list[Task]:
    return compose_pocket.tasks(3)


def drawn(*things: tuple[str, str, float, float], texture: str = "plain") -> np.ndarray:
    made = [Thing(shape=s, color=c, x=x, y=y, radius=9.0) for c, s, x, y in things]
    return render(Scene(things=tuple(made), texture=texture))


def test_prompts_are_held_out_and_each_once_and_more_of_them_begin_alike(pocket):
    assert [sum(task.category == name for task in pocket) for name in compose_pocket.CATEGORIES] == [3] * 8
    assert all(held_out(task.prompt) for task in pocket) and len({task.prompt for task in pocket}) > 20
    assert [t.prompt for t in compose_pocket.tasks(2)] == [t.prompt for i, t in enumerate(pocket) if i % 3 < 2]


def test_the_oracle_knows_right_from_wrong_in_every_category(pocket):
    right, wrong = (
        np.stack([make() for make in made]) for made in zip(*[(t.truth, t.wrong) for t in pocket], strict=True)
    )
    for row in compose.judged("truth", pocket, right, compose_pocket.Oracle()).rows:
        assert (row.right, row.graded, row.truth, row.wrong) == (1, 1, 1, 0) and row.shuffled < 0.5, row
    for row in compose.judged("wrong", pocket, wrong, compose_pocket.Oracle()).rows:
        assert row.right == 0 and row.graded < 1, row


def test_what_is_shown_is_told_in_parts():
    two = "a red star left of a blue heart on a light plain background"
    found = shown(drawn(("red", "star", 16, 32), ("blue", "heart", 48, 32)), two)
    assert found.everything and found.things == (True, True) and found.relation and found.ground == (True, True)
    turned = shown(drawn(("red", "star", 48, 32), ("blue", "heart", 16, 32), texture="striped"), two)
    assert turned.things == (True, True) and not turned.relation and turned.ground == (True, False)
    # A picture's one star cannot be both of those that are asked for.
    alike = shown(drawn(("red", "star", 16, 32), ("blue", "heart", 48, 32)), "two red stars")
    assert sum(alike.things) == 1 and alike.count and not alike.everything
    assert shown(drawn(("red", "star", 16, 32)), "a blue circle").things == (False,)
    assert not shown(drawn(), "a blue circle").count


@pytest.mark.parametrize(
    ("category", "prompt", "things", "right", "graded"),
    [
        # As the paper's questions, colours overlook what else is there; three objects do not.
        ("colour", "a red star and a blue heart", ["red star", "blue heart", "pink cross"], 1, 1),
        ("three", "a red star and a blue heart", ["red star", "blue heart", "pink cross"], 0, 1),
        ("colour", "a red star and a blue heart", ["blue star", "blue heart"], 0, 0.5),
        ("spatial", "a red star right of a blue heart", ["red star", "blue heart"], 0, 0.5),
        ("spatial", "a red star left of a blue heart", ["red star", "pink heart"], 0, 0.25),
        ("numeracy", "three red stars", ["red star", "red star"], 0, 0.5),
        ("numeracy", "two red stars", ["red star", "red star"], 1, 1),
        ("numeracy", "two red stars", ["pink star"], 0, 0),
    ],
)
def test_scores_are_those_of_the_paper(category, prompt, things, right, graded):
    places = [(14, 20), (50, 20), (32, 50)]
    picture = drawn(*[(*thing.split(), *at) for thing, at in zip(things, places, strict=False)])
    (found,) = compose_pocket.Oracle()(picture[None], [Task(category=category, prompt=prompt)])
    assert found == Verdict(right=right, graded=graded)


def _reports(ones: list[float], others: list[float]) -> list[compose.Report]:
    tasks = [Task(category="ab"[i % 2], prompt=str(i)) for i in range(len(ones))]
    made = []
    for name, values in (("one", ones), ("other", others)):
        verdicts = [Verdict(right=value, graded=value) for value in values]
        lookup = dict(zip([task.prompt for task in tasks], verdicts, strict=True))
        pictures = np.zeros((len(ones), 2, 2, 3), np.uint8)
        made.append(compose.judged(name, tasks, pictures, lambda _, asked, own=lookup: [own[t.prompt] for t in asked]))
    return made


def test_differences_are_paired_and_of_the_same_pictures_zero():
    rng = np.random.default_rng(0)
    values = rng.random(80).tolist()
    one, same = _reports(values, values)
    assert all((d.mean, d.low, d.high) == (0, 0, 0) for d in compose.differences(one, same))
    # Much the same everywhere: a pair tells what two means with their errors would not.
    better, base = _reports([v + 0.1 + 0.01 * rng.random() for v in values], values)
    for found in compose.differences(better, base):
        assert 0.1 < found.low <= found.mean <= found.high < 0.11
    assert base.rows[0].error > 0.04
    assert base.rows[0].right == pytest.approx(np.mean(values[::2])) and base.rows[0].truth is None
    # A coin's mean over 40 prompts, by the normal approximation.
    coin, nothing = _reports([float(i // 2 % 2) for i in range(80)], [0.0] * 80)
    for found in compose.differences(coin, nothing):
        assert found.mean == 0.5
        assert (found.low, found.high) == (pytest.approx(0.345, abs=0.03), pytest.approx(0.655, abs=0.03))
    with pytest.raises(ValueError, match="same prompts"):
        compose.differences(better, _reports([1.0], [1.0])[0])


class Words(FunctionReward):
    """A probability for each phrase that it knows."""

    def __init__(self, **known: float) -> None:
        super().__init__(lambda images, prompts, meta: torch.tensor([known[p] for p in prompts]), "words")
        self.range = (0.0, 1.0)


def test_a_reward_in_0_to_1_is_asked_for_each_phrase_and_gives_their_product():
    tasks = [Task(category="colour", prompt="ab", phrases=("a", "b")), Task(category="colour", prompt="c")]
    pictures = np.zeros((2, 2, 2, 3), np.uint8)
    judge = compose_words.ByReward(Words(a=0.9, b=0.5, c=0.25, ab=0.75), batch_size=2)
    first, second = judge(pictures, tasks)
    assert (first.right, first.graded) == (pytest.approx(0.45), pytest.approx(0.7))
    assert second == Verdict(right=0.25, graded=0.25)
    judge.asks = False
    assert judge(pictures, tasks)[0].right == 0.75
    crowd = Words()
    crowd.groupwise = True
    with pytest.raises(UserError, match="compares the pictures"):
        compose_words.ByReward(crowd)


def test_everyday_prompts_hold_their_phrases():
    found = compose_words.tasks(20)
    assert list(dict.fromkeys(task.category for task in found)) == list(compose.CATEGORIES)
    assert all(phrase in task.prompt for task in found for phrase in task.phrases)
    assert [t.prompt for t in compose_words.tasks(20)] == [t.prompt for t in found]
    assert len({t.prompt for t in found}) == 120


def test_a_file_of_prompts_is_read_and_its_bad_lines_are_named(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"category": "x", "prompt": "a b", "phrases": ["a"]}\n\n{"category": "y", "prompt": "c"}\n')
    one, other = compose_words.read_tasks(file)
    assert (one.category, one.phrases, other.phrases) == ("x", ("a",), ())
    for line in (
        "[]",
        '{"prompt": "a"}',
        '{"category": "x", "prompt": "a", "phrase": []}',
        '{"category": "x", "prompt": " "}',
    ):
        file.write_text(line)
        with pytest.raises(UserError, match=r"own\.jsonl line 1 is no prompt of a category"):
            compose_words.read_tasks(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="empty"):
        compose_words.read_tasks(file)


def test_every_model_draws_the_same_prompts_from_the_same_noise(monkeypatch, pocket):
    asked = []

    def images(model, prompts, seeds, **options):
        asked.append((prompts, seeds))
        return np.stack([task.truth() for task in pocket])

    monkeypatch.setattr(compose, "images", images)
    report = compose.evaluate(SimpleNamespace(source="m"), pocket, compose_pocket.Oracle())
    compose.evaluate(SimpleNamespace(source="n"), pocket, compose_pocket.Oracle())
    assert asked[0] == asked[1] and len(set(asked[0][1])) == len(pocket)
    assert report.model == "m" and "three" in report.table() and len(report.written()["pictures"]) == len(pocket)
    with pytest.raises(UserError, match="no prompts"):
        compose.evaluate(SimpleNamespace(source="m"), [], compose_pocket.Oracle())
