"""Policy gradients on denoising steps: rollouts with log-probabilities, advantages, and the clipped surrogate.

    L = mean_{i,t} max(-A_i rho_it, -A_i clip(rho_it, 1 - c, 1 + c)) + beta KL_it,   rho = exp(log p - log p_old)

Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, arXiv 2305.13301, section 4 and appendix;
the surrogate is that of PPO (Schulman et al., 2017, arXiv 1707.06347). KL is the exact divergence of a step from that
of the base, KL(N(m, s^2) || N(m_base, s^2)) = |m - m_base|^2 / (2 s^2). Log-probabilities and KL are means over the
values of a latent.

The loss is one of the matrix [b, k] of rows and steps, of which each entry depends on one denoising step alone; so one
step of a micro-batch is computed, differentiated and let go at a time, in one forward and one backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.pathwise import gradient_of, into_conditions, leaf_of
from visiontune.diffusion.replay import latent, replay, revisit, rounding
from visiontune.diffusion.trajectory import Trajectory
from visiontune.diffusion.transition import gaussian_kl, log_prob
from visiontune.errors import UserError
from visiontune.objectives._advantages import extremes, flat_share
from visiontune.objectives._draw import draw, score_latents
from visiontune.objectives._online import GroupConfig, Stepped, SteppedConfig, conditions, require_precise
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(GroupConfig, SteppedConfig):
    """Options that policy gradients have in common."""

    steps: int = option(50, least=1, greatest=100_000, help="sampling steps of a rollout")
    cfg_scale: float = option(
        5.0, least=-1000, greatest=1000, help="guidance of the rollout and of its replay; 1 for none, at half the cost"
    )
    dynamics: str | dict[str, Any] = option(
        {"name": "ddim", "eta": 1.0}, help="how the sampler steps; it must add noise"
    )
    group: int = option(
        1, least=1, greatest=65536, help="pictures of each prompt in a rollout; train.batch_size is a multiple of it"
    )
    updates: int = option(1, least=1, greatest=65536, help="optimiser steps into which the rows of a rollout are dealt")
    inner_epochs: int = option(1, least=1, greatest=1000, help="times that a rollout is gone through")
    timestep_fraction: float = option(
        1.0, above=0, greatest=1, help="share of the steps that is trained on, drawn anew for each group"
    )
    clip: float = option(
        1e-4, above=0, greatest=1000, help="the ratio is clipped to 1 - clip .. 1 + clip; for log-probabilities by mean"
    )
    advantage_clip: float = option(5.0, above=0, greatest=1e6, help="greatest advantage")
    per_reward: bool = option(False, help="normalise each term of a reward mix by itself, then add by their weights")
    micro_batch: int | None = option(
        None, least=1, greatest=4096, help="pictures drawn and replayed at once; null for all of an update"
    )


def clipped_surrogate(now: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss of every entry and whether it was clipped, both in the shape of ``now``.

    Args:
        now, old: [b, k] or [b], log-probabilities of the same transitions; only ``now`` may have a graph.
        advantages: [b].
    """
    ratio = (now - old).exp()
    gain = advantages.view(-1, *(1,) * (now.ndim - 1)).to(now)
    loss, clipped = -gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(loss, clipped), (clipped > loss).detach()


# ----------------------------------------------------------------------------------------------------- rollouts


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Rows that were drawn in one batch, or scored again in it: replayed in the same shape, their ratio is exactly 1.

    Attributes:
        trajectory: n rows, on the CPU, with ``log_probs``.
        batch: their prompts.
        advantages: [n]. kept: [n] bool, the rows to be trained on; others count nothing.
    """

    trajectory: Trajectory
    batch: Batch
    advantages: Tensor
    kept: Tensor

    def __len__(self) -> int:
        return len(self.advantages)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """What one ``collect`` gives.

    Attributes:
        pieces: the chunks of each optimiser step of an epoch.
        rows: rows of an optimiser step, with those that were dropped since they teach nothing.
        terms: for the logs.
    """

    pieces: list[list[Chunk]]
    rows: float
    terms: dict[str, Tensor]


class Policy(Stepped):
    """Policy gradient on the steps of a stochastic sampler.

    Attributes:
        beta: weight of the exact divergence from the base in the loss.
        penalty: weight of the normalised log-ratio with the base in the advantage.
        chosen: rows of each group that are trained on; ``None`` for all.
        last: whether to train on the last step.
        shared_start: whether the pictures of a group start from the same noise.
    """

    likelihoods = True
    config: PolicyConfig
    beta: float = 0.0
    penalty: float = 0.0
    chosen: int | None = None
    last: bool = True
    shared_start: bool = False

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.updates = config.updates * config.inner_epochs
        self._precise = self.updates == 1

    @property
    def needs(self) -> Needs:
        return replace(super().needs, reference=self.beta > 0 or self.penalty > 0)

    def check(self, model: DiffusionModel, reward: Any) -> None:
        """Besides, refuse terms to normalise where there are none."""
        super().check(model, reward)
        if self.config.per_reward and not getattr(reward, "weights", {}):
            raise UserError(f"per_reward is for a reward mix, and '{reward.name}' has no terms: set it to false")

    @abstractmethod
    def normalise(self, values: Tensor, prompts: Tensor, name: str, tools: Tools) -> Tensor:
        """Advantages [n] of float64 values [n] of all processes; ``name`` tells kinds of values apart."""

    # -- collect ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Collected:
        config = self.config
        if len(batch) % config.updates:
            raise UserError(f"train.batch_size={len(batch)} is no multiple of objective.updates={config.updates}")
        deal = self.deal(len(batch), tools)
        each = len(batch) // config.updates
        parts = [rows for piece in deal.split(each) for rows in piece.split(config.micro_batch or each)]
        drawn = [draw(self, model, batch[rows], tools, latents=self.start(model, batch[rows], tools)) for rows in parts]
        back = torch.argsort(deal)
        latents = torch.cat([trajectory.final for trajectory in drawn])[back]
        values = score_latents(model, tools, latents, batch, config.group, config.micro_batch)
        if self.penalty:
            ratios = [self.log_ratio(model, batch[r], d, tools) for r, d in zip(parts, drawn, strict=True)]
            values["kl"] = torch.cat(ratios)[back]
        advantages, terms = self.advantages(values, batch.data["prompt"], tools)
        if self.chosen is None:
            kept = torch.ones(len(batch), dtype=torch.bool)
        else:
            kept = extremes(advantages, config.group, self.chosen)
        rows = float(kept.sum()) / config.updates
        kept &= advantages != 0
        chunks = [
            Chunk(trajectory=trajectory, batch=batch[rows], advantages=advantages[rows], kept=kept[rows])
            for rows, trajectory in zip(parts, drawn, strict=True)
        ]
        turn = len(chunks) // config.updates
        pieces = [chunks[i : i + turn] for i in range(0, len(chunks), turn)]
        if not tools.lockstep:
            pieces = [self.pack(model, piece) for piece in pieces]
        return Collected(pieces=pieces, rows=rows, terms=terms)

    def deal(self, rows: int, tools: Tools) -> Tensor:
        """[b] the rows in the order in which optimiser steps take them."""
        if self.config.updates == 1:
            return torch.arange(rows)
        return torch.randperm(rows, generator=tools.shared("deal"))

    def start(self, model: DiffusionModel, rows: Batch, tools: Tools) -> Tensor | None:
        """The noise from which the rows start, one for each group; ``None`` for each row its own."""
        if not self.shared_start:
            return None
        shape = model.latent_shape()
        groups = (rows.data["row"] // self.config.group).tolist()
        return torch.stack([torch.randn(shape, generator=tools.shared("start", group)) for group in groups])

    def log_ratio(self, model: DiffusionModel, rows: Batch, trajectory: Trajectory, tools: Tools) -> Tensor:
        """[n] mean log-ratio of the steps that were taken under the weights of now and of the base."""
        with tools.reference():
            cond, uncond = self.own_conditions(model, rows, tools)
            base = replay(model, trajectory, cond=cond, uncond=uncond)
        assert trajectory.log_probs is not None
        return (trajectory.log_probs[:, trajectory.scored] - base.cpu()).mean(1)

    def own_conditions(
        self, model: DiffusionModel, rows: Batch, tools: Tools
    ) -> tuple[Condition | None, Condition | None]:
        """What the base would have been given, where that is not what the trajectory holds."""
        if not tools.text:
            return None, None
        with torch.no_grad():
            return conditions(model, rows.prompts, self.guidance(model), text=False)

    def advantages(self, own: dict[str, Tensor], prompts: Tensor, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [b] of this process's rows, normalised over all processes, and terms for the logs."""
        device = own["reward"].device
        everyone = tools.gather(prompts.to(device)).cpu()
        values = {name: tools.gather(value.to(device).float()).cpu().double() for name, value in own.items()}
        weights = {"reward": 1.0}
        if self.config.per_reward:
            mix: Any = tools.reward
            weights = {f"reward/{name}": factor for name, factor in mix.weights.items()}
        total = torch.zeros(len(everyone), dtype=torch.float64)
        for name, factor in weights.items():
            total += factor * self.normalise(values[name], everyone, name, tools)
        terms = {"flat_prompts": flat_share(total, everyone)}
        if self.penalty:
            total -= self.penalty * self.normalise(values["kl"], everyone, "kl", tools)
        total = total.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        terms |= {name: value.mean() for name, value in values.items()}
        terms |= {"reward_std": values["reward"].std(unbiased=False), "advantage": total.abs().mean()}
        return total[tools.rank * len(prompts) :][: len(prompts)], terms

    def pack(self, model: DiffusionModel, chunks: list[Chunk]) -> list[Chunk]:
        """The rows of an optimiser step that are kept: in the batches of the rollout, or if some are left out in new
        ones, for which they are scored again, since rounding depends on the batch."""
        kept = torch.cat([chunk.kept for chunk in chunks])
        if kept.all():
            return chunks
        whole = Trajectory.cat([chunk.trajectory for chunk in chunks])
        batch = Batch.cat([chunk.batch for chunk in chunks])
        advantages = torch.cat([chunk.advantages for chunk in chunks])
        return [
            Chunk(
                trajectory=self.rescored(model, whole[rows]),
                batch=batch[rows],
                advantages=advantages[rows],
                kept=kept[rows],
            )
            for rows in kept.nonzero().flatten().split(len(chunks[0]))
            if len(rows)
        ]

    @torch.no_grad()
    def rescored(self, model: DiffusionModel, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probabilities that its rows have in this batch."""
        scores = torch.zeros_like(trajectory.log_probs)  # type: ignore[arg-type]
        scores[:, trajectory.scored] = replay(model, trajectory).to(scores)
        return replace(trajectory, log_probs=scores)

    # -- update -------------------------------------------------------------------------------------------------

    def update(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> Loss:
        epoch, turn = divmod(part, self.config.updates)
        order = torch.randperm(self.config.updates, generator=tools.shared("pieces", epoch))
        found: dict[str, list[Tensor]] = {"loss": [], "clip_fraction": [], "kl": []}
        for chunk in collected.pieces[int(order[turn])]:
            steps = self.timesteps(chunk, epoch, tools)
            weight = 1 / (collected.rows * steps.shape[1])
            if not self._precise:
                # Once in a run: the precision stays, and so does what the trained steps round to.
                require_precise(rounding(model, chunk.trajectory), self.config.clip, self.updates)
                self._precise = True
            matrices = self.gradients(model, chunk, steps, weight, part == 0, tools)
            found["loss"].append(weight * matrices["loss"].sum())
            found["clip_fraction"].append(len(chunk) / collected.rows * matrices["clipped"].float().mean())
            found["kl"].append(len(chunk) / collected.rows * matrices["kl"].mean())
        sums = {name: torch.stack(parts).sum() if parts else torch.zeros(()) for name, parts in found.items()}
        total = sums.pop("loss").to(model.device, torch.float32)
        if not self.beta:
            del sums["kl"]
        return Loss(total=total, terms={**collected.terms, **sums})

    def timesteps(self, chunk: Chunk, epoch: int, tools: Tools) -> Tensor:
        """[n, k] the steps that each row is trained on, drawn for its group."""
        able = chunk.trajectory.scored.clone()
        if not self.last:
            able[-1] = False
        steps = able.nonzero().flatten()
        if not len(steps):
            raise UserError("no step is left to train on: raise objective.steps")
        count = max(1, round(self.config.timestep_fraction * len(steps)))
        if count == len(steps):
            return steps.expand(len(chunk), -1)
        groups = (chunk.batch.data["row"] // self.config.group).tolist()
        drawn = [torch.randperm(len(steps), generator=tools.shared("steps", epoch, group)) for group in groups]
        return torch.stack([steps[order[:count].sort().values] for order in drawn])

    @torch.enable_grad()
    def gradients(
        self, model: DiffusionModel, chunk: Chunk, steps: Tensor, weight: float, first: bool, tools: Tools
    ) -> dict[str, Tensor]:
        """Add the gradient of ``weight`` times the sum of the losses of some rows and steps.

        Args:
            steps: [n, k] of each row. first: whether the weights are those of the rollout, so that ratios must be 1.

        Returns:
            ``loss``, ``clipped`` and ``kl``, each [n, k].
        """
        trajectory, rows = chunk.trajectory, torch.arange(len(chunk))
        assert trajectory.log_probs is not None
        base = self.base_means(model, chunk, steps, tools) if self.beta else None
        live: tuple[Condition | None, Condition | None] = (None, None)
        if tools.text:
            live = conditions(model, chunk.batch.prompts, self.guidance(model), text=True)
        # The encoder's graph is walked once, with the gradients of all steps.
        cond, uncond = (None if value is None else leaf_of(value) for value in live)
        found: dict[str, list[Tensor]] = {"loss": [], "clipped": [], "kl": [], "drift": []}
        for j, step in enumerate(steps.unbind(1)):
            mean, std = revisit(model, trajectory, step, cond=cond, uncond=uncond)
            now = log_prob(latent(trajectory, step + 1, model.device), mean, std, trajectory.reduce)
            old = trajectory.log_probs[rows, step].to(now)
            loss, clipped = clipped_surrogate(now, old, chunk.advantages, self.config.clip)
            kl = torch.zeros_like(loss) if base is None else gaussian_kl(mean, base[j], std, trajectory.reduce)
            loss, clipped, kl = (chunk.kept.to(loss) * value for value in (loss + self.beta * kl, clipped, kl))
            (tools.scale * weight * loss).sum().backward()
            parts = {"loss": loss, "clipped": clipped, "kl": kl, "drift": now - old}
            for name, value in parts.items():
                found[name].append(value.detach())
        for told, leaf in zip(live, (cond, uncond), strict=True):
            if told is not None and leaf is not None:
                into_conditions(told, gradient_of(leaf))
        matrices = {name: torch.stack(columns, dim=1) for name, columns in found.items()}
        if first:
            self.require_ratio_one(matrices["drift"].cpu(), trajectory.timesteps[steps])
        return matrices

    @torch.no_grad()
    def base_means(self, model: DiffusionModel, chunk: Chunk, steps: Tensor, tools: Tools) -> list[Tensor]:
        """Means of the base's steps, each [n, c, (f), h, w]."""
        with tools.reference():
            cond, uncond = self.own_conditions(model, chunk.batch, tools)
            return [revisit(model, chunk.trajectory, step, cond=cond, uncond=uncond)[0] for step in steps.unbind(1)]

    def require_ratio_one(self, drift: Tensor, timesteps: Tensor) -> None:
        """Refuse log-probabilities [n, k] that moved though no weight did.

        Raises:
            UserError: names the timestep.
        """
        worst = drift.abs().flatten().argmax()
        found, t = float(drift.flatten()[worst]), float(timesteps.flatten()[worst])
        # Rounding may differ where gradients are kept; what counts is that it is far from the clip.
        if not abs(found) <= self.config.clip / 10:
            raise UserError(
                f"before the first update a log-probability differs by {found:.2g} from that of the rollout (at t = "
                f"{t:g}), which is not small beside objective.clip={self.config.clip:g}: turn off dropout in the base, "
                "set train.precision=no, or raise clip"
            )
