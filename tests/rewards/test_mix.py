"""Weighted sums of rewards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from visiontune.errors import UserError
from visiontune.rewards.loading import load
from visiontune.rewards.mix import Statistics

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "a", "b", "b"]
RED = {"reward": "color", "options": {"color": "red", "measure": "channel"}}


def _mix(*terms: Any):
    return load({"name": "mix", "terms": list(terms)})


def test_raw_and_declared_terms_add_up_and_are_kept_for_the_log() -> None:
    mix = _mix(
        {**RED, "weight": 2},
        {"reward": "brightness", "weight": -0.5, "normalise": "declared", "mean": 0.4, "std": 0.1},
    )
    red, bright = IMAGES[:, 0].mean((1, 2)), load("brightness")(IMAGES, PROMPTS)
    torch.testing.assert_close(mix(IMAGES, PROMPTS), 2 * red - 0.5 * (bright - 0.4) / 0.1)
    assert list(mix.terms) == ["color", "brightness"]
    torch.testing.assert_close(mix.terms["color"], red)
    torch.testing.assert_close(mix.terms["brightness"], bright)
    assert mix.range == pytest.approx((0 - 0.5 * 6, 2 + 0.5 * 4))


def test_gradients_are_those_of_the_sum_if_all_terms_have_them() -> None:
    mix = _mix({**RED, "weight": 2}, "brightness")
    assert mix.differentiable and not mix.groupwise
    images = IMAGES.clone().requires_grad_()
    mix(images, PROMPTS).sum().backward()
    expected = torch.tensor([2 + 0.299, 0.587, 0.114]).view(1, 3, 1, 1) / 256
    torch.testing.assert_close(images.grad, expected.expand_as(images))
    assert not any(scores.requires_grad for scores in mix.terms.values())
    blind = _mix("brightness", "jpeg")
    assert not blind.differentiable
    assert not blind(images, PROMPTS).requires_grad


def test_running_scale_is_that_of_all_scores_so_far() -> None:
    mix = _mix({"reward": "brightness", "normalise": "running"})
    assert mix.groupwise and mix.range == (-math.inf, math.inf)
    raw = load("brightness")(IMAGES, PROMPTS)
    first = mix(IMAGES[:3], PROMPTS[:3])
    torch.testing.assert_close(first, (raw[:3] - raw[:3].mean()) / raw[:3].std(correction=0))
    second = mix(IMAGES[3:], PROMPTS[3:])
    torch.testing.assert_close(second, (raw[3:] - raw.mean()) / raw.std(correction=0))


def test_running_scale_survives_a_restart() -> None:
    whole, early, late = (_mix({"reward": "brightness", "normalise": "running"}) for _ in range(3))
    for mix in (whole, early):
        mix(IMAGES[:3], PROMPTS[:3])
    late.load_state_dict(early.state_dict())
    assert torch.equal(late(IMAGES[1:], PROMPTS[1:]), whole(IMAGES[1:], PROMPTS[1:]))
    with pytest.raises(UserError, match="do not fit"):
        late.load_state_dict({})


def test_equal_scores_give_zero_and_not_noise() -> None:
    mix = _mix({"reward": "brightness", "normalise": "running"})
    same = IMAGES[:1] + torch.tensor([0, 1e-7, 3e-7]).view(3, 1, 1, 1)
    assert mix(same, ["a"] * 3).abs().max() < 1e-6


def test_statistics_do_not_depend_on_how_numbers_are_batched() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1000
    statistics = Statistics()
    for part in values.split([1, 7, 20, 22]):
        statistics.add(part)
    assert statistics.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)


def test_a_failing_term_leaves_no_trace(tmp_path) -> None:
    (tmp_path / "bad.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    pass\n"
        "def build(config):\n    return lambda images, prompts, meta: [float('nan')] * len(images)\n"
    )
    mix = _mix({"reward": "brightness", "normalise": "running"}, str(tmp_path / "bad.py"))
    with pytest.raises(UserError, match=r"bad.*not finite"):
        mix(IMAGES, PROMPTS)
    assert mix.state_dict()["brightness"]["count"] == 0 and not mix.terms


def test_a_groupwise_term_makes_the_mix_groupwise_and_twins_are_told_apart() -> None:
    mix = _mix("diversity", "jpeg", {"reward": "jpeg", "options": {"quality": 20}})
    assert mix.groupwise
    mix(IMAGES, PROMPTS)
    assert list(mix.terms) == ["diversity", "jpeg#1", "jpeg#2"]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([], "needs terms"),
        # Neither a checkpoint nor the guards would see its running scale.
        ([{"reward": "mix", "options": {"terms": [{"reward": "jpeg", "normalise": "running"}]}}], "itself a mix"),
        (["brightnes"], r"terms\[0\]\.name.*did you mean 'brightness'"),
        ([{"reward": "brightness", "std": 2}], "where normalise is declared"),
        ([{"reward": "brightness", "normalise": "declared", "std": 0}], r"std must be a number above 0"),
        ([{"reward": "color", "options": {"colour": "red"}}], "did you mean 'color'"),
    ],
)
def test_bad_terms_are_refused(terms: list, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _mix(*terms)


OUTSIDE = """
from dataclasses import dataclass

@dataclass
class Config: ...

def build(config):
    def score(images, prompts, meta):
        {0}
    score.differentiable = True
    return score
"""


def test_a_term_from_outside_has_its_gradient_and_leaves_the_pictures_to_the_next(tmp_path) -> None:
    (tmp_path / "blue.py").write_text(OUTSIDE.format("return [image[2].mean() for image in images.mul_(0.5)]"))
    images = IMAGES.clone().requires_grad_()
    mix = _mix({"reward": str(tmp_path / "blue.py"), "weight": 100}, RED)
    mix(images, PROMPTS).sum().backward()
    torch.testing.assert_close(images.grad[0].mean((1, 2)) * 256, torch.tensor([1.0, 0.0, 50.0]))
    torch.testing.assert_close(mix.terms["color"], IMAGES[:, 0].mean((1, 2)))
    assert torch.equal(images, IMAGES)


def test_a_term_without_the_gradient_that_it_promises_is_named(tmp_path) -> None:
    (tmp_path / "liar.py").write_text(OUTSIDE.format("return images.detach().mean((1, 2, 3))"))
    with pytest.raises(UserError, match=r"reward '.*liar\.py' says that it is differentiable"):
        _mix(str(tmp_path / "liar.py"), RED)(IMAGES.clone().requires_grad_(), PROMPTS)
