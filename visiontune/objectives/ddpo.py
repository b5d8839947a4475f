"""DDPO: policy gradient with advantages against the running statistics of each prompt.

Black et al., "Training Diffusion Models with Reinforcement Learning", 2023, arXiv 2305.13301: DDPO-IS, the clipped
importance-sampled estimator.

    A_i = (r_i - mean_prompt) / std_prompt

over the last rewards of the prompt, or over the whole rollout while the prompt has few. ``kl_penalty`` is that of
Carve3D (Xie et al., 2023, arXiv 2312.13980): the mean over steps of the log-ratio with the base, normalised in the same
way, is taken off the advantage, A_i - kl_penalty (kl_i - mean_prompt) / std_prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visiontune.objectives._advantages import standardised, tracked_advantages
from visiontune.objectives._policy import Policy, PolicyConfig
from visiontune.objectives.base import Tools
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Options of DDPO."""

    tracker: int = option(
        32,
        least=0,
        greatest=1_000_000,
        help="rewards of a prompt that are remembered; 0 compares with the rollout alone",
    )
    min_count: int = option(
        16, least=2, greatest=1_000_000, help="rewards of a prompt from which on they are its yardstick"
    )
    kl_penalty: float = option(
        0.0, least=0, greatest=1e6, help="weight of the normalised log-ratio with the base in the advantage"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.tracker < self.min_count:
            raise ValueError("min_count must be at most tracker, or no prompt ever has enough")


def build(config: Config) -> DDPO:
    """The objective that ``config`` describes."""
    return DDPO(config)


class DDPO(Policy):
    """Keeps the rewards of each prompt in its state, the same on every process."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.penalty = config.kl_penalty

    def normalise(self, values: Tensor, prompts: Tensor, name: str, tools: Tools) -> Tensor:
        if not self.config.tracker:
            return standardised(values, values.mean(), values.std(unbiased=False), self.config.reward_noise)
        seen, config = tools.state.setdefault(name, {}), self.config
        return tracked_advantages(values, prompts, seen, config.tracker, config.min_count, config.reward_noise)
