"""OneActor: one and the same character in all pictures.

Wang et al., 2024, arXiv 2404.10267. A vector d was fitted to a word in one picture (`visiontune.guidance.actor`), and
is added to the word's embedding e in the steps of the window; a second one, of its siblings, can be guided away from:

    u + w (eps(e + v d) - u) - eta (eps(e + d_siblings) - u).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance import _words
from visiontune.guidance._network import Network
from visiontune.guidance.actor import Actor
from visiontune.guidance.base import Point, Pull, Run, Shaping, Sides, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Shaping, Pull):
    """An offset of one word's embedding, and guidance away from that of its siblings in one more call."""

    scale: float = option(0.8, least=-10, greatest=10, help="v, of the offset; between 0 and 1 a likeness, 0 is none")
    window: tuple[float, float] = option(
        (0.33, 1.0), least=0, greatest=1, help="levels of noise, both included, between which it acts; 1 is pure noise"
    )
    file: Any = option(help="file of a fitted character")
    word: str | None = option(None, help="whose embedding is moved; null for the one that was fitted")
    prompt: str | None = option(None, help="what all rows are told, where it is not known; null for each row's own")
    exclude: float = option(0.0, least=-100, greatest=100, help="eta, of the siblings; 0 is none and costs nothing")

    @property
    def contrasts(self) -> bool:
        return self.exclude != 0

    @property
    def rows(self) -> int:
        return int(self.exclude != 0)

    @property
    def actor(self) -> Actor:
        """The character, read anew where it is a file."""
        return self.file if isinstance(self.file, Actor) else Actor.load(self.file)

    def check(self, network: Network) -> None:
        network.reading(self.name)
        width, fitted = width_of(network.denoiser), len(self.actor.target)
        if width != fitted:
            raise UserError(
                f"oneactor: the character was fitted to embeddings of {fitted} numbers, and '{network.source}' reads "
                f"such of {width}: fit it on this model"
            )

    def begins(self, run: Run) -> None:
        self._places(run, self.actor)

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        if side == "at":  # calls for latents or conditions of a term's own
            return nullcontext()
        actor, places = self._known(point)

        def moved(words: Tensor) -> Tensor:
            rows = len(words) - _words.told(len(words), side).start
            strengths = _words.strengths(self, point, rows)
            given = zip(_words.spread(places, rows), strengths, strict=True)
            return _words.added(words, [[(at, s * actor.target) for at in mine] for mine, s in given], side)

        return _words.reading(network.reading(self.name), moved)

    def pull(self, p: Tensor, u: Tensor | None, s: Strength, sides: Sides, point: Point) -> Tensor:
        if not self.exclude:
            return torch.zeros_like(p)
        assert u is not None
        (actor, places), (cond, _) = self._known(point), sides.conditions()
        rows = _words.spread(places, len(cond))
        tokens = _words.added(cond.tokens, [[(at, actor.average) for at in mine] for mine in rows], "prompt")
        # Its strength is that of the offset; where it acts, the siblings count eta.
        away = self.exclude * (sides.at(point.x, replace(cond, tokens=tokens)) - u)
        if isinstance(s, Tensor):
            away = away * (s != 0)
        return -away

    def _known(self, point: Point) -> tuple[Actor, Sequence[list[int]]]:
        """The character, and the tokens of its word in each of the prompts: found once a run."""
        actor: Actor = _words.kept(point, "actor", lambda: self.actor)
        return actor, _words.kept(point, "places", lambda: self._places(point.run, actor))

    def _places(self, run: Run, actor: Actor) -> list[list[int]]:
        model, word = run.modelled(self.name), self.word or actor.word
        prompts = _words.prompts_of(run, self.prompt, self.name)
        return [_words.places(model, prompt, word, self.name) for prompt in prompts]


def width_of(denoiser: Any) -> int:
    """How many numbers an embedding has that a UNet reads."""
    width = denoiser.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def build(config: Config) -> Config:
    """The term."""
    return config
