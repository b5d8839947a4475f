"""What a search is: pictures of each request are drawn and scored by a reward, and one of them is kept.

Nothing is trained, and every picture that is kept is one that the model draws. What the reward cannot see is not chosen
for, and may get worse; that is what a held-out reward is asked about.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from visiontune.core import Request
from visiontune.diffusion.guidance import Guidance
from visiontune.diffusion.replay import micro_batches
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.base import Reward

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the pictures are drawn and scored that a search chooses among.

    Attributes:
        model: with its adapters. steps: of its sampler. guidance: of every picture. scheduler: name of its sampler.
        size: height and width in pixels. batch_size: pictures that are drawn and scored at once, at most.
        draw: pictures uint8 [n, (f), h, w, 3] of n requests, by the stock pipeline.
        reward: what the search goes by.
    """

    model: PipelineModel
    steps: int
    guidance: Guidance
    scheduler: str
    size: tuple[int, int]
    batch_size: int
    draw: Callable[[Sequence[Request]], np.ndarray]
    reward: Reward

    @property
    def rows(self) -> int:
        """How often the network sees a picture that is drawn without search."""
        if isinstance(self.guidance, GuidanceStack):
            return sum(self.guidance.plan(self.model, self.steps, self.size).rows)
        return self.steps * (2 if self.guidance.contrasts else 1)

    def score(self, pictures: np.ndarray, requests: Sequence[Request], by: Reward | None = None) -> list[float]:
        """The rewards of pictures as they will be written, by the search's reward unless another is given."""
        reward, found = by or self.reward, list[float]()
        for rows in micro_batches(len(requests), self.batch_size):
            prompts = [request.prompt for request in requests[rows]]
            found += reward(to_tensor(pictures[rows], self.model.device), prompts, None).tolist()
        return found

    def scored(self, requests: Sequence[Request]) -> Iterator[tuple[np.ndarray, float]]:
        """Pictures of requests and their rewards, a batch at a time."""
        for rows in micro_batches(len(requests), self.batch_size):
            pictures = self.draw(requests[rows])
            yield from zip(pictures, self.score(pictures, requests[rows]), strict=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a search found for one request.

    Attributes:
        picture: uint8 [(f), h, w, 3], the one that is kept. reward: its score.
        plain: the request's picture without search, drawn in the same way. plain_reward: its score.
        record: what was drawn, as JSON has it: seeds and rewards, enough to draw again what was thrown away.
    """

    picture: np.ndarray
    reward: float
    plain: np.ndarray
    plain_reward: float
    record: dict[str, Any]


class Best:
    """The best picture of one request so far, beginning with its own.

    Attributes:
        number: of the best, among those that were seen. drawn: a record of each.
    """

    def __init__(self, picture: np.ndarray, reward: float, **record: Any) -> None:
        self.number, self.picture, self.reward = 0, picture, reward
        self.plain, self.plain_reward = picture, reward
        self.drawn: list[dict[str, Any]] = [{**record, "reward": reward}]

    def see(self, picture: np.ndarray, reward: float, **record: Any) -> bool:
        """Take in another, and say whether it is better than all before it."""
        self.drawn.append({**record, "reward": reward})
        better = reward > self.reward
        if better:
            self.number, self.picture, self.reward = len(self.drawn) - 1, picture, reward
        return better

    def found(self) -> Found:
        """What the search has found."""
        return Found(
            picture=self.picture,
            reward=self.reward,
            plain=self.plain,
            plain_reward=self.plain_reward,
            record={"kept": self.number, "drawn": self.drawn},
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of each picture that is kept: pictures that are drawn, rows that the network sees, scores of the reward."""

    pictures: int
    rows: int
    scores: int


class Search(ABC):
    """A way to search; its `Config` is one.

    Attributes:
        n: pictures of a request that are drawn side by side; the option that a bare value stands for.
    """

    SHORTHAND: ClassVar[str] = "n"

    n: int

    @property
    def name(self) -> str:
        """The file that it is in."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, at: Setting) -> None:  # noqa: B027 (most can search with anything)
        """Refuse a model or a way to draw that it cannot search with: UserError naming the mend."""

    @abstractmethod
    def cost(self, at: Setting) -> Cost:
        """What one picture costs, known before it is drawn."""

    @abstractmethod
    def find(self, at: Setting, requests: Sequence[Request]) -> list[Found]:
        """Search for each request by itself; what is found for one depends on the others by rounding only."""


def nth(request: Request, k: int) -> Request:
    """The k-th request like one: itself, then others with seeds of their own, however many there will be."""
    if not k:
        return request
    digest = hashlib.sha256(f"{request.seed}\0{k}".encode()).digest()
    return replace(request, seed=int.from_bytes(digest[:8], "big") >> 1, noise=None)
