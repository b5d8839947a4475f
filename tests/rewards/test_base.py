"""Every call of a reward is checked, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from visiontune.errors import UserError
from visiontune.rewards.base import Reward, as_reward

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_plain_function_becomes_a_reward() -> None:
    def brightness(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
        return images.mean((1, 2, 3)).double()

    brightness.differentiable = True
    brightness.range = (0.0, 1.0)
    reward = as_reward(brightness, "brightness")
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable, reward.range) == ("brightness", True, (0.0, 1.0))
    images = IMAGES.clone().requires_grad_()
    scores = reward(images, ["a", "b"])
    assert scores.dtype == torch.float32
    scores.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 192))


def test_a_reward_that_is_not_differentiable_builds_no_graph() -> None:
    reward = as_reward(lambda images, prompts, meta: images.mean((1, 2, 3)), "plain")
    assert not reward(IMAGES.clone().requires_grad_(), ["a", "b"]).requires_grad


def test_lists_and_arrays_of_scores_are_taken() -> None:
    assert as_reward(lambda *_: [1, 2], "list")(IMAGES, ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda *_: torch.tensor([0.0, math.nan]), r"not finite for 1 of 2 images \(first: image 1\)"),
        (lambda *_: torch.tensor([math.inf, 0.0]), "not finite"),
        (lambda *_: torch.zeros(2, 1), r"shape \[2, 1\]; it must be one score an image, \[2\]"),
        (lambda *_: torch.tensor(1.0), r"shape \[\]"),
        (lambda *_: torch.zeros(3), r"shape \[3\]"),
        (lambda *_: None, "returned a NoneType"),
    ],
)
def test_bad_scores_are_refused(function: Callable, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        as_reward(function, "mine")(IMAGES, ["a", "b"])
    assert "'mine'" in str(caught.value)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES * 2 - 1, r"images in \[0, 1\]"),
        (IMAGES * 255, r"images in \[0, 1\]"),
        (IMAGES * math.nan, r"images in \[0, 1\]"),
        ((IMAGES * 255).byte(), "takes float images"),
        (IMAGES[0], "takes float images"),
        (IMAGES[:1], "1 images and 2 prompts"),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        as_reward(lambda images, *_: torch.zeros(len(images)), "mine")(images, ["a", "b"])


def test_a_small_overshoot_of_decoded_images_is_let_through() -> None:
    as_reward(lambda images, *_: torch.zeros(len(images)), "mine")(IMAGES * 1.2 - 0.1, ["a", "b"])


def test_what_cannot_be_called_is_no_reward() -> None:
    with pytest.raises(UserError, match="built a int"):
        as_reward(3, "three")
