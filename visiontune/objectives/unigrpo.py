"""UniGRPO: policy gradients for models that fill in masked tokens, by mask and predict.

Yang et al., "MMaDA: Multimodal Large Diffusion Language Models", 2025, arXiv 2505.15809. Such a model has no chain
rule, so the likelihood of a finished picture o, n tokens, is estimated: a set M of the tokens is masked, and what the
model says of them is averaged. For the pictures of a prompt, i in 1..G, with advantages A_i = (r_i - mean) / std,

    L = mean_i mean_{t in M_i} [ max(-A_i rho_t, -A_i clip(rho_t, 1 - c, 1 + c)) + beta KL_t ]
    rho_t = p(o_t | o without M) / p_old(o_t | o without M),    KL_t = KL(p(. | o without M) || p_base(. | o without M))

with the same M for the trained model, the one that drew the pictures and the base. Each of the mu updates of a rollout
has masks of its own: the share that is masked is random in the first, and goes from there to 1 in equal steps.

All masks of a rollout are known when it is drawn, so the old log-probabilities of all updates are found there and then:
as many forward passes as with a second copy of the weights, and only a number for each token to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.replay import rounding_of
from visiontune.diffusion.unmask import guided_logits, unmask
from visiontune.errors import UserError
from visiontune.objectives._advantages import flat_share, group_advantages
from visiontune.objectives._draw import score_latents
from visiontune.objectives._online import GroupConfig, Rollouts, conditions, parts_of, require_precise, reward_terms
from visiontune.objectives._policy import clipped_surrogate
from visiontune.objectives.base import Needs, Tools, fills_in
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.masked import MaskedModel


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of UniGRPO."""

    updates: int = option(
        4, least=1, greatest=65536, help="mu, optimiser steps for each rollout, each with masks of its own"
    )
    steps: int = option(12, least=1, greatest=100_000, help="steps in which a picture is drawn")
    cfg_scale: float = option(3.5, least=-1000, greatest=1000, help="guidance of the rollout; 1 for none")
    score_cfg_scale: float = option(
        1.0, least=-1000, greatest=1000, help="guidance of the token probabilities; 1 for none, at half the cost"
    )
    temperature: float = option(
        2.0, least=0, greatest=1000, help="noise on what the sampler is sure of, at its first step; falls to 0"
    )
    masks: int = option(2, least=1, greatest=1024, help="masks of each picture in an update")
    coupled: bool = option(False, help="masks in pairs that cover each token once; masks is then even")
    same_mask: bool = option(True, help="the pictures of a group are masked alike")
    ratio_min: float = option(0.1, least=0, greatest=1, help="least share of the tokens that is masked")
    clip: float = option(0.2, above=0, greatest=1000, help="a token's ratio is clipped to 1 - clip .. 1 + clip")
    beta: float = option(0.01, least=0, greatest=1e6, help="weight of the divergence from the base; 0 for none")
    kl: Literal["exact", "k3"] = option("exact", help="over the whole vocabulary, or estimated from the drawn token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupled and self.masks % 2:
            raise ValueError("masks must be even with coupled, which makes them in pairs")


def build(config: Config) -> UniGRPO:
    """The objective that ``config`` describes."""
    return UniGRPO(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Pictures that are differentiated in one batch, and were scored in it: at first their ratio is exactly 1.

    Attributes:
        tokens: ``[m, n]``. cond, uncond: their conditions. advantages: ``[m]``.
        hidden: ``[mu, k, m, n]`` bool, True for what the k masks of each update mask.
        old: ``[mu, k, m, n]`` log-probabilities of the tokens under the weights that drew them.
    """

    tokens: Tensor
    cond: Condition
    uncond: Condition | None
    advantages: Tensor
    hidden: Tensor
    old: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """A rollout.

    Attributes:
        chunks: its pictures but those with nothing to teach. rows: how many there are with those.
        shape: height and width of a picture, in tokens. terms: for the logs.
    """

    chunks: list[Chunk]
    rows: int
    shape: tuple[int, int]
    terms: dict[str, Tensor]


def mask_shares(first: float, updates: int) -> list[float]:
    """The masked share in each of mu updates: from ``first`` to 1 in equal steps."""
    return [first + (1 - first) * n / max(updates - 1, 1) for n in range(updates)]


def draw_mask(tokens: int, share: float, rng: torch.Generator, coupled: bool = False) -> Tensor:
    """A mask ``[n]`` of about ``share`` of the tokens, of one at least; if it is to have a complement, not of all."""
    count = min(max(round(share * tokens), 1), tokens - coupled)
    hidden = torch.zeros(tokens, dtype=torch.bool)
    hidden[torch.randperm(tokens, generator=rng)[:count]] = True
    return hidden


def exact_kl(now: Tensor, base: Tensor) -> Tensor:
    """KL(now || base) ``[...]`` of distributions given as log-probabilities ``[..., v]``."""
    return (now.exp() * (now - base)).sum(-1)


def k3(now: Tensor, base: Tensor) -> Tensor:
    """An estimate of KL(now || base), never below 0, from log-probabilities of a token that is drawn from ``now``."""
    return (base - now).expm1() - (base - now)


def of_drawn(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities ``[m, n]`` of the tokens ``[m, n]`` out of those of the vocabulary ``[m, n, v]``."""
    return log_probs.gather(-1, tokens[..., None])[..., 0]


class UniGRPO(Rollouts):
    """Logs the reward (mean, deviation, terms), KL, clipped share, flat prompts, and the share that is masked.

    Rows without advantage are left out, from the divergence too.
    """

    config: Config
    even = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._precise = self.updates == 1

    @property
    def needs(self) -> Needs:
        return replace(super().needs, text=False, reference=self.config.beta > 0)

    def check(self, model: Any, reward: Any) -> None:
        """Refuse also a model that does not fill in masked tokens.

        Raises:
            UserError: see above.
        """
        super().check(model, reward)
        fills_in(model, "unigrpo", "grpo")
        self.check_guidance(model)

    def probe(self, model: MaskedModel, batch: Batch, tools: Tools) -> None:
        """One prediction of the tokens of a micro-batch: gradients are taken one mask at a time."""
        batch = batch[: self.config.micro_batch or len(batch)]
        guidance = model.guidance(self.config.score_cfg_scale)
        masked = torch.full((len(batch), *model.grid()), model.mask_token, device=model.device)
        guided_logits(model, masked, *conditions(model, batch.prompts, guidance, text=False), guidance)

    # -- collect ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, model: MaskedModel, batch: Batch, tools: Tools) -> Collected:
        config, size = self.config, self.config.micro_batch
        drawn = [self.draw(model, rows, tools) for rows in parts_of(batch, size)]
        tokens = torch.cat([found for found, _ in drawn])
        cond = Condition.cat([told for _, told in drawn])
        values = score_latents(model, tools, tokens, batch, config.group, size)
        advantages, terms = self.advantages(values, batch.data["prompt"], tools)
        chunks = []
        for rows in advantages.nonzero().flatten().split(size or len(batch)):
            if len(rows):
                chunks.append(self.scored(model, tokens[rows], cond[rows], advantages[rows], batch[rows], tools))
        height, width = tokens.shape[1:]
        return Collected(chunks=chunks, rows=len(batch), shape=(height, width), terms=terms)

    def draw(self, model: MaskedModel, rows: Batch, tools: Tools) -> tuple[Tensor, Condition]:
        """Tokens ``[m, h, w]`` of some rows, and their conditions."""
        config = self.config
        guidance = self.guidance(model)
        cond, uncond = conditions(model, rows.prompts, guidance, text=False)
        tokens = unmask(
            model,
            cond,
            uncond=uncond,
            guidance=guidance,
            steps=config.steps,
            temperature=(config.temperature, 0.0),
            generator=tools.generators(rows),
        )
        return tokens, cond

    def advantages(self, own: dict[str, Tensor], prompts: Tensor, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages ``[b]`` of this process's rows against those of their prompts on all processes, and terms."""
        everyone = tools.gather(prompts.to(own["reward"].device)).cpu()
        found = group_advantages(tools.gather(own["reward"]).cpu().double(), everyone, noise=self.config.reward_noise)
        terms = {**reward_terms(tools, own), "flat_prompts": flat_share(found, everyone)}
        return found[tools.rank * len(prompts) :][: len(prompts)], terms

    def scored(
        self, model: MaskedModel, tokens: Tensor, cond: Condition, advantages: Tensor, rows: Batch, tools: Tools
    ) -> Chunk:
        """Rows with the masks of all updates and the log-probabilities under the weights of now."""
        shape = tokens.shape[1:]
        flat = tokens.flatten(1)
        hidden = self.hidden(flat.shape[1], rows.data["row"], tools).to(flat.device)
        uncond = model.unconditional(len(flat)) if model.guidance(self.config.score_cfg_scale).contrasts else None
        found = [
            of_drawn(self.log_probs(model, flat, mask, cond, uncond, shape), flat) for mask in hidden.flatten(0, 1)
        ]
        old = torch.stack(found).view(hidden.shape)
        return Chunk(tokens=flat, cond=cond, uncond=uncond, advantages=advantages, hidden=hidden, old=old)

    def hidden(self, tokens: int, rows: Tensor, tools: Tools) -> Tensor:
        """What is masked in each update, bool ``[mu, k, m, n]``; it belongs to the row's number, or its group's."""
        units = rows // self.config.group if self.config.same_mask else rows
        masks = {unit: self.masks_of(unit, tokens, tools) for unit in set(units.tolist())}
        return torch.stack([masks[unit] for unit in units.tolist()], dim=2)

    def masks_of(self, unit: int, tokens: int, tools: Tools) -> Tensor:
        """Masks ``[mu, k, n]`` of a group, or of a picture."""
        config = self.config
        lanes = []
        for lane in range(config.masks // 2 if config.coupled else config.masks):
            rng = tools.shared("masks", unit, lane)
            first = config.ratio_min + (1 - config.ratio_min) * float(torch.rand((), generator=rng))
            shares = mask_shares(first, config.updates)
            lane_masks = torch.stack([draw_mask(tokens, share, rng, config.coupled) for share in shares])
            lanes += [lane_masks, ~lane_masks] if config.coupled else [lane_masks]
        return torch.stack(lanes, dim=1)

    def log_probs(
        self,
        model: MaskedModel,
        tokens: Tensor,
        hidden: Tensor,
        cond: Condition,
        uncond: Condition | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Log-probabilities ``[m, n, v]`` of all tokens given those of ``tokens`` ``[m, n]`` that are not hidden."""
        seen = tokens.masked_fill(hidden, model.mask_token).view(-1, *shape)
        guidance = model.guidance(self.config.score_cfg_scale)
        return guided_logits(model, seen, cond, uncond, guidance).flatten(1, 2).log_softmax(-1)

    # -- update -------------------------------------------------------------------------------------------------

    def update(self, model: MaskedModel, collected: Collected, part: int, tools: Tools) -> Loss:
        found = [
            sums
            for chunk in collected.chunks
            for sums in self.gradients(model, chunk, part, collected.rows, collected.shape, tools)
        ]
        kept = sum(len(chunk.tokens) for chunk in collected.chunks)
        total, kl, clipped, share = torch.stack(found).sum(0) if found else torch.zeros(4)
        terms = {**collected.terms, "clip_fraction": clipped / max(kept, 1), "mask_ratio": share / max(kept, 1)}
        if self.config.beta:
            terms["kl"] = kl / max(kept, 1)
        return Loss(total=total.to(model.device, torch.float32), terms=terms)

    @torch.enable_grad()
    def gradients(
        self, model: MaskedModel, chunk: Chunk, part: int, rows: int, shape: tuple[int, int], tools: Tools
    ) -> Iterator[Tensor]:
        """Add the gradient of some rows' losses, one mask at a time.

        Yields:
            ``[4]`` for each mask: what it adds to the loss, and sums over its rows of the divergence, the clipped share
            and the masked share.
        """
        masks, before = chunk.hidden[part], chunk.old[part]
        for hidden, old, weight in zip(masks, before, self.weights(masks, before.dtype), strict=True):
            given = (model, chunk.tokens, hidden, chunk.cond, chunk.uncond, shape)
            base = None
            if self.config.beta:
                with tools.reference(), torch.no_grad():
                    base = self.log_probs(*given)
            everything = self.log_probs(*given)
            # What is not masked has no part, however far it may have moved.
            now = torch.where(hidden, of_drawn(everything, chunk.tokens), old)
            if part == 0:
                self.require_ratio_one((now - old)[hidden])
            if not self._precise:
                moved = self.rounding(model, chunk, hidden, now.detach(), shape)
                require_precise(moved[hidden], self.config.clip, self.updates)
                self._precise = True
            loss, clipped = clipped_surrogate(now, old, chunk.advantages, self.config.clip)
            kl = torch.zeros_like(loss)
            if base is not None:
                kl = self.divergence(everything, base, chunk.tokens)
            total = (weight * (loss + self.config.beta * kl)).sum() / rows
            (tools.scale * total).backward()
            masked = hidden.to(now).mean(1).sum() / len(masks)
            yield torch.stack([total, (weight * kl).sum(), (weight * clipped).sum(), masked]).detach()

    @torch.no_grad()
    def rounding(self, model: MaskedModel, chunk: Chunk, hidden: Tensor, now: Tensor, shape: tuple[int, int]) -> Tensor:
        """How far rounding alone moves the log-probabilities ``now`` of the drawn tokens, ``[m, n]``."""

        def compute(words: Tensor) -> Tensor:
            cond = replace(chunk.cond, tokens=words)
            return of_drawn(self.log_probs(model, chunk.tokens, hidden, cond, chunk.uncond, shape), chunk.tokens)

        return rounding_of(compute, chunk.cond.tokens, now)

    def divergence(self, now: Tensor, base: Tensor, tokens: Tensor) -> Tensor:
        """From the base, ``[m, n]``, of distributions ``[m, n, v]`` of the tokens ``[m, n]``."""
        return exact_kl(now, base) if self.config.kl == "exact" else k3(of_drawn(now, tokens), of_drawn(base, tokens))

    def weights(self, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What a token counts in its picture's loss, ``[k, m, n]``, for masks ``[k, m, n]``; in all 1.

        Masks count alike, and within a mask its tokens do; of coupled masks each token counts alike, since one of a
        pair may have a single token.
        """
        counts = hidden.sum(-1, keepdim=True) if not self.config.coupled else hidden.shape[-1] / 2
        return hidden.to(dtype) / (counts * len(hidden))

    def require_ratio_one(self, drift: Tensor) -> None:
        """Refuse log-probabilities that moved though no weight did.

        Raises:
            UserError: how far.
        """
        worst = float(drift.detach().abs().max())
        # Rounding may differ where gradients are kept; what counts is that it is far from the clip.
        if not worst <= self.config.clip / 10:
            raise UserError(
                f"before the first update a token's log-probability differs by {worst:.2g} from that of the rollout, "
                f"which is not small beside objective.clip={self.config.clip:g}: turn off dropout in the base, set "
                "train.precision=no, or raise clip"
            )
