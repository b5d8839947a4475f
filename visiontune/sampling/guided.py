"""Sampling guided by a reward and judged by another: guidance hacks rewards as training does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.guidance.reward import Config as RewardTerm
from visiontune.guidance.stack import GuidanceStack
from visiontune.rewards.base import Reward
from visiontune.sampling.searched import drawing_of
from visiontune.search.asked import configured, single
from visiontune.search.base import Setting

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

Spec = str | Mapping[str, Any]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Pictures of a stack with the term `reward`, each beside the one without it.

    Attributes:
        guided, plain: how pictures are drawn with the term and without it, and the reward that guides.
        held_out: the reward that judges.
    """

    guided: Setting
    plain: Setting
    held_out: Reward

    @staticmethod
    def of(held_out: Spec, model: PipelineModel, *, guidance: GuidanceStack | None, **options: Any) -> Judged:
        """With the options of :func:`visiontune.sampling.pipeline.images`; loads the reward that judges.

        Raises:
            UserError: the options do not suit, as of :func:`check`, or the reward does not.
        """
        check(guidance, held_out)
        assert guidance is not None
        guiding = _guiding(guidance)
        less = GuidanceStack([term for term in guidance.terms if term not in guiding])
        with_it, without = (
            Setting(model=model, reward=guiding[0].scorer, **drawing_of(model, guidance=stack, **options))
            for stack in (guidance, less)
        )
        return Judged(guided=with_it, plain=without, held_out=single(held_out, "held_out"))

    def __call__(self, requests: Sequence[Request]) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Of each request its guided picture, and what a manifest says of it: each reward without the term and with."""
        plain, guided = (at.draw(requests) for at in (self.plain, self.guided))
        scores = {
            name: [self.guided.score(part, requests, by) for part in (plain, guided)]
            for name, by in (("reward", self.guided.reward), ("held_out", self.held_out))
        }
        rows = [{name: [before[i], after[i]] for name, (before, after) in scores.items()} for i in range(len(requests))]
        return list(zip(guided, rows, strict=True))


def check(guidance: GuidanceStack | None, held_out: Spec | None) -> None:
    """Refuse a held-out reward that has nothing to judge, and say what is hidden without one.

    Raises:
        UserError: naming the mend.
    """
    guiding = _guiding(guidance)
    if held_out is None:
        for term in guiding:
            _log.warning(
                "guidance by '%s' alone: what it cannot see may get worse, which a reward as held_out would show",
                term.scorer.name,
            )
        return
    if not guiding:
        raise UserError("held_out judges pictures that a reward guides: put reward into guidance, or leave it out")
    named = [term.reward for term in guiding if isinstance(term.reward, str | Mapping)]
    if configured(held_out, "held_out") in [configured(one, "guidance") for one in named]:
        raise UserError("held_out is the reward that guides, which rises anyway: take another one")


def _guiding(guidance: GuidanceStack | None) -> list[RewardTerm]:
    return [term for term in guidance.terms if isinstance(term, RewardTerm)] if guidance is not None else []
