"""CCA: guidance learnt by models that fill in masked tokens, by telling a picture's prompt from another's.

Chen, Su, Sun, Zhu, "Toward Guidance-Free AR Visual Generation via Condition Contrastive Alignment", 2024, arXiv
2410.09347. For pairs of a picture x and its prompt c, and the prompt c' of another picture,

    L = - log sigmoid(R(x, c)) - lambda log sigmoid(-R(x, c')),    R(x, c) = beta log p(x | c) / p_base(x | c)

whose optimum is p(x | c) proportional to p_base(x | c) (p_base(x | c) / p_base(x))^(1 / beta) as far as a model can
have it: classifier-free guidance inside of the weights. Both terms are divided by max(lambda, 1), as in the authors'
code.

The paper's models have a chain rule. Those that fill in masked tokens have none, so log p(x | c) is estimated as in
UniGRPO: M of the n tokens are masked, the same ones for every term, and what the model says of them is summed, times
n / |M|. The pictures are the base's own, so that prompts are enough. Both are ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.unmask import unmask
from visiontune.errors import UserError
from visiontune.objectives._online import OnlineConfig, Rollouts, conditions, parts_of
from visiontune.objectives.base import Needs, Tools, fills_in
from visiontune.objectives.unigrpo import draw_mask, of_drawn
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.masked import MaskedModel


@dataclass(frozen=True, kw_only=True)
class Config(OnlineConfig):
    """Options of CCA; `steps`, `cfg_scale` and `guidance` are those of the base's pictures."""

    steps: int = option(12, least=1, greatest=100_000, help="steps in which a picture is drawn")
    cfg_scale: float = option(1.0, least=-1000, greatest=1000, help="guidance of the base's pictures; 1 for none")
    temperature: float = option(
        2.0, least=0, greatest=1000, help="noise on what the sampler is sure of, at its first step; falls to 0"
    )
    updates: int = option(4, least=1, greatest=65536, help="optimiser steps for each picture, each with its own mask")
    beta: float = option(0.02, above=0, greatest=1e6, help="of the log-ratio; the smaller, the stronger the guidance")
    negative_weight: float = option(
        50.0, least=0, greatest=1e6, help="lambda, weight of the other prompt; the larger, the stronger the guidance"
    )
    dropout: float = option(
        0.1, least=0, below=1, help="share of pictures that are learnt without their prompt, so that guidance stays"
    )
    ratio_min: float = option(0.1, least=0, greatest=1, help="least share of the tokens that is masked")


def build(config: Config) -> CCA:
    """The objective that ``config`` describes."""
    return CCA(config)


def of_right(ratio: Tensor, weight: float) -> Tensor:
    """The term ``[b]`` of R ``[b]`` under a picture's own prompt; ``weight`` is lambda."""
    return -logsigmoid(ratio) / max(weight, 1.0)


def of_other(ratio: Tensor, same: Tensor, weight: float) -> Tensor:
    """The term ``[b]`` of R ``[b]`` under the other prompt, which counts as the right one where it is the ``same``."""
    return torch.where(same, -logsigmoid(ratio), -weight * logsigmoid(-ratio)) / max(weight, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Pictures that are differentiated in one batch.

    Attributes:
        tokens: ``[m, h, w]``. cond, other: their conditions and those of others.
        same: ``[m]`` bool, where both prompts are one. rows: their batch.
    """

    tokens: Tensor
    cond: Condition
    other: Condition
    same: Tensor
    rows: Batch


class CCA(Rollouts):
    """Logs ``right`` and ``other``, the means of R under a picture's own prompt and under the other one."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.updates = config.updates

    @property
    def needs(self) -> Needs:
        return Needs(online=True, reference=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Refuse also a model that does not fill in masked tokens.

        Raises:
            UserError: see above.
        """
        super().check(model, reward)
        fills_in(model, "cca", "cfg_distill")
        self.check_guidance(model)

    def facts(self) -> dict[str, str]:
        """That guidance is inside, by which samplers know that the result is to be drawn without."""
        told = {"cca": {"beta": self.config.beta, "negative_weight": self.config.negative_weight}}
        return {"distilled_guidance": json.dumps(told)}

    def probe(self, model: MaskedModel, batch: Batch, tools: Tools) -> None:
        """One prediction of the tokens of a micro-batch: gradients are taken one prompt at a time."""
        batch = batch[: self.config.micro_batch or len(batch)]
        masked = torch.full((len(batch), *model.grid()), model.mask_token, device=model.device)
        model.logits(masked, model.embed(batch.prompts))

    @torch.no_grad()
    def collect(self, model: MaskedModel, batch: Batch, tools: Tools) -> list[Chunk]:
        """The base's pictures of the prompts; rows trade their prompts in pairs, a last odd one with the one before.

        Raises:
            UserError: a single row, which has nobody to trade with.
        """
        if len(batch) < 2:
            raise UserError("a picture needs the prompt of another: raise train.batch_size to two or more")
        other = (torch.arange(len(batch)) ^ 1).clamp(max=len(batch) - 1)
        if len(batch) % 2:
            other[-1] = len(batch) - 2
        traded = [batch.prompts[i] for i in other.tolist()]
        place, chunks, guidance = 0, [], self.guidance(model)
        for rows in parts_of(batch, self.config.micro_batch):
            names = traded[place : place + len(rows)]
            place += len(rows)
            with tools.reference():
                cond, uncond = conditions(model, rows.prompts, guidance, text=False)
                tokens = unmask(
                    model,
                    cond,
                    uncond=uncond,
                    guidance=guidance,
                    steps=self.config.steps,
                    temperature=(self.config.temperature, 0.0),
                    generator=tools.generators(rows),
                )
            same = torch.tensor([one == two for one, two in zip(rows.prompts, names, strict=True)])
            chunks.append(
                Chunk(tokens=tokens, cond=cond, other=model.embed(names), same=same.to(tokens.device), rows=rows)
            )
        return chunks

    def update(self, model: MaskedModel, collected: list[Chunk], part: int, tools: Tools) -> Loss:
        """One mask of each picture; the two prompts are differentiated one after the other."""
        count = sum(len(chunk.tokens) for chunk in collected)
        sums = torch.stack([self.gradients(model, chunk, part, count, tools) for chunk in collected]).sum(0)
        return Loss(total=sums[0].float(), terms={"right": sums[1].float(), "other": sums[2].float()})

    @torch.enable_grad()
    def gradients(self, model: MaskedModel, chunk: Chunk, part: int, count: int, tools: Tools) -> Tensor:
        """Add the gradient of some rows of ``count``; their shares ``[3]`` of the loss and of both means of R."""
        hidden, dropped = self.masks(chunk, part, tools)
        empty = model.unconditional(len(chunk.tokens))
        given = [_where(dropped, empty, cond) for cond in (chunk.cond, chunk.other)]
        same, config, found = chunk.same | dropped, self.config, []
        for number, cond in enumerate(given):
            with tools.reference(), torch.no_grad():
                base = self.log_prob(model, chunk.tokens, hidden, cond)
            ratio = config.beta * (self.log_prob(model, chunk.tokens, hidden, cond) - base)
            weight = config.negative_weight
            terms = of_right(ratio, weight) if number == 0 else of_other(ratio, same, weight)
            loss = terms.sum() / count
            (tools.scale * loss).backward()
            found.append((loss.detach(), ratio.detach().sum() / count))
        return torch.stack([found[0][0] + found[1][0], found[0][1], found[1][1]])

    def log_prob(self, model: MaskedModel, tokens: Tensor, hidden: Tensor, cond: Condition) -> Tensor:
        """The estimate of log p(tokens) ``[m]`` from what is said of the hidden ones ``[m, n]``, given the others."""
        seen = tokens.flatten(1).masked_fill(hidden, model.mask_token).view_as(tokens)
        said = of_drawn(model.logits(seen, cond).flatten(1, 2).log_softmax(-1), tokens.flatten(1))
        return (said * hidden).sum(1) * hidden.shape[1] / hidden.sum(1)

    def masks(self, chunk: Chunk, part: int, tools: Tools) -> tuple[Tensor, Tensor]:
        """What is hidden ``[m, n]``, and which rows are learnt without a prompt ``[m]``, each row by its own chance."""
        size, low = chunk.tokens[0].numel(), self.config.ratio_min
        hidden, dropped = [], []
        for rng in tools.generators(chunk.rows, "mask", part):
            share, chance = torch.rand(2, generator=rng).tolist()
            hidden.append(draw_mask(size, low + (1 - low) * share, rng))
            dropped.append(chance < self.config.dropout)
        device = chunk.tokens.device
        return torch.stack(hidden).to(device), torch.tensor(dropped, device=device)


def _where(rows: Tensor, one: Condition, other: Condition) -> Condition:
    """Of both conditions ``[m]`` the first where ``rows`` say so."""
    order = torch.arange(len(rows), device=rows.device) + torch.where(rows, 0, len(rows))
    return Condition.cat([one, other])[order]
