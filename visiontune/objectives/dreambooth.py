"""DreamBooth: teach one subject while rows of what is not asked about hold the rest in place.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", 2022,
arXiv 2208.12242, equation 2, is ``prior: pictures``: class images of the untrained base are learnt like the user's own.
``prior: prediction`` asks for what the base itself predicts instead, on noisy latents of pictures of many kinds and of
the user's own (learning without forgetting, Li and Hoiem, 2016, arXiv 1606.09282, for denoisers), so that the base's
own errors are not learnt. The prior term is a set of extra rows that weigh lambda, not a second half of the batch;
weights of timesteps and offset noise treat those rows like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from visiontune.core import Batch, Loss
from visiontune.data.base import Sample
from visiontune.objectives import _prior, denoising
from visiontune.objectives.base import Needs, Tools, by_range, combine, mean_where
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Config):
    """Options of DreamBooth: those of the denoising loss and the prior-preservation term."""

    RENAMED: ClassVar[dict[str, str]] = {**denoising.Config.RENAMED, "prior_prompt": "prior_prompts"}

    prior: Literal["prediction", "pictures", "none"] = option(
        "prediction", help="what prior rows learn: the base's prediction; what is in the base's pictures; no such rows"
    )
    prior_weight: float = option(
        1.0, least=0, greatest=1e6, help="lambda, the weight of the prior rows; 0 trains without prior preservation"
    )
    prior_share: float = option(
        0.5, above=0, greatest=0.99, help="share of prior rows in a batch; they come on top of train.batch_size"
    )
    prior_prompts: str | list[str] | None = option(
        None,
        help="of the pictures that the base draws: a list, a .txt file, a dataset of prompts; null: everyday "
        "(pocket/ordinary for pocket models), with prior=pictures 'a photo of a [class]'; [class] is data.class_noun",
    )
    prior_images: int = option(100, least=0, greatest=1_000_000, help="pictures the base draws once before training")
    prior_data: str | None = option(None, help="folder of your own captioned pictures of what is to be kept, instead")
    prior_own: float = option(
        0.25,
        least=0,
        below=1,
        help="share of the prior rows that are your pictures under captions without the trigger (prediction only)",
    )
    prior_empty: float = option(
        0.1, least=0, below=1, help="share of the prior rows with the empty prompt (prediction only)"
    )
    prior_steps: int = option(25, least=1, greatest=100_000, help="sampling steps per prior picture")
    prior_cfg_scale: float = option(4.0, least=-1000, greatest=1000, help="guidance scale of the prior pictures")
    prior_batch_size: int = option(
        8, least=1, greatest=4096, help="prior pictures sampled at once; has no effect on the pictures"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_prompts is not None and not self.prior_prompts:
            raise ValueError("prior_prompts must not be empty")
        if self.prior_own + self.prior_empty >= 1:
            raise ValueError("prior_own and prior_empty must be less than 1 together")


def build(config: Config) -> DreamBooth:
    """The objective that ``config`` describes."""
    return DreamBooth(config)


class DreamBooth(denoising.Denoising):
    """``mean_instance(l) + lambda * mean_prior(l)``; logs the two means as ``instance`` and ``prior``."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)

    @property
    def keeps(self) -> bool:
        """Whether there are prior rows."""
        return self.config.prior != "none" and self.config.prior_weight > 0

    @property
    def draws(self) -> bool:
        return self.keeps and self.config.prior_data is None and self.config.prior_images > 0

    @property
    def needs(self) -> Needs:
        given = super().needs
        compared = self.keeps and self.config.prior == "prediction"
        return dataclasses.replace(given, reference=given.reference or compared)

    def prior_rows(self, batch_size: int) -> int:
        """Prior rows beside ``batch_size`` rows of the user's."""
        share = self.config.prior_share
        return max(1, round(batch_size * share / (1 - share)))

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        errors = self.errors(model, batch, tools)
        rows = {"instance": ~batch.prior, "prior": batch.prior}
        terms = {name: mean_where(errors.detach(), mask) for name, mask in rows.items()}
        return Loss(total=combine(errors, batch), terms={**terms, **by_range(errors, batch)})

    def targets(
        self, model: DiffusionModel, x_t: Tensor, t: Tensor, target: Tensor, batch: Batch, tools: Tools
    ) -> Tensor:
        """As for the denoising loss, but of prior rows by prediction what the base predicts of them."""
        if self.config.prior != "prediction" or not batch.prior.any():
            return target
        rows = batch.prior.nonzero().flatten()
        predicted = self._reference.predict(model, x_t[rows], t[rows], batch[rows], tools)
        return target.index_copy(0, rows, predicted.to(target.dtype))

    def prepare(
        self, model: PipelineModel, data: Any, samples: Sequence[Sample], cache_dir: Path, tools: Tools
    ) -> Sequence[Sample]:
        """The prior rows; what the base is to draw for them and is not in the cache yet is drawn now.

        Raises:
            UserError: a prompt has the trigger, or ``[class]`` where there is no class noun, or the model draws clips.
        """
        if not self.keeps:
            return []
        if self.config.prior_data is not None:
            pictures = _prior.given(self.config.prior_data, data)
        elif self.config.prior_images:
            pictures = _prior.drawn(
                self.config, model, _prior.prompts(self.config, data, model.source), cache_dir, tools
            )
        else:
            return []
        if self.config.prior == "prediction":
            pictures = self._mixed(pictures, _prior.own(samples, data))
        return [dataclasses.replace(sample, prior=True, weight=self.config.prior_weight) for sample in pictures]

    def _mixed(self, pictures: list[Sample], own: list[Sample]) -> list[Sample]:
        """The pictures with the shares of the user's own and of empty prompts beside them."""
        own_share, empty = self.config.prior_own if own else 0.0, self.config.prior_empty
        total = len(pictures) / (1 - own_share - empty)
        unsaid = [dataclasses.replace(sample, caption="") for sample in (*pictures, *own)]
        return [
            *pictures,
            *islice(cycle(own), round(total * own_share)),
            *islice(cycle(unsaid), round(total * empty)),
        ]
