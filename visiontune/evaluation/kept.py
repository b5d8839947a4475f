"""What a run has learnt of its subject against what it has kept of its base, at several checkpoints and strengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visiontune.data import transforms
from visiontune.data.base import substitute
from visiontune.data.prompts import listed_prompts
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation import together
from visiontune.evaluation.metrics import image_features
from visiontune.evaluation.personalise import measure
from visiontune.models.clip import load_clip
from visiontune.models.pocket import PREFIX
from visiontune.pocket.world import SUBJECTS
from visiontune.sampling.pipeline import images
from visiontune.training import checkpoint
from visiontune.training.optim import OPTIMIZERS

if TYPE_CHECKING:
    from visiontune.adapters.base import AdapterSet
    from visiontune.config import Run
    from visiontune.models.pipeline import PipelineModel
    from visiontune.training.config import TrainConfig

_PICTURES, _SEEDS = 20, (101, 102, 103, 104)


@dataclass(frozen=True, kw_only=True)
class Point:
    """How a run stands at one checkpoint and strength.

    Attributes:
        step: of the checkpoint. scale: strength; 0 is the base.
        learnt: 0 as little as the base, 1 the subject. kept: 1 everything, 0 nothing.
        scores: what both were made of.
    """

    step: int
    scale: float
    learnt: float
    kept: float
    scores: dict[str, float]

    def __str__(self) -> str:
        return f"step {self.step} at strength {self.scale:g}: {self.learnt:.0%} learnt, {self.kept:.0%} kept"


class Judge(Protocol):
    """Looks at the model as it is now."""

    def __call__(self, model: PipelineModel) -> tuple[float, float, dict[str, float]]:
        """``learnt``, ``kept`` and what they are made of; the first model that it sees is the base."""


class Oracle:
    """Judges a subject of the pocket world, where it is known what a picture shows.

    ``learnt`` is the share of pictures in which it is recognised; ``kept`` the mean of the shares of ordinary prompts
    and of prompts for its plain class that are drawn right.
    """

    def __init__(
        self, run: Run, ordinary: int = 60, steps: int = 25, cfg_scale: float = 4.0, seeds: int = len(_SEEDS)
    ) -> None:
        self.subject, self.trigger = run.data.root.removeprefix("pocket/"), run.data.trigger
        self.references = np.stack([np.asarray(sample.sources["image"].open()) for sample in read(run.data)])
        self.ordinary, self.steps, self.cfg_scale, self.seeds = ordinary, steps, cfg_scale, _SEEDS[:seeds]

    def __call__(self, model: PipelineModel) -> tuple[float, float, dict[str, float]]:
        scores = measure(
            model,
            self.subject,
            self.trigger,
            self.references,
            ordinary=self.ordinary,
            seeds=self.seeds,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
        ).scores()
        return scores["subject_known"], (scores["prompt_accuracy"] + scores["class_kept"]) / 2, scores


class Several:
    """Judges several subjects of the pocket world; see :mod:`visiontune.evaluation.together`.

    ``learnt`` is the share of pictures of two of them in which both are known and nothing else is; ``kept`` as for one.
    """

    def __init__(
        self, run: Run, ordinary: int = 60, steps: int = 25, cfg_scale: float = 4.0, seeds: int = len(_SEEDS)
    ) -> None:
        self.triggers = {one.root.removeprefix("pocket/"): one.trigger for one in run.data.each()}
        self.sizes: dict[str, Any] = {
            "ordinary": ordinary,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "seeds": _SEEDS[:seeds],
        }

    def __call__(self, model: PipelineModel) -> tuple[float, float, dict[str, float]]:
        scores = together.measure(model, self.triggers, **self.sizes).scores()
        return scores["both"], (scores["prompt_accuracy"] + scores["class_kept"]) / 2, scores


class Likeness:
    """Judges any subject by the cosines of a CLIP's image features.

    ``learnt`` places the likeness of the subject's pictures to the user's between that of the base's (0) and that of
    the user's pictures to each other (1). ``kept`` places the likeness of a picture of an ordinary prompt to the one
    that the base draws of it, from the same noise, between that of pictures of different prompts (0) and sameness (1).
    A CLIP does not see everything: what it is blind to counts as learnt and kept.
    """

    def __init__(
        self,
        run: Run,
        clip: str,
        ordinary: int = 24,
        steps: int = 25,
        cfg_scale: float = 4.0,
        seeds: int = len(_SEEDS),
    ) -> None:
        self.encoder, self.steps, self.cfg_scale, self.seeds = load_clip(clip), steps, cfg_scale, _SEEDS[:seeds]
        samples = read(run.data)[:_PICTURES]
        if len(samples) < 2:
            raise UserError("how alike the subject's pictures are cannot be told from one: give two or more")
        side = run.data.resolution or 224
        self.user = torch.cat([self._features(_square(s.sources["image"].open(), side)) for s in samples])
        words = run.data.prompt or "a photo of a [trigger] [class]"
        self.asked = [substitute(words, run.data.trigger, run.data.class_noun)]
        everyday = [prompt for prompt in listed_prompts("everyday") or [] if "[class]" not in prompt]
        self.ordinary = everyday[:: max(1, len(everyday) // ordinary)][:ordinary]
        self.base: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: PipelineModel) -> tuple[float, float, dict[str, float]]:
        subject = self._features(self._draw(model, self.asked, self.seeds))
        ordinary = self._features(self._draw(model, self.ordinary, _SEEDS[:1]))
        if self.base is None:
            self.base = subject, ordinary
        begun, before = self.base
        alike, apart = _off_diagonal(self.user @ self.user.T), _off_diagonal(before @ before.T)
        likeness, least = float((subject @ self.user.T).mean()), float((begun @ self.user.T).mean())
        same = float((ordinary * before).sum(-1).mean())
        scores = {"likeness": likeness, "likeness_of_base": least, "likeness_among_pictures": alike, "same": same}
        return _between(likeness, least, alike), _between(same, apart, 1.0), scores

    def _draw(self, model: PipelineModel, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        every = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
        return images(model, *every, steps=self.steps, cfg_scale=self.cfg_scale)

    def _features(self, pictures: np.ndarray) -> Tensor:
        return image_features(pictures, self.encoder).cpu()


def _square(picture: Image.Image, side: int) -> np.ndarray:
    """A picture's middle as ``uint8 [1, side, side, 3]``."""
    pixels = transforms.to_pixels(picture, (side, side))
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)[None].numpy()


def _off_diagonal(cosines: Tensor) -> float:
    count = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def _between(value: float, low: float, high: float) -> float:
    """Where ``value`` lies from ``low`` (0) to ``high`` (1), cut there."""
    return float(np.clip((value - low) / max(high - low, 1e-6), 0, 1))


def judge_of(run: Run, clip: str | None = None, **sizes: Any) -> Judge | None:
    """The oracle for subjects of the pocket world, else a CLIP; ``sizes`` are those of its class.

    ``None`` where no CLIP is named, and the subject is the user's own.

    Raises:
        UserError: a CLIP is to judge several subjects; one of the pocket world comes twice.
    """
    if run.data.subjects:
        return _judge_of_several(run, clip, **sizes)
    if clip is not None:
        return Likeness(run, clip, **sizes)
    if run.data.root.removeprefix("pocket/") in SUBJECTS and run.model.source.startswith(PREFIX):
        return Oracle(run, **sizes)
    return None


def _judge_of_several(run: Run, clip: str | None, **sizes: Any) -> Judge | None:
    roots = [one.root.removeprefix("pocket/") for one in run.data.each()]
    if clip is not None:
        raise UserError(
            "a CLIP judges how alike pictures are to those of one subject, and this run has several: set judge=none"
        )
    if not {*roots} <= SUBJECTS.keys() or not run.model.source.startswith(PREFIX):
        return None
    if len({*roots}) < len(roots):
        raise UserError("the oracle tells subjects apart, and one of these comes twice: set judge=none")
    return Several(run, **sizes)


def points(
    model: PipelineModel,
    adapters: AdapterSet,
    states: Sequence[tuple[int, Mapping[str, Tensor], Sequence[float]]],
    judge: Judge,
) -> Iterator[Point]:
    """Judge the base, and then every checkpoint at its strengths; the last one's tensors stay in the adapters.

    Args:
        model: with the adapters attached.
        states: of each checkpoint the step, the adapters' tensors by their names in the set, and strengths.
        judge: see :func:`judge_of`.

    Raises:
        UserError: a checkpoint has other tensors than the adapter.
    """
    with adapters.disable():
        yield point(0, 0.0, judge(model))
    own = {**dict(adapters.named_parameters()), **dict(adapters.named_buffers())}
    for step, state, scales in states:
        strange = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
        if strange:
            raise UserError(f"the checkpoint of step {step} does not fit the adapter ({strange[0]}): leave it out")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        adapters.refresh()
        for scale in scales:
            adapters.scale = scale
            yield point(step, scale, judge(model))


def point(step: int, scale: float, judged: tuple[float, float, dict[str, float]]) -> Point:
    """What a judge said of a checkpoint at a strength."""
    learnt, kept, scores = judged
    return Point(step=step, scale=scale, learnt=learnt, kept=kept, scores=scores)


def comparable(train: TrainConfig) -> bool:
    """Whether the weights in a run's checkpoints are those that it would have left as its result."""
    kind = train.optimizer
    # Of others nobody knows whether they have a second mode, unless their code is imported.
    return train.ema is None and (kind in OPTIMIZERS or kind.startswith("torch.optim."))


def saved(folder: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Of every checkpoint of a run that trained an adapter, the step and the adapters' tensors.

    Raises:
        UserError: one cannot be read.
    """
    states = []
    for step in checkpoint.steps(folder):
        file = checkpoint.folder(folder, step) / checkpoint.WEIGHTS
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}): remove that checkpoint") from error
        states.append((step, {name.removeprefix("adapters."): tensor for name, tensor in tensors.items()}))
    return states


def best(found: Sequence[Point]) -> Point:
    """Where most is learnt and kept at once: the greatest product."""
    return max(found, key=lambda point: point.learnt * point.kept)


def table(found: Sequence[Point]) -> str:
    """The points as plain text, and the best of them."""
    names = list(found[0].scores)
    head = f"{'step':>6}  {'strength':>8}  {'learnt':>6}  {'kept':>6}  " + "  ".join(f"{name:>16}" for name in names)
    lines = [head]
    for point in found:
        cells = "  ".join(f"{point.scores[name]:>16.3f}" for name in names)
        lines.append(f"{point.step:>6}  {point.scale:>8.2f}  {point.learnt:>6.3f}  {point.kept:>6.3f}  {cells}")
    return "\n".join([*lines, verdict(found)])


def verdict(found: Sequence[Point]) -> str:
    """The best point in words."""
    top, base = best(found), found[0]
    return (
        f"best: step {top.step} at strength {top.scale:g}, with {top.learnt:.0%} of the subject learnt and "
        f"{top.kept:.0%} kept (the base: {base.learnt:.0%} and {base.kept:.0%})"
    )
