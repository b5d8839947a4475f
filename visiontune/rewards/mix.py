"""A weighted sum of other rewards, each raw, or brought to one scale first.

``sum_k w_k (s_k - mean_k) / std_k``. The mean and standard deviation are declared (measure them once, on pictures of
the untuned model), or run along: those of every score seen so far, by all processes of a run and this batch's among
them. The raw score of each term of the latest call is kept in ``terms``, to be logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.rewards.base import Meta, Reward
from visiontune.rewards.loading import load
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of a mix."""

    SHORTHAND: ClassVar[str] = "reward"

    reward: str = option(help="a reward spec, module or .py file")
    options: dict[str, Any] = option({}, help="its options")
    weight: float = option(1.0, least=-1e6, greatest=1e6, help="its factor; negative to push the score down")
    normalise: Literal["raw", "declared", "running"] = option("raw", help="what the score is divided and shifted by")
    mean: float = option(0.0, least=-1e9, greatest=1e9, help="mean of the scores, for normalise: declared")
    std: float = option(1.0, above=0, greatest=1e9, help="standard deviation of the scores, for normalise: declared")

    def __post_init__(self) -> None:
        if self.normalise != "declared" and (self.mean, self.std) != (0.0, 1.0):
            raise UserError("mean and std are read where normalise is declared")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a mix."""

    terms: list[Term] = option([], help="the rewards with their weights; required")


def build(config: Config) -> Mix:
    """The mix of a config; loads the weights of all terms."""
    if not config.terms:
        raise UserError("the reward mix needs terms, for instance terms: [{reward: pickscore, weight: 0.1}, jpeg]")
    rewards = [load({**term.options, "name": term.reward}, f"terms[{i}]") for i, term in enumerate(config.terms)]
    for i, reward in enumerate(rewards):
        if getattr(reward, "running", None):
            raise UserError(f"terms[{i}] is itself a mix with normalise: running: put its terms here in its place")
    return Mix(rewards, config.terms)


class Mix(Reward):
    """Differentiable if all terms are; groupwise if one is, or if one is scaled by the statistics of the batch.

    Attributes:
        gather: the scores of all processes, which a run over several of them lends; each must then be asked as often.
    """

    name = "mix"
    gather: Callable[[Tensor], Tensor] = staticmethod(lambda scores: scores)

    def __init__(self, rewards: Sequence[Reward], terms: Sequence[Term]) -> None:
        self.rewards, self.settings = list(rewards), list(terms)
        self.labels = _labels([reward.name for reward in rewards])
        self.running = {
            label: Statistics() for label, term in zip(self.labels, terms, strict=True) if term.normalise == "running"
        }
        self.clips = all(reward.clips for reward in rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.groupwise = bool(self.running) or any(reward.groupwise for reward in rewards)
        self.weights = {label: term.weight for label, term in zip(self.labels, terms, strict=True)}
        self.range = _range(self.rewards, self.settings)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        raw = {label: reward(images, prompts, meta) for label, reward in zip(self.labels, self.rewards, strict=True)}
        # Only once every term has answered: a call that fails leaves no trace.
        for label, statistics in self.running.items():
            statistics.add(self.gather(raw[label].detach()))
        self.terms = {label: scores.detach() for label, scores in raw.items()}
        total = torch.zeros(len(images), device=images.device)
        for label, term in zip(self.labels, self.settings, strict=True):
            mean, std = self._scale(label, term)
            total = total + term.weight * (raw[label] - mean) / std
        return total

    def _scale(self, label: str, term: Term) -> tuple[float, float]:
        if label in self.running:
            statistics = self.running[label]
            # Scores that are all equal say nothing; dividing by their spread would make noise of them.
            return statistics.mean, statistics.std or 1.0
        return term.mean, term.std

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The running statistics, which a resumed run needs."""
        return {label: statistics.state() for label, statistics in self.running.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take running statistics up again."""
        if state.keys() != self.running.keys():
            raise UserError(f"statistics of {sorted(state)} do not fit a mix with {sorted(self.running)} running")
        self.running = {label: Statistics(**values) for label, values in state.items()}


@dataclass
class Statistics:
    """Count, mean and sum of squared deviations of numbers that come in batches (Chan et al., 1979)."""

    count: float = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the population seen."""
        variance = self.squares / self.count if self.count else 0.0
        # Equal numbers differ by rounding.
        return math.sqrt(variance) if variance > 1e-12 * self.mean**2 else 0.0

    def add(self, scores: Tensor) -> None:
        """Take in a batch."""
        values = scores.double()
        count, mean = len(values), values.mean().item()
        total, shift = self.count + count, mean - self.mean
        self.squares += (values - mean).square().sum().item() + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def state(self) -> dict[str, float]:
        """What makes the statistics anew."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}


def _labels(names: Sequence[str]) -> list[str]:
    """Names told apart by a number where they come twice."""
    return [name if names.count(name) == 1 else f"{name}#{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _range(rewards: Sequence[Reward], terms: Sequence[Term]) -> tuple[float, float]:
    low = high = 0.0
    for reward, term in zip(rewards, terms, strict=True):
        if term.normalise == "running":
            return float("-inf"), float("inf")
        if term.weight:
            ends = sorted(term.weight * (end - term.mean) / term.std for end in reward.range)
            low, high = low + ends[0], high + ends[1]
    return low, high
