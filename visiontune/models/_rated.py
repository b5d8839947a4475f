"""Denoisers that are told ratings of what they are to draw: numbers in [0, 1] beside their time.

Gu et al., "Multi-Reward as Condition for Instruction-based Image Editing", 2024, arXiv 2411.04713: sines of each
rating, through a small network, are added to the embedding of time. Here the last layer of that network starts at zero,
and a rating may be left untold. What the authors add beside it is left out: words on what failed, and attention to
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.hooks import RemovableHandle

from visiontune.errors import UserError
from visiontune.models.base import Model, dtype_of

SCORES = "scores"
# Sines of each rating, and by what a rating is multiplied: hundredths are told apart.
WIDTH, _HUNDRED = 256, 100
# What diffusers calls the module between the sines of a timestep and its embedding.
_TIMES = ("time_embedding", "timestep_embedder", "time_step_proj")


def features(scores: Tensor) -> Tensor:
    """Sines of ratings.

    Args:
        scores: [b, k] in [0, 1], nan where one is not told.

    Returns:
        [b, k * `WIDTH`] float32: a slice of each rating, 0 where it is not told.
    """
    told = ~scores.isnan()
    found = get_timestep_embedding(_HUNDRED * scores.float().nan_to_num().flatten(), WIDTH)
    return (found.view(*scores.shape, WIDTH) * told[..., None]).flatten(1)


class Scores(nn.Module):
    """What ratings add to the embedding of time: out(silu(hidden(features))), with `out` at zero.

    Attributes:
        asked: [1, k], what is told of rows of which nothing else is said. told: [b, k], of the rows of one call.
    """

    asked: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(count * WIDTH, width), nn.Linear(width, width)
        self.told: Tensor | None = None
        self.register_buffer("asked", torch.ones(1, count), persistent=False)
        # The same in every process and at every opening: what is trained is the change of it.
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.hidden.weight.normal_(std=(count * WIDTH) ** -0.5, generator=rng)
            for parameter in (self.hidden.bias, *self.out.parameters()):
                parameter.zero_()

    def forward(self) -> Tensor:
        """[b, width], or [1, width] where rows are told what is asked of all."""
        scores = self.asked if self.told is None else self.told
        weight = self.hidden.weight
        added: Tensor = self.out(silu(self.hidden(features(scores).to(weight.device, weight.dtype))))
        return added


class TellsScores(Model):
    """A model whose denoiser may be told ratings.

    Attributes:
        rated: their names, in the order in which they are told; none where it is told none.
    """

    rated: tuple[str, ...] = ()
    _hook: RemovableHandle

    def embed_scores(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Let the denoiser be told ratings, by layers that add nothing to what it computes; at first the best is asked.

        Returns:
            The layers by their names, with their component's.

        Raises:
            UserError: it is told some already, or has no embedding of time of its own.
        """
        if self.rated:
            raise UserError(
                f"model '{self.source}' is told ratings already ({', '.join(self.rated)}): take one adapter with scores"
            )
        where, time = self._time()
        made = Scores(len(names), time.linear_2.out_features)
        made.to(self.device, dtype_of(self.main)).requires_grad_(False).eval()
        made.asked = made.asked.float()
        self._put(time, made, names)
        component = self.names()[0]
        return {f"{component}.{where}.{SCORES}.{own}": getattr(time.scores, own) for own in ("hidden", "out")}

    def drop_scores(self) -> None:
        """Undo `embed_scores`, when no adapter is on its layers any more."""
        if self.rated:
            self._hook.remove()
            del self._time()[1].scores
            self.rated = ()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """In the block the denoiser has no such layers, and draws what is asked now: what that adds is in a bias."""
        if not self.rated:
            yield
            return
        time, names = self._time()[1], self.rated
        bias, scores = time.linear_2.bias.data, time.scores
        kept = bias.clone()
        with torch.no_grad():
            bias += scores()[0].to(bias)
        self.drop_scores()
        try:
            yield
        finally:
            bias.copy_(kept)
            self._put(time, scores, names)

    def ask(self, scores: Sequence[float | None]) -> None:
        """Tell ratings in [0, 1], in the order of `rated`, of all that is drawn from now on; None tells nothing."""
        own: Scores = self._time()[1].scores
        told = [float("nan") if score is None else score for score in scores]
        own.asked.copy_(torch.tensor([told], dtype=torch.float32))

    def accept(self, header: Mapping[str, Any]) -> None:
        super().accept(header)
        if header["scores"]:
            self.embed_scores(list(header["scores"]))

    @contextmanager
    def telling(self, scores: Tensor | None) -> Iterator[None]:
        """In the block the rows of a call are told their own ratings [b, k]; None for what is asked."""
        if scores is None or not self.rated:
            yield
            return
        own: Scores = self._time()[1].scores
        own.told = scores
        try:
            yield
        finally:
            own.told = None

    def _put(self, time: Any, scores: Scores, names: Sequence[str]) -> None:
        time.scores = scores
        self._hook = time.register_forward_hook(_add)
        self.rated = tuple(names)

    def _time(self) -> tuple[str, Any]:
        """The module that embeds time, and its name in the denoiser."""
        modules = self.main.named_modules()
        found = [(n, m) for n, m in modules if isinstance(m, TimestepEmbedding) and n.rpartition(".")[2] in _TIMES]
        if len(found) != 1 or found[0][1].linear_2.bias is None or found[0][1].post_act is not None:
            raise UserError(
                f"the denoiser of '{self.source}' has no embedding of time that ratings could be added to: leave "
                "data.scores out, or take a model such as Stable Diffusion, SDXL, Stable Diffusion 3 or FLUX"
            )
        return found[0]


def _add(time: Any, args: Any, embedding: Tensor) -> Tensor:
    added: Tensor = time.scores()
    return embedding + added.to(embedding)
