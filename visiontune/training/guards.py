"""Alarms for models that are trained on a reward: what is drawn and measured, what is too much, what then happens.

A reward that rises says nothing of pictures that it cannot see: past some point every reward is raised by ruining them.
So prompts that are not trained on are drawn now and then, always from the same noise, by the stock pipeline, and what
is measured of them is held against what was measured before the first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.ops.pixels import to_tensor
from visiontune.schema import nearest
from visiontune.training import checkpoint, measures, preview
from visiontune.training.config import GuardsConfig
from visiontune.training.trackers import Meter

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

FOLDER = "guards"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a measure may be.

    Attributes:
        measure: its name; option: what set the bound, for messages.
        low, high: both still good.
    """

    measure: str
    option: str
    low: float = -math.inf
    high: float = math.inf

    def broken(self, values: Mapping[str, float]) -> bool:
        """Whether the measure is there and outside, or no number."""
        return self.measure in values and not self.low <= values[self.measure] <= self.high

    def words(self, values: Mapping[str, float]) -> str:
        """What is wrong, in one clause."""
        value = values[self.measure]
        side = f"above {self.high:.4g}" if not value <= self.high else f"below {self.low:.4g}"
        return f"{self.measure} is {value:.4g}, {side} ({self.option})"


def bounds(config: GuardsConfig, start: Mapping[str, float]) -> list[Bound]:
    """The bounds that ``config`` sets on measures that began at ``start``; a measure that it lacks has none."""
    found = []

    def bound(measure: str, option: str, *, low: float = -math.inf, high: float = math.inf) -> None:
        found.append(Bound(measure=measure, option=f"guards.{option}", low=low, high=high))

    if config.reward_drop is not None and "reward" in start:
        # A cosine of 0.3 that falls to 0.27 is ruined: what a score is worth shows in how pictures differ by it.
        scale = start["reward_std"] or abs(start["reward"])
        bound("reward", "reward_drop", low=start["reward"] - config.reward_drop * scale)
    if config.diversity_min is not None:
        bound("diversity", "diversity_min", low=config.diversity_min * start["diversity"])
    if config.high_frequency_factor is not None:
        share, factor = start["high_frequency"], config.high_frequency_factor
        bound("high_frequency", "high_frequency_factor", low=share / factor, high=share * factor)
    if config.blank_max is not None:
        bound("blank", "blank_max", high=start["blank"] + config.blank_max)
    if config.distance_max is not None:
        bound("distance", "distance_max", high=config.distance_max)
    if config.change_max is not None:
        bound("change", "change_max", high=config.change_max)
    for name, most in config.terms.items():
        bound(name, f"terms.{name}", high=most)
    return found


def check(config: GuardsConfig, objective: Any) -> None:
    """Refuse guards that would have nothing to look at, or would look between the steps of one rollout.

    Raises:
        UserError: naming the option to change.
    """
    if not objective.needs.online:
        raise UserError("guards are for objectives that draw their own pictures and score them: set guards=none")
    if config.every % objective.updates:
        raise UserError(
            f"guards.every={config.every} falls between the steps of one rollout: take a multiple of "
            f"objective.updates={objective.updates}"
        )


class Guard:
    """Looks at a run, and remembers what it saw.

    Args:
        config: bounds and what to do.
        prompts: what is drawn.
        steps, cfg_scale, guidance: how, where ``config`` leaves it open; terms as in a recipe.
        reward: ``(images [b, (f), 3, h, w] in [0, 1], prompts, meta) -> [b]``, or ``None``.

    Attributes:
        start: the measures before the first step. latest: those of the last check.
        good: step of the last check without an alarm.
        factor: of the learning rate.
    """

    def __init__(
        self,
        config: GuardsConfig,
        prompts: Sequence[str],
        *,
        steps: int = 25,
        cfg_scale: float = 4.0,
        guidance: list[str | dict[str, Any]] | None = None,
        reward: Any = None,
    ) -> None:
        self.config, self.prompts, self.reward = config, list(prompts), reward
        self.steps = config.steps if config.steps is not None else steps
        self.cfg_scale = config.cfg_scale if config.cfg_scale is not None else cfg_scale
        own = GuidanceStack.of_options(config, "guards.guidance")
        self.guidance = GuidanceStack.of(guidance) if own is None and guidance is not None else own
        self.meter, self.seen = Meter(), set[str]()
        self.start: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.good, self.checked, self.factor = -1, -1, 1.0
        self.warned: list[str] = []

    def due(self, step: int, total: int) -> bool:
        """Whether ``step`` steps end in a check."""
        return step % self.config.every == 0 or step == total

    # -- measuring ----------------------------------------------------------------------------------------------

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in what a step logs."""
        self.seen.update(values)
        self.meter.add({name: value for name, value in values.items() if name in self.config.terms})

    def draw(self, model: PipelineModel) -> np.ndarray:
        """Pictures ``uint8 [prompts, seeds, (f), h, w, 3]`` of the model as it is."""
        from visiontune.sampling.pipeline import images

        seeds = self.config.seeds
        drawn = images(
            model,
            [prompt for prompt in self.prompts for _ in seeds],
            seeds * len(self.prompts),
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            guidance=self.guidance,
            batch_size=self.config.batch_size,
        )
        return drawn.reshape(len(self.prompts), len(seeds), *drawn.shape[1:])

    def measure(self, images: np.ndarray, out: Path, adapters: Any, device: torch.device) -> dict[str, float]:
        """Everything measured of pictures and weights, by name.

        Args:
            images: from :meth:`draw`.
            out: the run folder, where the pictures of the start lie, unless these are them.
            adapters: the run's set; without one there is no norm of its change.
            device: where the reward computes.
        """
        begun = self._begun(out) if self.start else images
        values = {
            "diversity": measures.diversity(images),
            "high_frequency": measures.high_frequency(images, self.config.high_frequency_from),
            "blank": measures.blank(images, self.config.blank_std),
            "distance": measures.distance(images, begun),
        }
        if adapters is not None:
            values["change"] = measures.change(adapters)
        if self.reward is not None:
            scores = self._scores(images, device)
            values |= {"reward": float(scores.mean()), "reward_std": float(scores.std(unbiased=False))}
        return values

    def _scores(self, images: np.ndarray, device: torch.device) -> Tensor:
        """All seeds of a prompt in one batch, for rewards that compare them."""
        seeds = len(self.config.seeds)
        at_once = max(1, self.config.batch_size // seeds)
        scores = []
        for first in range(0, len(self.prompts), at_once):
            numbers = [i for i in range(first, min(first + at_once, len(self.prompts))) for _ in range(seeds)]
            part = images[first : first + at_once].reshape(-1, *images.shape[2:])
            pixels = to_tensor(part, device)
            scores.append(
                self.reward(pixels, [self.prompts[i] for i in numbers], [{"prompt_id": i} for i in numbers]).cpu()
            )
        return torch.cat(scores).double()

    def _begun(self, out: Path) -> np.ndarray:
        from visiontune.data import pictures

        folder = self.folder(out, 0)
        try:
            rows = [
                [pictures.frames(folder / preview.file_name(i, seed)) for seed in self.config.seeds]
                for i in range(len(self.prompts))
            ]
        except UserError as error:
            raise UserError(f"{folder} holds the pictures that guards compare with, and is damaged: {error}") from error
        return np.array(rows)

    def folder(self, out: Path, step: int) -> Path:
        """Where the pictures of a check lie: of step 0, and of every check with an alarm."""
        return out / FOLDER / preview.folder(out, step).name

    def keep(self, out: Path, step: int, images: np.ndarray) -> None:
        """Write the pictures of a check."""
        pixels = images.reshape(-1, *images.shape[2:])
        preview.write(self.folder(out, step), pixels, self.prompts, self.config.seeds)

    # -- judging ------------------------------------------------------------------------------------------------

    def check(self, step: int, values: Mapping[str, float]) -> list[Bound]:
        """Take in the measures of a check, and those of the meter; the bounds that are broken.

        Raises:
            UserError: a bound on something that the objective does not log.
        """
        if not self.start:
            self.start = dict(values)
        logged = self.meter.take()
        unknown = [name for name in self.config.terms if name not in logged]
        if step and unknown:
            raise UserError(f"guards.terms.{unknown[0]} is not logged by this run{nearest(unknown[0], self.seen)}")
        self.latest, self.checked = {**values, **logged}, step
        alarms = self.standing()
        if not alarms:
            self.good = step
        elif self.config.on_alarm == "lower_lr":
            self.factor *= self.config.lr_factor
        return alarms

    def standing(self) -> list[Bound]:
        """The bounds, as they are set now, that the last check broke."""
        return [bound for bound in bounds(self.config, self.start) if bound.broken(self.latest)] if self.start else []

    def stops(self) -> bool:
        """Whether the run is to end here."""
        return self.config.on_alarm == "stop" and bool(self.standing())

    def report(self, alarms: Sequence[Bound], out: Path) -> None:
        """Say what is wrong: every time that the rate is lowered, otherwise once for each measure."""
        lowered = self.config.on_alarm == "lower_lr"
        new = [alarm for alarm in alarms if lowered or alarm.measure not in self.warned]
        self.warned += [alarm.measure for alarm in new if alarm.measure not in self.warned]
        if new and self.config.on_alarm != "stop":
            done = f"; the learning rate falls to {self.factor:.3g} of the recipe's" if lowered else ""
            _log.warning(
                "guards: at step %d %s%s; see %s",
                self.checked,
                self._words(new),
                done,
                self.folder(out, self.checked),
            )

    def _words(self, alarms: Sequence[Bound]) -> str:
        return ", and ".join(alarm.words(self.latest) for alarm in alarms)

    def last_good(self, out: Path) -> Path | None:
        """The newest checkpoint that is not after the last check without an alarm."""
        return checkpoint.newest(out, self.good)

    def message(self, out: Path, result: Path | None) -> str:
        """What ended the run, and how to go on."""
        good = self.last_good(out)
        saved = "there is no good checkpoint, and no result was written: set a lower train.checkpoint_every"
        if good is not None and result is not None:
            saved = f"the last good checkpoint is {good}, whose weights are in {result}"
        return (
            f"guards stopped the run at step {self.checked}: {self._words(self.standing())}; see "
            f"{self.folder(out, self.checked)}; {saved}. To go on from step {self.checked}, loosen the bound or set "
            "guards.on_alarm=warn, with train.resume=true"
        )

    # -- over a resume ------------------------------------------------------------------------------------------

    _PLAIN: tuple[str, ...] = ("start", "latest", "good", "checked", "factor", "warned")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._PLAIN} | {"meter": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Raises UserError where the checkpoint has none."""
        if not state:
            raise UserError("the checkpoint is of a run without guards, which compare with its start: use another name")
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.meter.load_state_dict(state["meter"])
        self.seen.update(self.meter.sums)
