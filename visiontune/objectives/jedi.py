"""JeDi: pictures of one subject are denoised together, so that new ones are drawn as those that are shown.

Zeng et al., "JeDi: Joint-Image Diffusion Models for Finetuning-Free Personalized Text-to-Image Generation", 2024, arXiv
2407.06187. The pictures of a set read one another in self-attention. Some are given: the network sees ``[z_t, 0, z]``
of them, as of a picture of which nothing is painted, and ``[z_t, 1, E(grey)]`` of the others, which alone are learnt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.errors import UserError
from visiontune.objectives import denoising
from visiontune.objectives.base import Needs, Tools, combine, condition_of, per_row
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Noising):
    """Options of JeDi: those of the denoising loss, and how often pictures are alone."""

    alone: float = option(
        0.1,
        least=0,
        below=1,
        help="share of the sets whose pictures do not read one another, so that one is drawn without references too",
    )
    references: int = option(
        0,
        least=0,
        greatest=63,
        help="least number of references of the other sets; at 0 some have none, and are learnt together",
    )


def build(config: Config) -> JeDi:
    """The objective that ``config`` describes."""
    return JeDi(config)


class JeDi(denoising.Denoising):
    """The denoising loss, a mean over the pictures that are not given; logs their share as ``learnt``.

    A set of n pictures has ``references`` to n - 1 of them, each number as often. All pictures of a set have one
    timestep.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._whole: dict[tuple[Any, ...], Tensor] = {}

    @property
    def needs(self) -> Needs:
        return Needs(columns=("image",), optional=("mask",), sets=True)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse what does not paint into pictures."""
        super().check(model, reward)
        if not hasattr(model, "couple"):
            raise UserError(
                f"objective=jedi: '{model.source}' ({model.family}) has no layers that attend to one picture alone: "
                "take an inpainting model of Stable Diffusion or SDXL, such as pocket/inpaint"
            )
        model.check_sets()

    def facts(self) -> dict[str, str]:
        return {"coupled": "true"}

    def setup(self, model: Any, tools: Tools) -> None:
        model.couple()

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        sizes, given = self.sets(batch, tools)
        errors = self._errors(model, batch, tools, sizes, given)
        learnt = ~given
        return Loss(
            total=combine(errors[learnt], batch[learnt.nonzero().flatten()]), terms={"learnt": learnt.float().mean()}
        )

    def sets(self, batch: Batch, tools: Tools) -> tuple[list[int], Tensor]:
        """How many rows each set has whose pictures read one another, and which rows are given, ``[b]``.

        Rows of a set come in an order of chance, so that its last ones are its references.
        """
        chance, alone = torch.rand(len(batch), generator=tools.rng), torch.rand(len(batch), generator=tools.rng)
        sizes: list[int] = []
        given = torch.zeros(len(batch), dtype=torch.bool)
        counts = batch.data["set"].unique_consecutive(return_counts=True)[1].tolist()
        start = 0
        for count in counts:
            if float(alone[start]) < self.config.alone:
                sizes += [1] * count
            else:
                sizes.append(count)
                least = min(self.config.references, count - 1)
                number = least + int((count - least) * float(chance[start]))
                given[start + count - number : start + count] = True
            start += count
        return sizes, given.to(batch.data["image"].device)

    def _errors(self, model: Any, batch: Batch, tools: Tools, sizes: list[int], given: Tensor) -> Tensor:
        x_0 = batch.data["image"].float()
        t, eps = self.noised(model, x_0, batch, tools)
        t = t[_first_rows(batch.data["set"])]
        x_t, target = model.schedule.add_noise(x_0, eps, t), model.schedule.target(x_0, eps, t)
        # Blocks that are checkpointed are computed again in the backward pass, by what is set here.
        model.couple().sizes = tuple(sizes)
        pred = model.predict(x_t, t, self.shown(model, batch, given))
        return per_row(self.squared(model, pred, target, t), batch.data.get("mask"))

    def shown(self, model: Any, batch: Batch, given: Tensor) -> Condition:
        """What the network is told of each row: of references their clean latents and no words."""
        x_0, cond = batch.data["image"], condition_of(model, batch)
        key = (x_0.shape[1:], x_0.device)
        if key not in self._whole:
            with torch.no_grad():
                self._whole[key] = model.painted_whole(x_0.shape[1:])
        clear = x_0.new_zeros(len(x_0), 1, *(model.downsample * side for side in x_0.shape[-2:]))
        rows = given.view(-1, 1, 1, 1)
        channels = torch.where(rows, model.channels(x_0, clear), self._whole[key].to(x_0))
        cond = _unsaid(cond, model.embed([""]), given)
        return replace(cond, extra={**cond.extra, "channels": channels})


def _first_rows(sets: Tensor) -> Tensor:
    """The place of the first row of each row's set ``[b]``, of the sets' numbers ``[b]``."""
    counts = sets.unique_consecutive(return_counts=True)[1]
    return (counts.cumsum(0) - counts).repeat_interleave(counts)


def _unsaid(cond: Condition, empty: Condition, rows: Tensor) -> Condition:
    """A condition with the empty prompt in some rows ``[b]``."""
    both = Condition.cat([cond, empty.to(cond.tokens.device, cond.tokens.dtype)])
    own = torch.arange(len(cond), device=rows.device)
    return both[torch.where(rows, len(cond), own)]
