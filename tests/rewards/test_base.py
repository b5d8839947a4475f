"""Every call of a reward is checked, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from visiontune.errors import UserError
from visiontune.rewards.base import Reward, WrongAnswer, as_reward

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
    "answer",
    [
        lambda images: images.mean((1, 2, 3)) * 1j,
        lambda images: images.mean((1, 2, 3)).to_sparse(),
        lambda images: images.mean((1, 2, 3)).to("meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_scores_are_real_numbers_in_a_dense_tensor(answer: Callable) -> None:
    with pytest.raises(WrongAnswer, match="must be real numbers in a dense tensor"):
        as_reward(lambda images, *_: answer(images), "mine")(IMAGES, ["a", "b"])


def test_what_is_finite_in_double_precision_alone_is_refused() -> None:
    with pytest.raises(UserError, match="not finite for 2 of 2"):
        as_reward(lambda *_: torch.tensor([1e300, 1e300], dtype=torch.float64), "mine")(IMAGES, ["a", "b"])


class Mine(Reward):
    name = "mine"

    def __init__(self, run: Callable) -> None:
        self.run = run

    def score(self, images, prompts, meta):
        return self.run(images, prompts, meta)


@pytest.mark.parametrize("kind", [Mine, lambda run: as_reward(run, "mine")], ids=["class", "function"])
@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda *_: 1 / 0, r"raised ZeroDivisionError: division by zero \(test_base.py, line \d+\)"),
        (lambda *_: exit(0), r"called exit\(0\)"),
        (lambda *_: next(iter(())), "raised StopIteration"),
        (lambda images, prompts: images, "raised TypeError: .*takes 2 positional arguments but 3 were given"),
    ],
)
def test_what_a_reward_from_outside_raises_is_one_line(kind: Callable, run: Callable, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        kind(run)(IMAGES, ["a", "b"])
    assert str(error.value).startswith("reward 'mine', called with (images, prompts, meta), ")


def test_an_interruption_passes() -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_reward(interrupted, "mine")(IMAGES, ["a", "b"])


def test_a_list_of_tensors_keeps_its_gradient() -> None:
    def last(images: torch.Tensor, *_: object) -> list[torch.Tensor]:
        return [image[2].mean()[None] for image in images]

    last.differentiable = True
    images = IMAGES.clone().requires_grad_()
    scores = as_reward(last, "last")(images, ["a", "b"])
    torch.testing.assert_close(scores, IMAGES[:, 2].mean((1, 2)))
    scores.sum().backward()
    torch.testing.assert_close(images.grad[:, 2], torch.full((2, 8, 8), 1 / 64))


@pytest.mark.parametrize(
    "cut",
    [
        lambda images: images.detach(),
        lambda images: torch.from_numpy(images.detach().numpy()),
        lambda images: images.detach() * torch.ones((), requires_grad=True),
    ],
    ids=["detach", "numpy", "other graph"],
)
def test_a_gradient_that_does_not_reach_the_pixels_is_found_at_the_first_call(cut: Callable) -> None:
    def liar(images: torch.Tensor, *_: object) -> torch.Tensor:
        return cut(images).mean((1, 2, 3))

    liar.differentiable = True
    reward = as_reward(liar, "liar")
    reward(IMAGES, ["a", "b"])  # nobody asks for a gradient
    with pytest.raises(WrongAnswer, match="'liar' says that it is differentiable, but no gradient"):
        reward(IMAGES.clone().requires_grad_(), ["a", "b"])


def test_what_a_reward_does_to_its_arguments_stays_with_it() -> None:
    def careless(images: torch.Tensor, prompts: list[str], meta: list[dict]) -> torch.Tensor:
        images.mul_(0.5)
        prompts.append("more")
        meta[0]["seen"][0] = True
        return images.mean((1, 2, 3))

    careless.differentiable = True
    images, prompts, meta = IMAGES.clone().requires_grad_(), ["a", "b"], [{"seen": [False]}, {}]
    scores = as_reward(careless, "careless")(images, prompts, meta)
    assert torch.equal(images, IMAGES) and prompts == ["a", "b"] and meta == [{"seen": [False]}, {}]
    scores.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 0.5 / 192))


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
