"""MMD fine-tuning: pictures of few steps made as those of many, or as real ones, by a kernel between their features.

Aiello, Valsesia, Magli, "Fast Inference in Denoising Diffusion Models via MMD Finetuning", 2023, arXiv 2301.07969:

    L = MMD^2({F(G(z_i))}, {F(y_j)})

G is the whole chain of few steps, through which the gradient goes, F a frozen encoder of pictures, and MMD^2 the
unbiased estimate under a cubic kernel (``ops/mmd.py``). The term between drawn pictures repels them from each other,
which keeps them different. There is no reward, no noise to predict and no second network to train.

y are pictures that the untrained model draws in many steps under guidance, compared prompt by prompt (this is ours:
the paper's models have no prompts), or those of the user's data, compared over the whole batch, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion._window import gradient_window, require_effect
from visiontune.diffusion.guidance import NO_GUIDANCE
from visiontune.diffusion.pathwise import backpropagate, end_gradient
from visiontune.diffusion.trajectory import Start, Trajectory, Window, rollout
from visiontune.diffusion.transition import kernel
from visiontune.errors import UserError
from visiontune.models.clip import ClipEncoder, load_clip
from visiontune.objectives._distilled import few_facts, own_sampler
from visiontune.objectives._online import Stepped, SteppedConfig, parts_of, pixels
from visiontune.objectives.base import Needs, Tools, condition_of, draws_clips
from visiontune.ops.mmd import squared_mmd
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Config(SteppedConfig):
    """Options of MMD fine-tuning; `steps`, `cfg_scale` and `guidance` are those of the pictures to compare with."""

    few_steps: int = option(4, least=1, greatest=1000, help="sampling steps of what is trained, without guidance")
    compare_with: Literal["base", "data"] = option(
        "base", help="pictures that the base draws of the same prompts, or those of data.root, whatever their captions"
    )
    features: str = option(
        "pocket/clip", help="the CLIP whose image features are compared: pocket/clip, a folder or a Hub id"
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub CLIP")
    degree: int = option(3, least=1, greatest=8, help="of the polynomial kernel; 1 compares means alone")
    group: int = option(8, least=2, greatest=65536, help="pictures of each prompt, on both sides")
    updates: int = option(
        4, least=1, greatest=65536, help="optimiser steps that share the base's pictures; each draws its own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare_with == "data" and self.micro_batch is not None:
            raise ValueError("micro_batch would tear apart what compare_with=data compares: lower train.batch_size")


def build(config: Config) -> MMD:
    """The objective that ``config`` describes."""
    return MMD(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """The prompts of a batch, and features ``[b, d]`` of the base's pictures of them."""

    rows: Batch
    features: Tensor


class MMD(Stepped):
    """Logs ``mmd``, the estimate; below 0 by chance where pictures are alike.

    Attributes:
        sampler: by which the result is to be drawn, known once a model was checked.
    """

    config: Config
    sampler: str = "model"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.online:
            self.group, self.updates = config.group, config.updates

    @property
    def online(self) -> bool:
        """Whether the base draws what is compared with."""
        return self.config.compare_with == "base"

    @property
    def needs(self) -> Needs:
        return Needs(columns=() if self.online else ("image",), online=self.online, reference=self.online, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse clips, few steps through which no gradient comes, and features that cannot be had."""
        super().check(model, reward)
        if draws_clips(model):
            raise UserError(f"features are of pictures, and '{model.source}' ({model.family}) draws clips")
        few = self.config.few_steps
        start, end = model.chain(few, model.latent_shape())
        require_effect(gradient_window(few, few), start, *kernel(model.schedule, start, end, self.dynamics)[:2])
        self.sampler = own_sampler(model)
        _ = self.encoder

    @cached_property
    def encoder(self) -> ClipEncoder:
        """What pictures are compared by; opened when it is first asked for."""
        return load_clip(self.config.features, revision=self.config.revision)

    def facts(self) -> dict[str, str]:
        """How the result is to be drawn: in so many steps, without guidance."""
        return few_facts(self.config, self.config.few_steps, self.sampler)

    def features(self, model: DiffusionModel, latents: Tensor) -> Tensor:
        """Unit features ``[b, d]`` of pictures; gradients reach the latents."""
        return self.encoder.image_features(pixels(model, latents))

    def distance(self, drawn: Tensor, others: Tensor) -> Tensor:
        """Mean over prompts of the squared MMD of features ``[b, d]``; with data over the batch as one."""
        size = self.group if self.online else len(drawn)
        return squared_mmd(drawn.unflatten(0, (-1, size)), others.unflatten(0, (-1, size)), self.config.degree).mean()

    # -- beside real pictures -----------------------------------------------------------------------------------

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        """Of as many drawn pictures of the batch's captions as it has real ones, which the VAE has been through."""
        if len(batch) < 2:
            raise UserError("a distance of sets of pictures needs two of each: raise train.batch_size")
        x_0 = batch.data["image"].float()
        start = torch.randn(x_0.shape, generator=tools.rng).to(x_0.device)
        window = Window(steps=self.config.few_steps, checkpoint=True)
        drawn = self.draw(model, condition_of(model, batch), Start(latents=start), window)
        with torch.no_grad():
            real = self.features(model, x_0)
        total = self.distance(self.features(model, drawn.final), real)
        return Loss(total=total.float(), terms={"mmd": total.detach().float()})

    # -- beside the base's --------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Collected:
        """The base's pictures, whose noise is not that of those drawn: the estimate takes them to be independent."""
        parts = parts_of(batch, self.config.micro_batch)
        found = [self.features(model, self.drawn_by_base(model, rows, tools, "base")) for rows in parts]
        return Collected(rows=batch, features=torch.cat(found))

    def update(self, model: DiffusionModel, collected: Collected, part: int, tools: Tools) -> Loss:
        """Pictures of their own for each update. Their features are found first, since all of a prompt count together,
        and the gradient of the distance in each then walks back through its picture's chain."""
        drawn, features = [], []
        with torch.no_grad():
            for rows in parts_of(collected.rows, self.config.micro_batch):
                start = Start(generator=tools.generators(rows, "drawn", part))
                window = Window(steps=self.config.few_steps, deferred=True)
                drawn.append(self.draw(model, model.embed(rows.prompts), start, window))
                features.append(self.features(model, drawn[-1].final))
        total, gradient = end_gradient(torch.cat(features), lambda x: self.distance(x, collected.features))
        for trajectory, towards in zip(drawn, gradient.split([len(one) for one in drawn]), strict=True):
            self.walk(model, trajectory, tools.scale * towards)
        return Loss(total=total.float(), terms={"mmd": total.float()})

    def draw(self, model: DiffusionModel, cond: Condition, start: Start, window: Window) -> Trajectory:
        """Few steps without guidance."""
        return rollout(
            model,
            cond,
            guidance=NO_GUIDANCE,
            chain=self.config.few_steps,
            dynamics=self.dynamics,
            start=start,
            window=window,
        )

    def walk(self, model: DiffusionModel, trajectory: Trajectory, towards: Tensor) -> None:
        """Add the parameters' gradients, given those of the features ``[b, d]`` of the pictures."""
        _, at_end = end_gradient(trajectory.final, lambda x: (self.features(model, x) * towards).sum())
        backpropagate(model, trajectory, at_end)
