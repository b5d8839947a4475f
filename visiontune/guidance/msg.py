"""MSG: the score of a reference picture, less the one without a prompt, beside the picture's own in the first steps.

Motionshop, Yesiltepe et al., 2024, arXiv 2412.05355: s(z_t | y) + w (s(z*_t | y*) - s(z_t | no prompt)), where z*_t is
the reference with noise of the same level. Scores are mixed as noise, -sigma s, since z_t and z*_t differ: what is
predicted of them as v or flow is not of one and the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._pictures import check_picture, fitted, latents_of
from visiontune.guidance.base import Point, Pull, Run, Sides, Strength
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Pull):
    """Mixture of score guidance, in one more call of the steps in its window."""

    NEGATIVE: ClassVar[bool] = True
    ROWS: ClassVar[int] = 1

    scale: float = option(1.0, least=-1000, greatest=1000, help="w; 0 is none and costs nothing")
    window: tuple[float, float] = option(
        (0.9, 1.0), least=0, greatest=1, help="levels of noise, both included, between which it acts; 1 is pure noise"
    )
    reference: Any = option(help="file of a picture, in the ratio of what is drawn")
    prompt: str | None = option(None, help="y*, what the reference shows; null for the picture's own prompt")
    seed: int | None = option(
        None,
        least=0,
        greatest=2**63 - 1,
        help="of the reference's noise; null for the noise that the picture begins as",
    )
    fade: float = option(
        0.0, least=0, greatest=1, help="levels of noise at the lower end of the window over which w falls to 0"
    )

    @property
    def remembers(self) -> bool:
        return self.seed is None and not self.idle

    def at(self, level: float) -> float:
        share = min((level - self.window[0]) / self.fade, 1.0) if self.fade else 1.0
        return share * super().at(level)

    def check(self, network: Network) -> None:
        check_picture(self.reference, self.name, "reference")

    def begins(self, run: Run) -> None:
        model = run.modelled(self.name)
        if len(run.shape) > 3:
            raise UserError(f"msg reads a picture, and '{model.source}' draws clips: take a model that draws pictures")
        if run.shape:
            fitted(self.reference, model.downsample, run.shape, self.name, "reference")
        if self.seed is None and run.levels and not self.acts(run.levels[:1]):
            raise UserError(
                "msg noises its reference as the picture begins, and does not act there: give it a seed, or move the "
                "upper end of its window to 1"
            )
        acting = [level for level in run.levels if self.acts([level])]
        times = torch.tensor(acting, dtype=torch.float64) * model.schedule.num_train_timesteps
        if self.seed is not None and not model.schedule.alpha(times).all():
            raise UserError(
                "msg cannot mix other noise into a step that starts from pure noise: leave its seed out, or move the "
                "upper end of its window below 1"
            )

    def pull(self, p: Tensor, u: Tensor | None, s: Strength, sides: Sides, point: Point) -> Tensor:
        assert u is not None and point.schedule is not None
        clean, noise = self._reference(point)
        z = point.schedule.add_noise(clean.to(point.x), noise.to(point.x), point.t)
        reference = sides.at(z.to(point.x.dtype), self._condition(point))
        return (s * noise_difference(point.schedule, (reference, z), (u, point.x), point.t)).to(p.dtype)

    def _reference(self, point: Point) -> tuple[Tensor, Tensor]:
        """The latents of the reference, and their noise, both of the region that is predicted."""
        shape, memory = tuple(point.run.shape), point.memory
        (row, column), (height, width) = point.place, point.x.shape[-2:]
        if "clean" not in memory:
            canvas = replace(point, x=point.x.new_zeros(1, *shape))
            clean = latents_of(self.reference, canvas, self.name, "reference")
            memory["clean"] = clean[..., row : row + height, column : column + width]
            if self.seed is not None:
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
                memory["noise"] = noise[None, ..., row : row + height, column : column + width]
            elif not point.run.levels:
                raise UserError("msg does not know here as what noise the picture begins: give it a seed")
            else:
                memory["noise"] = point.x.detach()
        return memory["clean"], memory["noise"]

    def _condition(self, point: Point) -> Condition | None:
        if self.prompt is None:
            return None
        if "cond" not in point.memory:
            with torch.no_grad():
                point.memory["cond"] = point.run.model.embed([self.prompt])
        found: Condition = point.memory["cond"][torch.zeros(len(point.x), dtype=torch.long)]
        return found


def noise_difference(schedule: Schedule, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    """How much noise one prediction sees more than another one of other latents, as a change of a prediction of theirs.

    Args:
        one, other: a prediction [b, ...], and the latents that it is of. t: [b].

    Returns:
        d with eps(p + d, x) = eps(p, x) + eps(one) - eps(other), of any prediction p of any latents x of time t. Where
        there is no signal the latents must be the same, and the difference is that of the predictions.
    """
    (prediction, z), (base, x) = one, other
    alpha, sigma = (level.to(z) for level in schedule.levels(t, z.ndim))
    per_latents = {"eps": 0 * alpha, "v": sigma / alpha, "flow": 1 / alpha, "x0": -1 / alpha}[schedule.prediction]
    return prediction - base + torch.where(alpha > 0, per_latents, 0.0) * (z - x)


def build(config: Config) -> Config:
    """The term."""
    return config
