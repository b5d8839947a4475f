"""What online objectives share: the options of a rollout, conditions, pictures, and their rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Batch, Condition
from visiontune.diffusion.dynamics import make_dynamics
from visiontune.diffusion.guidance import Guidance, guided
from visiontune.diffusion.replay import micro_batches
from visiontune.diffusion.trajectory import Start, require_no_memory, rollout
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack, guidance_of
from visiontune.objectives._advantages import NOISE
from visiontune.objectives.base import Needs, Online, Tools, continuous, draws_clips
from visiontune.ops.pixels import shown
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Options of a rollout, which every online objective has."""

    steps: int = option(25, least=1, greatest=100_000, help="sampling steps of a rollout")
    cfg_scale: float = option(4.0, least=-1000, greatest=1000, help="guidance of the rollout; 1 for none")
    guidance: list[str | dict[str, Any]] | None = option(
        None,
        help="terms that guide together, on top of cfg_scale or in its place, as of sample; null for cfg_scale alone",
    )
    micro_batch: int | None = option(
        None, least=1, greatest=4096, help="pictures drawn and differentiated at once; null for all"
    )

    def __post_init__(self) -> None:
        GuidanceStack.of_options(self, "objective.guidance")


@dataclass(frozen=True, kw_only=True)
class SteppedConfig(OnlineConfig):
    """Options of a rollout of continuous latents."""

    dynamics: str | dict[str, Any] = option("ddim", help="how the sampler steps: a name, or {name: ddim, eta: 1.0}")

    def __post_init__(self) -> None:
        super().__post_init__()
        make_dynamics(self.dynamics)


@dataclass(frozen=True, kw_only=True)
class GroupConfig(OnlineConfig):
    """Options of objectives that score several pictures of each prompt, and may use a rollout more than once."""

    group: int = option(8, least=2, greatest=65536, help="pictures of each prompt, which are compared with each other")
    updates: int = option(1, least=1, greatest=65536, help="optimiser steps for each rollout")
    reward_noise: float = option(
        NOISE, least=0, greatest=1e6, help="difference up to which rewards count as equal; so does rounding of them"
    )


class Rollouts(Online):
    """An online objective with options of a rollout."""

    config: OnlineConfig

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        if isinstance(config, GroupConfig):
            self.group, self.updates = config.group, config.updates

    @property
    def needs(self) -> Needs:
        return Needs(online=True, reward=True)

    def guidance(self, model: PipelineModel) -> Guidance:
        """How the rollouts are guided."""
        return guidance_of(model, self.config.cfg_scale, GuidanceStack.of_options(self.config))

    def check_guidance(self, model: PipelineModel) -> None:
        """Refuse guidance that the model, or the objective, cannot be given; called by `check`."""
        guidance = self.guidance(model)
        if isinstance(guidance, GuidanceStack):
            guidance.plan(model, self.config.steps)


class Stepped(Rollouts):
    """Draws continuous latents by the steps of a sampler.

    Attributes:
        dynamics: how it steps.
        likelihoods: whether the log-probabilities of the steps are needed, and so a sampler with noise.
    """

    config: SteppedConfig
    likelihoods: ClassVar[bool] = False

    def __init__(self, config: SteppedConfig) -> None:
        super().__init__(config)
        self.dynamics = make_dynamics(config.dynamics)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a model without continuous latents, and a sampler that does not suit it or adds no noise."""
        super().check(model, reward)
        continuous(model)
        if self.needs.reward and draws_clips(model) and not getattr(reward, "clips", False):
            raise UserError(
                f"reward '{reward.name}' scores pictures, and '{model.source}' ({model.family}) draws clips: take a "
                "reward of clips"
            )
        self.dynamics.check(model.schedule.prediction)
        self.check_guidance(model)
        if self.likelihoods:
            self.dynamics.require_noise()
            require_no_memory(self.guidance(model))

    def drawn_by_base(self, model: DiffusionModel, rows: Batch, tools: Tools, *key: int | str) -> Tensor:
        """Clean latents ``[b, ...]`` that the untrained model draws under the guidance, from noise of this key."""
        guidance = self.guidance(model)
        with tools.reference():
            cond, uncond = conditions(model, rows.prompts, guidance, text=False)
            return rollout(
                model,
                cond,
                uncond=uncond,
                guidance=guidance,
                chain=self.config.steps,
                dynamics=self.dynamics,
                start=Start(generator=tools.generators(rows, *key)),
            ).final

    def probe(self, model: DiffusionModel, batch: Batch, tools: Tools) -> None:
        """One guided prediction of a micro-batch: gradients are taken one prediction at a time."""
        batch = batch[: self.config.micro_batch or len(batch)]
        guidance = self.guidance(model)
        cond, uncond = conditions(model, batch.prompts, guidance, tools.text)
        shape = model.latent_shape()
        t = model.chain(self.config.steps, shape)[0][:1].to(model.device).expand(len(batch))
        guided(model, torch.randn(len(batch), *shape, device=model.device), t, cond, uncond, guidance)


def conditions(
    model: PipelineModel, prompts: Sequence[str], guidance: Guidance, text: bool
) -> tuple[Condition, Condition | None]:
    """What to draw and, where guidance needs it, what to guide away from; with a graph where ``text`` is trained."""
    with torch.set_grad_enabled(text and torch.is_grad_enabled()):
        cond = model.embed(prompts)
        return cond, model.unconditional(len(prompts)) if guidance.contrasts else None


def pixels(model: PipelineModel, latents: Tensor) -> Tensor:
    """Pictures ``[b, 3, h, w]`` or clips ``[b, f, 3, h, w]`` in [0, 1], as rewards take them; differentiable inside.

    ``latents`` of a masked model are its tokens.
    """
    return shown(model.decode(latents))


def parts_of(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in pieces of at most ``size`` rows."""
    for rows in micro_batches(len(batch), size):
        yield batch[rows]


def score(tools: Tools, images: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Rewards ``[b]`` of pictures of a batch's prompts as ``reward``, and of a mix each term as ``reward/<term>``."""
    assert tools.reward is not None
    meta = [{"prompt_id": int(i)} for i in batch.data["prompt"]]
    rewards = tools.reward(images, batch.prompts, meta)
    terms = getattr(tools.reward, "terms", {})
    return {"reward": rewards, **{f"reward/{name}": value.to(rewards) for name, value in terms.items()}}


def require_precise(moved: Tensor, clip: float, updates: int) -> None:
    """Refuse to use a rollout more than once where rounding, and not training, decides what is clipped.

    Args:
        moved: how far rounding alone moves log-probabilities, of any shape.
        clip: how far they may move. updates: for how many the rollout serves.

    Raises:
        UserError: in what precision it could be.
    """
    size = float(moved.double().square().mean().sqrt())
    if not size <= clip:
        raise UserError(
            f"the rollout serves {updates} updates, and rounding moves log-probabilities by {size:.2g} between them, "
            f"more than objective.clip={clip:g}: set train.precision=no and model.dtype=fp32, use each rollout once "
            "(objective.updates=1, and inner_epochs), or raise clip"
        )


def reward_terms(tools: Tools, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For the logs: means over the rows of all processes of what :func:`score` gave, and the reward's deviation."""
    everyone = {name: tools.gather(values.detach()) for name, values in scores.items()}
    means = {name: values.mean() for name, values in everyone.items()}
    return {**means, "reward_std": everyone["reward"].std(unbiased=False)}
