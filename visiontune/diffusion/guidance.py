"""Guidance as a value: how what a network says under several conditions becomes one prediction.

The same value guides a rollout, its replay, a reward's gradient and the stock pipeline. `scale` is w in

    u + w (c - u)

with c the prediction for the prompt and u the one to guide away from (Ho and Salimans, 2022, arXiv 2207.12598). What a
family's own pipeline calls its guidance scale, `models.pipeline.PipelineModel.guidance` turns into a value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.schedule import Schedule

Call = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """One way to guide."""

    @property
    def contrasts(self) -> bool:
        """Whether it guides away from something, so that it needs `uncond`."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether a step depends on those before it, or is not all of the way to the next, so that none can be
        computed again by itself."""
        return False

    def begin(
        self,
        model: Any,
        levels: Sequence[float] | None = None,
        whole: bool = True,
        shape: Sequence[int] | None = None,
    ) -> Guidance:
        """The guidance of one run of a model's sampler, for those that reach into its networks or remember steps.

        Args:
            levels: of noise where the steps stand, as far as they are known. whole: whether they are all of a run's.
            shape: [c, (f), h, w] of the latents, as far as it is known.

        Raises:
            UserError: the model is not one that can be guided so, or a part of it acts at none of the levels.
        """
        return self

    def edit(self, x: Tensor, t: Tensor) -> Tensor:
        """Latents [b, ...] as they are when a step starts at t (a scalar; -1 is the end), the first one too."""
        return x

    def stock(self) -> Guidance:
        """What the stock pipeline is told, so that it gives this guidance inside `attach`."""
        return self

    def attach(self, model: Any, prompts: Sequence[str] | None = None) -> AbstractContextManager[Any]:
        """In the block, the model's stock pipeline guides in this way; `prompts` are those that it is called with."""
        return nullcontext()

    @abstractmethod
    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        """The guided prediction.

        Args:
            call: (x, t, condition) -> prediction of the same rows; of a diffusion model `predict`, of masked tokens
                their logits.
            x: [b, ...] what the network sees. t: [b] its timesteps.
            level: [b] t as a share of the schedule; 1 is pure noise.
            cond, uncond: of the rows; `uncond` only where it `contrasts`.
        """


@dataclass(frozen=True, kw_only=True)
class NoGuidance(Guidance):
    """The plain conditional prediction."""

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        return call(x, t, cond)


@dataclass(frozen=True, kw_only=True)
class CFG(Guidance):
    """Classifier-free guidance, u + scale (c - u), in one call of the network.

    Attributes:
        scale: w; 1 is the conditional prediction.
        interval: the levels, both included, at which it guides; elsewhere it is the conditional prediction
            (Kynkaanniemi et al., 2024, arXiv 2404.07724).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"a guidance interval needs 0 <= low < high <= 1, not {low:g} and {high:g}")

    @property
    def contrasts(self) -> bool:
        return True

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        if uncond is None:
            raise ValueError("classifier-free guidance needs the condition that it guides away from")
        whole = self.interval == (0.0, 1.0)
        inside = (level >= self.interval[0]) & (level <= self.interval[1])
        if not whole and not inside.any():
            return call(x, t, cond)
        without, given = both_sides(call, x, t, cond, uncond)
        if whole:
            return self._apart(without, given, self.scale)
        scale = torch.where(inside, self.scale, 1.0).to(given).view(-1, *(1,) * (given.ndim - 1))
        return self._apart(without, given, scale)

    def _apart(self, without: Tensor, given: Tensor, scale: float | Tensor) -> Tensor:
        return without + scale * (given - without)


@dataclass(frozen=True, kw_only=True)
class LengthCFG(CFG):
    """`CFG` of which every part is then brought to the length that it has in the conditional prediction."""

    def _apart(self, without: Tensor, given: Tensor, scale: float | Tensor) -> Tensor:
        far = super()._apart(without, given, scale)
        return far * (self._lengths(given) / self._lengths(far))

    @abstractmethod
    def _lengths(self, x: Tensor) -> Tensor:
        """The length of the part that each value of x [b, c, h, w] is in, in a shape that goes with x."""


@dataclass(frozen=True, kw_only=True)
class RowLengthCFG(LengthCFG):
    """`LengthCFG` whose parts are the rows of a picture, each channel by itself."""

    def _lengths(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class PatchLengthCFG(LengthCFG):
    """`LengthCFG` whose parts are patches, all channels together.

    Attributes:
        patch: side of a patch.
    """

    patch: int = 2

    def _lengths(self, x: Tensor) -> Tensor:
        patches = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))
        lengths = torch.linalg.vector_norm(patches, dim=(1, 3, 5), keepdim=True)
        return lengths.expand(-1, 1, -1, self.patch, -1, self.patch).flatten(4).flatten(2, 3)


@dataclass(frozen=True, kw_only=True)
class WordlessCFG(CFG):
    """`CFG` away from the same rows without their words: all that it needs of another condition is an empty mask."""

    @property
    def contrasts(self) -> bool:
        return False

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        if cond.mask is None:
            raise ValueError("guidance away from rows without words needs conditions with a mask")
        return super().__call__(call, x, t, level, cond, replace(cond, mask=torch.zeros_like(cond.mask)))


@dataclass(frozen=True, kw_only=True)
class EditCFG(Guidance):
    """Guidance by words and by the picture that is edited, in one call of three rows each.

    Brooks et al., "InstructPix2Pix", 2022, arXiv 2211.09800, equation 3: b + image_scale (s - b) + scale (c - s), with
    c the prediction for the prompt, s that for `uncond`, which sees the same picture, and b that for `uncond` and no
    picture, whose channels are 0.

    Attributes:
        scale: of the words. image_scale: of the picture; the larger it is, the nearer to it is what is drawn.
    """

    scale: float
    image_scale: float = 1.5

    @property
    def contrasts(self) -> bool:
        return True

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        if uncond is None:
            raise ValueError("guidance of edits needs the condition that it guides away from")
        channels = cond.extra["channels"]
        seen = replace(uncond, extra={**cond.extra, **uncond.extra, "channels": channels})
        blind = replace(seen, extra={**seen.extra, "channels": torch.zeros_like(channels)})
        rows = Condition.cat([cond, seen, blind])
        given, without, nothing = call(torch.cat([x] * 3), torch.cat([t] * 3), rows).chunk(3)
        return nothing + self.scale * (given - without) + self.image_scale * (without - nothing)


@dataclass(frozen=True, kw_only=True)
class Embedded(Guidance):
    """Guidance that was distilled into the network, which is told the scale as `extra["guidance"]` [b]."""

    scale: float

    def __call__(
        self, call: Call, x: Tensor, t: Tensor, level: Tensor, cond: Condition, uncond: Condition | None
    ) -> Tensor:
        told = cond.tokens.new_full((len(cond),), self.scale, dtype=torch.float32)
        return call(x, t, replace(cond, extra={**cond.extra, "guidance": told}))


NO_GUIDANCE = NoGuidance()


def both_sides(call: Call, x: Tensor, t: Tensor, cond: Condition, uncond: Condition) -> tuple[Tensor, Tensor]:
    """What the network predicts without the prompt and with it, in one call; arguments as of `Guidance`."""
    # What the unconditional rows lack (sizes, pictures) is the same for both, as in the stock pipelines.
    shown = cond.references if uncond.references is None else uncond.references
    uncond = replace(uncond, extra={**cond.extra, **uncond.extra}, references=shown)
    without, given = call(torch.cat([x, x]), torch.cat([t, t]), Condition.cat([uncond, cond])).chunk(2)
    return without, given


def classifier_free(scale: float) -> Guidance:
    """`CFG` of a scale, or none where the scale is 1, at half the cost."""
    return NO_GUIDANCE if scale == 1.0 else CFG(scale=scale)


class Predicting(Protocol):
    """What guidance needs of a model of continuous latents."""

    schedule: Schedule

    def unconditional(self, count: int) -> Condition: ...
    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...


def guided(
    model: Predicting, x_t: Tensor, t: Tensor, cond: Condition, uncond: Condition | None, guidance: Guidance
) -> Tensor:
    """The guided prediction [b, ...] at latents x_t [b, ...] and timesteps t [b].

    `uncond` None takes the family's own, where the guidance needs one.
    """
    if guidance.contrasts and uncond is None:
        uncond = model.unconditional(len(cond))
    level = t.clamp(min=0) / model.schedule.num_train_timesteps
    return guidance.begin(model)(model.predict, x_t, t, level, cond, uncond)
