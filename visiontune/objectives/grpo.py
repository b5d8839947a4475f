"""GRPO for diffusion and flow: each picture is compared with the others of its prompt.

    A_i = (r_i - mean_group) / std_group

Flow-GRPO (Liu et al., 2025, arXiv 2505.05470) adds the exact divergence of each step from the base to the loss
(``beta``; its code leaves the length of the step out of it: docs/objectives/grpo.md) and may divide by the deviation of
the whole rollout (``std: global``). DanceGRPO (Xue et al., 2025, arXiv 2505.07818) starts the pictures of a group from
the same noise, trains on a random share of the steps, and may keep the best and worst of a larger group alone. Any
dynamics with noise will do: ``ddim`` with eta 1 for models that predict eps, v or x_0; ``flow-sde``, ``dance-sde`` or
``cps`` for flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from visiontune.objectives._advantages import group_advantages
from visiontune.objectives._policy import Policy, PolicyConfig
from visiontune.objectives.base import Tools
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """Options of GRPO."""

    steps: int = option(10, least=1, greatest=100_000, help="sampling steps of a rollout")
    cfg_scale: float = option(
        4.5, least=-1000, greatest=1000, help="guidance of the rollout and of its replay; 1 for none, at half the cost"
    )
    group: int = option(8, least=2, greatest=65536, help="pictures of each prompt, which are compared with each other")
    std: Literal["group", "global"] = option("group", help="deviation that advantages are divided by")
    beta: float = option(
        0.0,
        least=0,
        greatest=1e6,
        help="weight of a step's exact divergence from the base, by mean; Flow-GRPO's code: its beta over the steps",
    )
    same_noise: bool = option(False, help="start the pictures of a group from the same noise")
    best_of: int | None = option(
        None, least=2, greatest=65536, help="train on so many of each group, half the best and half the worst"
    )
    last_step: bool = option(False, help="train on the last step too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of is not None and self.best_of > self.group:
            raise ValueError("best_of must be at most group, or null")


def build(config: Config) -> GRPO:
    """The objective that ``config`` describes."""
    return GRPO(config)


class GRPO(Policy):
    """Rows of groups whose rewards are all equal are dropped, and counted as ``flat_prompts``."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.beta, self.chosen = config.beta, config.best_of
        self.last, self.shared_start = config.last_step, config.same_noise

    def normalise(self, values: Tensor, prompts: Tensor, name: str, tools: Tools) -> Tensor:
        return group_advantages(values, prompts, self.config.std == "global", self.config.reward_noise)
