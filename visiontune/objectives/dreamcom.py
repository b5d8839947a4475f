"""DreamCom: a model that paints into pictures learns one subject, each time from the box in which it stood.

Lu et al., "DreamCom: Finetuning Text-guided Inpainting Model for Image Composition", 2023, arXiv 2309.15508: DreamBooth
(arXiv 2208.12242) on an inpainting model. The network sees ``[z_t, m, E(x (1 - m))]``, m being 1 in the subject's box,
and its error counts inside and outside of it, but where augmentation has left nothing of the picture (``mask``), as a
mean over what counts. Prior rows are the base's predictions of boxes of chance, in the user's own pictures under
captions without the trigger, and in those of ``prior_data``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontune.data.base import Sample
from visiontune.errors import UserError
from visiontune.objectives import _prior, denoising, dreambooth
from visiontune.objectives.base import Needs, Tools
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Config):
    """Options of DreamCom: those of the denoising loss, where words act, and what is held in place."""

    confine_words: bool = option(
        False, help="have words act in the box alone, in training and drawing: attention to them adds nothing elsewhere"
    )
    prior: Literal["prediction", "none"] = option(
        "prediction", help="what prior rows learn: the base's prediction of boxes of chance; no such rows"
    )
    prior_weight: float = option(1.0, least=0, greatest=1e6, help="lambda, the weight of the prior rows")
    prior_share: float = option(
        0.25, above=0, greatest=0.99, help="share of prior rows in a batch; they come on top of train.batch_size"
    )
    prior_data: str | None = option(
        None, help="folder of captioned pictures of what is to be kept, beside your own without the trigger"
    )
    prior_empty: float = option(0.1, least=0, below=1, help="share of the prior rows with the empty prompt")


def build(config: Config) -> DreamCom:
    """The objective that ``config`` describes."""
    return DreamCom(config)


class DreamCom(dreambooth.DreamBooth):
    """``mean_instance(l) + lambda * mean_prior(l)`` of a model that paints; logs the two means."""

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        super().__init__(config)  # type: ignore[arg-type]

    @property
    def draws(self) -> bool:
        return False

    @property
    def needs(self) -> Needs:
        return dataclasses.replace(super().needs, columns=("image", "region"), optional=("mask",))

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse what does not paint into pictures.

        Raises:
            UserError: see above, or words cannot be confined.
        """
        super().check(model, reward)
        if not getattr(model, "paints", False):
            able = hasattr(model, "PAINTING") and not model.reads.pictures
            mend = f"make one of it, `visiontune expand {model.source} FOLDER`, and train that first, or take"
            raise UserError(
                f"objective=dreamcom is for models that paint into pictures, and '{model.source}' ({model.family}) "
                f"does not: {mend if able else 'take'} an inpainting model, such as pocket/inpaint"
            )
        if self.config.confine_words and not hasattr(model, "confine_words"):
            raise UserError(
                f"objective.confine_words: '{model.source}' ({model.family}) has no layers that attend to words alone: "
                "set it to false"
            )

    def facts(self) -> dict[str, str]:
        return {"confined_words": "true"} if self.config.confine_words else {}

    def setup(self, model: Any, tools: Tools) -> None:
        if self.config.confine_words:
            model.confine_words()

    def prepare(
        self, model: PipelineModel, data: Any, samples: Sequence[Sample], cache_dir: Path, tools: Tools
    ) -> Sequence[Sample]:
        """The prior rows, whose regions are left to chance."""
        if not self.keeps:
            return []
        given = [] if self.config.prior_data is None else _prior.given(self.config.prior_data, data)
        rows = [*given, *_prior.own(samples, data)]
        unsaid = [dataclasses.replace(sample, caption="") for sample in rows or samples]
        share = self.config.prior_empty
        rows += islice(cycle(unsaid), math.ceil(len(rows) * share / (1 - share)) if rows else len(unsaid))
        return [self._as_prior(sample) for sample in rows]

    def _as_prior(self, sample: Sample) -> Sample:
        sources = {name: source for name, source in sample.sources.items() if name != "region"}
        return dataclasses.replace(sample, sources=sources, prior=True, weight=self.config.prior_weight)
