"""Delta denoising: latents optimised along the difference of what a frozen model predicts for two prompts.

Hertz et al., 2023, arXiv 2304.07090: the gradient has no way back through the network. Both sides have the same noise
and time, so that what the network does wrong in both is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visiontune.core import Condition
from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError

# (pictures, pictures) [b, 3, h, w] in [-1, 1] -> how far apart they are where, [b, h, w]; differentiable.
Distance = Callable[[Tensor, Tensor], Tensor]
_SCALES = (1, 2, 4)


def appearance(one: Tensor, other: Tensor) -> Tensor:
    """Absolute differences of pixels and of their gradients, [b, h, w], the mean of three scales.

    The paper's distance is that of a VGG's features; this one needs no network.
    """
    total = one.new_zeros(())
    for scale in _SCALES:
        difference = F.avg_pool2d(one - other, scale, ceil_mode=True)
        edges = [F.pad(difference.diff(dim=axis), (0, 1) if axis == 3 else (0, 0, 0, 1)) for axis in (2, 3)]
        seen = sum((part.abs() for part in edges), difference.abs()).mean(1, keepdim=True)
        total = total + F.interpolate(seen, size=one.shape[-2:], mode="nearest")[:, 0] / len(_SCALES)
    return total


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How latents are optimised.

    Attributes:
        iterations: each in one call of the network, of two rows, and twice as many with guidance. lr: of Adam.
        cfg_scale: w, in the model's own guidance. levels: of noise between which t is drawn evenly.
        every: iterations from one decoding, which the losses on pixels need, to the next. seed: of noise and t.
        distance: of the losses on pixels.
        watch: is told the iteration and the latents [1, c, h, w] after it; where it says True the optimisation ends.
    """

    iterations: int = 200
    lr: float = 0.05
    cfg_scale: float = 7.5
    levels: tuple[float, float] = (0.05, 0.95)
    every: int = 1
    seed: int = 0
    distance: Distance = field(default=appearance, repr=False)
    watch: Callable[[int, Tensor], bool] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        low, high = self.levels
        if not (self.iterations >= 0 and self.every >= 1 and self.lr >= 0 and 0 < low <= high < 1):
            raise UserError(
                "an optimisation needs iterations and an lr of 0 or more, an every of 1 or more, and levels of noise "
                "between 0 and 1, the lower one first"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Composed:
    """What came out.

    Attributes:
        picture: float64 [h, w, 3] in [0, 1], as the VAE decodes it, also outside of the mask.
        latents: [1, c, h, w]. drift: mean and deviation of the latents after each iteration.
    """

    picture: np.ndarray
    latents: Tensor
    drift: tuple[tuple[float, float], ...]


def difference(
    model: Any, z: Tensor, z_0: Tensor, t: Tensor, noise: Tensor, cond: Condition, cfg_scale: float = 1.0
) -> Tensor:
    """g [1, c, h, w], both sides in one call.

    Args:
        z, z_0: latents [1, c, h, w] of the target's side and of the origin's. t: [1]. noise: as z.
        cond: of the target, then of the origin.
    """
    times = t.expand(2)
    x = model.schedule.add_noise(torch.cat([z, z_0]), noise.expand(2, *noise.shape[1:]), times)
    with torch.no_grad():
        found = guided(model, x, times, cond, None, model.guidance(cfg_scale))
        target, origin = model.schedule.to_eps(found, x, times).chunk(2)
    return target - origin


def optimised(
    model: Any,
    picture: np.ndarray,
    prompts: tuple[str, str],
    how: Optimisation,
    edit: Callable[[float], AbstractContextManager[Any]],
    weights: np.ndarray,
    kept: Sequence[tuple[float, np.ndarray]],
) -> Composed:
    """Latents after Adam's steps along g, weighted, and along the gradients of losses on pixels.

    Args:
        picture: [h, w, 3] in [0, 1]. prompts: the target's and the origin's.
        edit: of a level of noise, what a call of the network there is in.
        weights: [h, w] of g. kept: weights and masks [h, w] of the losses.

    Raises:
        UserError: the model draws no pictures, or none of this size.
    """
    if len(model.latent_shape()) != 3 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise UserError(f"freecompose works on a picture [h, w, 3]; '{model.source}' must be a model of pictures")
    model.size(*picture.shape[:2])
    pixels = torch.from_numpy(2 * picture - 1).permute(2, 0, 1)[None].float().to(model.device)
    with torch.no_grad():
        z_0 = model.encode(pixels, sample=False).float()
        shown = model.decode(z_0)
        cond = model.embed([*prompts])
    masks = [(weight, _as(mask, shown)) for weight, mask in kept if weight]
    share = F.interpolate(_as(weights, shown), size=z_0.shape[-2:], mode="area")
    random, drift = torch.Generator().manual_seed(how.seed), []
    z = z_0.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=how.lr)
    for i in range(how.iterations):
        level, noise = _drawn(how, z_0, random)
        with edit(level):
            g = difference(model, z.detach(), z_0, _time(model, level), noise, cond, how.cfg_scale)
        # The mean over places, as the losses on pixels are, so that their weights do not depend on the size.
        z.grad = share * g / (g.shape[-2] * g.shape[-1])
        if masks and i % how.every == 0:
            apart = how.distance(model.decode(z), shown)
            # Means over what is held: pictures times a mask would have edges of their own.
            losses = [weight * (apart * mask[:, 0]).sum() / mask.sum() for weight, mask in masks]
            torch.stack(losses).sum().backward()
        adam.step()
        drift.append((float(z.detach().mean()), float(z.detach().std())))
        if how.watch is not None and how.watch(i, z.detach()):
            break
    with torch.no_grad():
        final = (model.decode(z)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Composed(picture=final.double().cpu().numpy(), latents=z.detach(), drift=tuple(drift))


def _drawn(how: Optimisation, like: Tensor, random: torch.Generator) -> tuple[float, Tensor]:
    """A level of noise, and noise."""
    low, high = how.levels
    level = low + (high - low) * float(torch.rand((), generator=random))
    return level, torch.randn(like.shape, generator=random).to(like)


def _time(model: Any, level: float) -> Tensor:
    """[1], the timestep of a level; of flow it need not be whole."""
    t = torch.tensor([level * model.schedule.num_train_timesteps], device=model.device)
    return t if model.schedule.prediction == "flow" else t.round().long()


def _as(mask: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(mask)[None, None].to(like)
