"""What a reward is, and the checks around every call of one.

A reward module has a ``Config`` and ``build(config)``, which returns a :class:`Reward` or any function of the same
arguments. Higher is better. One from outside the package is given copies, so that it cannot change what others see.
"""

from __future__ import annotations

import copy
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from visiontune import plugin
from visiontune.errors import UserError

Meta = Sequence[Mapping[str, Any]] | None

# Decoded images overshoot [0, 1] a little and must keep their gradient; [-1, 1] and [0, 255] overshoot a lot.
_SLACK = 0.3


class WrongAnswer(UserError):
    """What a reward returned are no scores, whatever the images: it is the reward that has to be mended."""


class Reward(ABC):
    """Scores images of shape ``[b, 3, h, w]`` in [0, 1], or clips ``[b, f, 3, h, w]`` where it says so."""

    name: str = "reward"
    differentiable: bool = False
    """Whether gradients reach the pixels."""
    clips: bool = False
    """Whether it scores clips as well."""
    groupwise: bool = False
    """Whether a score depends on the other images of the batch."""
    range: tuple[float, float] = (float("-inf"), float("inf"))
    """Least and greatest score possible."""
    terms: Mapping[str, Tensor] = MappingProxyType({})
    """Raw scores ``[b]`` of the latest call by term, for a reward that is made of others."""
    weights: Mapping[str, float] = MappingProxyType({})
    """Factor of each term, by the same names."""
    _reached: bool = False
    """Whether a gradient of it was seen to reach the pixels."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        """The scores ``[b]``; images and prompts have been checked."""

    def __call__(self, images: Tensor, prompts: Sequence[str], meta: Meta = None) -> Tensor:
        """Score a batch.

        Args:
            images: ``[b, 3, h, w]`` in [0, 1] (a small overshoot is let through), or clips ``[b, f, 3, h, w]``.
            prompts: b texts.
            meta: b mappings with whatever the data set knows of each image, for rewards that use it.

        Returns:
            ``float32 [b]`` on the images' device, finite; with a graph where the reward is differentiable.

        Raises:
            UserError: wrong shape or value range going in; wrong shape, or a number that is not finite, coming out; a
                reward from outside raised anything, or calls itself differentiable and is not.
        """
        check_images(images, prompts, self.name, self.clips)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
            if plugin.is_own(self._code):
                return check_scores(self.score(images, prompts, meta), images, self.name)
            seen = images.clone()
            pixels = seen.grad_fn  # of the copy: whatever is done to it in place is done after this
            with plugin.guarded(self._code, f"reward '{self.name}', called with (images, prompts, meta),"):
                answer = self.score(seen, list(prompts), copy.deepcopy(meta))
                scores = check_scores(answer, images, self.name)
        if pixels is not None and not self._reached:
            if not _leads_to(scores.grad_fn, pixels):
                raise WrongAnswer(
                    f"reward '{self.name}' says that it is differentiable, but no gradient of its scores reaches the "
                    "images: compute them from images by torch alone (no detach, item, numpy or bytes), or leave "
                    "differentiable out"
                )
            self._reached = True
        return scores

    @property
    def _code(self) -> Any:
        """What runs when images are scored."""
        return type(self)


class FunctionReward(Reward):
    """A plain function ``(images, prompts, meta) -> [b]`` as a reward; its attributes are taken over."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.clips = bool(getattr(function, "clips", False))
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.range = getattr(function, "range", Reward.range)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        return self.function(images, prompts, meta)

    @property
    def _code(self) -> Any:
        return self.function


def score_each(
    reward: Reward, images: Tensor, prompts: Sequence[str], meta: Meta = None
) -> tuple[dict[str, list[float]], dict[int, str]]:
    """Scores of a batch whatever single images do to the reward, which may raise anything.

    A reward that fails on a batch is asked for its images one by one, unless it compares them or is wrong itself.

    Args:
        images, prompts, meta: as of a call.

    Returns:
        Scores by column, NaN where there is none: the reward's own, and `<name>/<term>` for each term of a mix; and why
        the images that have none have none, by their place.
    """
    try:
        found = reward(images, prompts, meta)
    except Exception as error:  # hours of other scores must outlive it
        if len(images) > 1 and not reward.groupwise and not isinstance(error, WrongAnswer):
            return _one_by_one(reward, images, prompts, meta)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = textwrap.shorten(f"{kind}{error}", 300)
        return {reward.name: [math.nan] * len(images)}, dict.fromkeys(range(len(images)), reason)
    columns = {reward.name: found, **{f"{reward.name}/{term}": values for term, values in reward.terms.items()}}
    return {name: values.tolist() for name, values in columns.items()}, {}


def _one_by_one(
    reward: Reward, images: Tensor, prompts: Sequence[str], meta: Meta
) -> tuple[dict[str, list[float]], dict[int, str]]:
    columns: dict[str, list[float]] = {}
    reasons: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        own, trouble = score_each(reward, images[i : i + 1], [prompt], None if meta is None else [meta[i]])
        for name, values in own.items():
            columns.setdefault(name, [math.nan] * len(images))[i] = values[0]
        if trouble:
            reasons[i] = trouble[0]
    return columns, reasons


def as_reward(built: Any, name: str) -> Reward:
    """What a reward module built, as a :class:`Reward` called ``name``.

    Raises:
        UserError: it cannot be called.
    """
    if not callable(built):
        raise UserError(f"reward '{name}' built a {type(built).__name__}, which cannot be called with images")
    reward = built if isinstance(built, Reward) else FunctionReward(built, name)
    reward.name = name
    return reward


def check_images(images: Tensor, prompts: Sequence[str], name: str, clips: bool = False) -> None:
    """Raise :class:`UserError` unless images are ``[b, 3, h, w]`` about [0, 1] with one prompt each, or such clips."""
    if images.ndim not in (4, 4 + clips) or images.shape[-3] != 3 or not images.is_floating_point():
        raise UserError(f"reward '{name}' takes float images [b, 3, h, w], not {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images):
        raise UserError(f"reward '{name}' was given {len(images)} images and {len(prompts)} prompts")
    if not len(images):
        raise UserError(f"reward '{name}' was given no images")
    low, high = images.detach().aminmax()
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise UserError(f"reward '{name}' takes images in [0, 1]; these span [{float(low):.3g}, {float(high):.3g}]")


def check_scores(scores: Any, images: Tensor, name: str) -> Tensor:
    """Scores as ``float32 [b]`` on the images' device, with their graph.

    Args:
        scores: a tensor, or numbers or tensors of one number each in a sequence or an array.
        images: what was scored. name: the reward's.

    Raises:
        WrongAnswer: they are something else, or not one number an image.
        UserError: one is not finite.
    """
    if not isinstance(scores, Tensor):
        try:
            scores = _stacked(scores)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongAnswer(f"reward '{name}' returned a {type(scores).__name__}, not a tensor of scores") from error
    if scores.is_complex() or scores.is_quantized or scores.layout != torch.strided or scores.is_meta:
        raise WrongAnswer(
            f"reward '{name}' returned a tensor of {scores.dtype}, {scores.layout}, on {scores.device}: scores must be "
            "real numbers in a dense tensor"
        )
    if scores.shape != (len(images),):
        raise WrongAnswer(
            f"reward '{name}' returned shape {list(scores.shape)}; it must be one score an image, [{len(images)}]"
        )
    scores = scores.to(images.device, torch.float32)
    bad = (~torch.isfinite(scores.detach())).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"reward '{name}' is not finite for {len(bad)} of {len(images)} images (first: image {bad[0]})")
    return scores


def _stacked(scores: Any) -> Tensor:
    """A sequence of numbers as a tensor; that of tensors keeps their graphs, which ``torch.as_tensor`` would cut."""
    if isinstance(scores, list | tuple) and any(isinstance(score, Tensor) for score in scores):
        return torch.stack([torch.as_tensor(score).reshape(()) for score in scores])
    return torch.as_tensor(scores)


def _leads_to(start: Any, goal: Any) -> bool:
    """Whether a gradient goes from one node of the graph to another."""
    seen, ahead = set(), [start]
    while ahead:
        node = ahead.pop()
        if node is goal:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [follower for follower, _ in node.next_functions]
    return False
