"""DreamBooth: teach one subject while images of its class, made by the untrained base, hold the class in place.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", 2022,
arXiv 2208.12242, equation 2. The prior term is a set of extra rows that weigh lambda, not a second half of the batch;
min-SNR and offset noise treat those rows like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune.core import Batch, Loss
from visiontune.data.base import Sample, Source, substitute
from visiontune.errors import UserError
from visiontune.files import atomic_write, write_json
from visiontune.objectives import denoising
from visiontune.objectives.base import Tools, combine, draws_clips, mean_where
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel
    from visiontune.models.pipeline import PipelineModel


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Config):
    """Options of DreamBooth: those of the denoising loss and the prior-preservation term."""

    prior_weight: float = option(
        1.0, least=0, greatest=1e6, help="lambda, the weight of the prior rows; 0 trains without prior preservation"
    )
    prior_images: int = option(
        100, least=0, greatest=1_000_000, help="class images the base generates once before training"
    )
    prior_prompt: str | list[str] = option(
        "a photo of a [class]", help="prompt of the class images, or several by turns; [class] is data.class_noun"
    )
    prior_steps: int = option(25, least=1, greatest=100_000, help="sampling steps per class image")
    prior_cfg_scale: float = option(4.0, least=-1000, greatest=1000, help="guidance scale of the class images")
    prior_batch_size: int = option(
        8, least=1, greatest=4096, help="class images sampled at once; has no effect on the images"
    )

    def __post_init__(self) -> None:
        if not self.prior_prompt:
            raise ValueError("prior_prompt must not be empty")


def build(config: Config) -> DreamBooth:
    """The objective that ``config`` describes."""
    return DreamBooth(config)


class DreamBooth(denoising.Denoising):
    """``mean_instance(l) + lambda * mean_prior(l)``; logs the two means as ``instance`` and ``prior``."""

    config: Config

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        errors = self.errors(model, batch, tools)
        rows = {"instance": ~batch.prior, "prior": batch.prior}
        terms = {name: mean_where(errors.detach(), mask) for name, mask in rows.items()}
        return Loss(total=combine(errors, batch), terms=terms)

    def prepare(self, model: PipelineModel, data: Any, cache_dir: Path, tools: Tools) -> Sequence[Sample]:
        """Generate the class images that are not in the cache yet and return them as prior rows.

        Raises:
            UserError: the prior prompt needs a class noun and the data has none, or the model draws clips.
        """
        if not self.config.prior_weight or not self.config.prior_images:
            return []
        if draws_clips(model):
            raise UserError(
                f"class images are pictures, and '{model.source}' ({model.family}) draws clips: set "
                "objective.prior_weight=0"
            )
        wanted = self.config.prior_prompt
        prompts = [
            substitute(p, data.trigger, data.class_noun) for p in ([wanted] if isinstance(wanted, str) else wanted)
        ]
        folder = cache_dir / f"prior-{self._key(model, prompts)}"
        files = {folder / f"{i:05d}.png": prompts[i % len(prompts)] for i in range(self.config.prior_images)}
        with tools.reference():
            self._generate(model, prompts, files, tools)
        return [
            Sample(
                id=f"{folder.name}/{f.name}",
                sources={"image": Source(f)},
                caption=prompt,
                prior=True,
                weight=self.config.prior_weight,
            )
            for f, prompt in files.items()
        ]

    def _settings(self, model: PipelineModel, prompts: list[str]) -> dict[str, Any]:
        return {
            "base": {part: model.fingerprint(part) for part in ("denoiser", "text", "vae")},
            "prompts": prompts,
            "steps": self.config.prior_steps,
            "cfg_scale": self.config.prior_cfg_scale,
        }

    def _key(self, model: PipelineModel, prompts: list[str]) -> str:
        settings = json.dumps(self._settings(model, prompts), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def _generate(self, model: PipelineModel, prompts: list[str], wanted: dict[Path, str], tools: Tools) -> None:
        """Image ``i`` has seed ``i``; batches are sampled whole, so that a killed run's images end up the same."""
        from PIL import Image
        from tqdm.auto import tqdm

        size, files = self.config.prior_batch_size, list(wanted)
        chunks = [range(start, min(start + size, len(files))) for start in range(0, len(files), size)]
        chunks = [chunk for chunk in chunks if not all(files[i].exists() for i in chunk)]
        if not chunks:
            return
        write_json(files[0].parent / "settings.json", self._settings(model, prompts))
        for chunk in tqdm(chunks, desc="prior images"):
            assert tools.draw is not None
            made = tools.draw(
                model,
                [wanted[files[i]] for i in chunk],
                list(chunk),
                steps=self.config.prior_steps,
                cfg_scale=self.config.prior_cfg_scale,
                batch_size=size,
            )
            for i, pixels in zip(chunk, made, strict=True):
                with atomic_write(files[i]) as path:
                    Image.fromarray(pixels).save(path)
