"""Diversity-rewarded CFG distillation: guidance learnt along the student's own pictures, which are to differ.

Cideron et al., "Diversity-Rewarded CFG Distillation", 2024, arXiv 2410.06084, who draw tokens of music; for diffusion,
whose steps are Gaussians, their divergence from the teacher is the squared difference of predictions:

    L = mean of (f(x_t, t, c) - g(x_t, t, c))^2  -  beta D,    D = mean over pairs of a prompt's pictures of r(y_i, y_j)

x_t are states of the student's own rollouts, without guidance, and g is the untrained model under guidance. D comes in
one of two ways. ``pathwise`` differentiates it through the last ``grad_steps`` steps. ``policy`` knows r as a number
alone: both pictures of a pair are credited,

    grad D = E[r (grad log p(y_1) + grad log p(y_2))] = mean_i 2 (d_i - b_i) grad log p(y_i)

with d_i the mean distance of picture i from the others of its prompt, and b_i that of the pairs without it, which does
not depend on it and so leaves the gradient as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.diffusion.guidance import NO_GUIDANCE, guided
from visiontune.diffusion.pathwise import backpropagate, end_gradient
from visiontune.diffusion.replay import backpropagate_scores
from visiontune.diffusion.trajectory import Keep, Start, Trajectory, Window, require_no_memory, rollout
from visiontune.errors import UserError
from visiontune.objectives._distilled import Distilled, DistilledConfig, Seen
from visiontune.objectives._online import parts_of, pixels, reward_terms, score
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

_PAIRS = 3  # pictures of a prompt among which a pair is left when one is taken away


@dataclass(frozen=True, kw_only=True)
class Config(DistilledConfig):
    """Options of distillation with a reward for pictures that differ."""

    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of the student's rollouts, all learnt from")
    group: int = option(
        4, least=2, greatest=65536, help="pictures of each prompt; train.batch_size is a multiple of it"
    )
    beta: float = option(1.0, least=0, greatest=1e6, help="weight of the diversity; 0 distils alone")
    gradient: Literal["pathwise", "policy"] = option(
        "pathwise", help="of the diversity: through the last steps, or by the likelihoods of steps with noise"
    )
    grad_steps: int = option(1, least=1, greatest=100_000, help="with pathwise, the last steps that it goes through")
    updates: int = option(1, least=1, greatest=1, help="optimiser steps of a rollout, whose diversity is of now")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_steps > self.steps:
            raise ValueError("grad_steps must be at most steps")
        if self.gradient == "policy" and self.group < _PAIRS:
            raise ValueError(
                "group must be at least 3 with gradient=policy: a picture is compared with pairs of others"
            )


def build(config: Config) -> DiversityDistill:
    """The objective that ``config`` describes."""
    return DiversityDistill(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Some rows of a rollout: the chain, and what the teacher says along it."""

    rows: Batch
    chain: Trajectory
    seen: Seen


class DiversityDistill(Distilled):
    """Logs besides the reward, which is the diversity."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.group = config.group

    @property
    def policy(self) -> bool:
        """Whether the diversity is learnt by likelihoods."""
        return self.config.beta > 0 and self.config.gradient == "policy"

    @property
    def needs(self) -> Needs:
        rewarded = self.config.beta > 0
        return Needs(
            online=True, reference=True, text=False, reward=rewarded, differentiable=rewarded and not self.policy
        )

    def check_reward(self, reward: Any) -> None:
        """Besides, refuse with ``policy`` what is not made of pairs, and micro-batches that would tear groups apart."""
        super().check_reward(reward)
        if not self.config.beta:
            return
        if self.policy and (not reward.groupwise or getattr(reward, "weights", None)):
            raise UserError(
                f"reward '{reward.name}' is not the distance of a prompt's pictures alone, whose pairs are credited: "
                "take reward=diversity, or objective.gradient=pathwise"
            )
        size = self.config.micro_batch
        if reward.groupwise and size is not None and size % self.group:
            raise UserError(
                f"objective.micro_batch={size} tears apart the {self.group} pictures of a prompt: take a multiple"
            )

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a teacher that guides as the student does already, or that single steps cannot ask."""
        super().check(model, reward)
        if getattr(model, "embedded", False):
            raise UserError(
                f"model '{model.source}' ({model.family}) has guidance distilled into it already: take one without"
            )
        guidance = self.guidance(model)
        if guidance == NO_GUIDANCE:
            raise UserError("the teacher is not guided: raise objective.cfg_scale, or name terms in objective.guidance")
        require_no_memory(guidance)
        if self.policy:
            self.dynamics.require_noise()

    def facts(self) -> dict[str, str]:
        """The teacher's guidance, by which samplers know that the result is to be drawn without."""
        config = self.config
        teacher = {"cfg_scale": config.cfg_scale, **({"guidance": config.guidance} if config.guidance else {})}
        return {"distilled_guidance": json.dumps(teacher)}

    # -- collect ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Drawn]:
        """Rollouts of the student, and what the teacher predicts at each of their states."""
        return [self._drawn(model, rows, tools) for rows in parts_of(batch, self.config.micro_batch)]

    def _drawn(self, model: DiffusionModel, rows: Batch, tools: Tools) -> Drawn:
        chain = rollout(
            model,
            model.embed(rows.prompts),
            chain=self.config.steps,
            dynamics=self.dynamics,
            start=Start(generator=tools.generators(rows)),
            keep=Keep(history=True, log_probs=self.policy),
            window=Window(steps=self.config.grad_steps, deferred=True),
        )
        return Drawn(rows=rows, chain=chain, seen=self._taught(model, chain, tools))

    def _taught(self, model: DiffusionModel, chain: Trajectory, tools: Tools) -> Seen:
        """The states of a chain, step after step, with what the teacher predicts there."""
        assert chain.latents is not None
        teacher, away = self.guidance(model), self.away(model, len(chain))
        rows, targets = len(chain), []
        with tools.reference():
            for x, t in zip(chain.latents[:, :-1].unbind(1), chain.timesteps.to(model.device), strict=True):
                targets.append(guided(model, x, t.expand(rows), chain.cond, away, teacher))
        return Seen(
            x=chain.latents[:, :-1].transpose(0, 1).flatten(0, 1),
            t=chain.timesteps.to(model.device).repeat_interleave(rows),
            cond=chain.cond[torch.arange(rows).repeat(chain.steps)],
            target=torch.cat(targets),
        )

    # -- update -------------------------------------------------------------------------------------------------

    def update(self, model: DiffusionModel, collected: list[Drawn], part: int, tools: Tools) -> Loss:
        """The regression to the teacher, and the gradient of the diversity."""
        found = self.regress(model, [drawn.seen for drawn in collected], part, tools)
        if not self.config.beta:
            return found
        count = sum(len(drawn.rows) for drawn in collected)
        scores, total = list[dict[str, Tensor]](), found.total
        for drawn in collected:
            share = len(drawn.rows) / count
            scores.append((self._by_likelihood if self.policy else self._by_path)(model, drawn, share, tools))
            total = total - share * self.config.beta * scores[-1]["reward"].mean()
        terms = reward_terms(tools, {name: torch.cat([one[name] for one in scores]) for name in scores[0]})
        return Loss(total=total, terms={**found.terms, **terms})

    def _by_path(self, model: DiffusionModel, drawn: Drawn, share: float, tools: Tools) -> dict[str, Tensor]:
        """Add the gradient of the mean reward through the last steps."""
        scores: dict[str, Tensor] = {}

        def loss(latents: Tensor) -> Tensor:
            found = score(tools, pixels(model, latents), drawn.rows)
            scores.update({name: value.detach() for name, value in found.items()})
            return -tools.scale * share * self.config.beta * found["reward"].mean()

        _, at_end = end_gradient(drawn.chain.final, loss)
        backpropagate(model, drawn.chain, at_end)
        return scores

    def _by_likelihood(self, model: DiffusionModel, drawn: Drawn, share: float, tools: Tools) -> dict[str, Tensor]:
        """Add the policy gradient of the mean distance of pairs."""
        with torch.no_grad():
            scores = score(tools, pixels(model, drawn.chain.final), drawn.rows)
        advantages = pair_advantages(scores["reward"].double(), self.group)
        steps = int(drawn.chain.scored.sum())
        # Log-probabilities are means over the values of a latent; this is one over steps, too, as of other objectives.
        weights = -tools.scale * share * self.config.beta * advantages / (len(drawn.rows) * steps)
        backpropagate_scores(model, drawn.chain, weights[:, None].expand(-1, steps))
        return scores


def pair_advantages(distances: Tensor, group: int) -> Tensor:
    """What the log-probability of each picture counts in the gradient of the mean distance of pairs, ``[n]``.

    Twice the picture's distance, since each of its pairs has two members, less the mean of the pairs without it.

    Args:
        distances: ``[n]`` mean distance of each picture from the others of its group. group: at least 3, one after the
            other.
    """
    d = distances.view(-1, group)
    # The pairs of a picture sum up to (G - 1) d_i, and all of them to half of that, over pictures.
    all_of, own = (group - 1) * d.sum(1, keepdim=True) / 2, (group - 1) * d
    others = (all_of - own) / ((group - 1) * (group - 2) / 2)
    return (2 * (d - others)).flatten()
