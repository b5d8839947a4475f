"""How much better a picture did than others: rewards made comparable between prompts, and over time."""

from __future__ import annotations

import torch
from torch import Tensor

# What float32 makes of a computed number, relative to it.
_FLAT = 1e-6
# What it makes of a score that is computed from numbers about 1, however small it comes out.
NOISE = 1e-6


def indistinct(size: Tensor, noise: float = NOISE) -> Tensor:
    """How far apart values of some size may be and still be equal but for rounding; at least ``noise``."""
    return (_FLAT * size.abs()).clamp(min=noise)


def standardised(values: Tensor, mean: Tensor, std: Tensor, noise: float = NOISE) -> Tensor:
    """(values - mean) / std, and exactly 0 where the deviation is nothing but :func:`indistinct`."""
    flat = std <= indistinct(mean, noise)
    return torch.where(flat, 0.0, (values - mean) / torch.where(flat, 1.0, std))


def group_advantages(values: Tensor, prompts: Tensor, global_std: bool = False, noise: float = NOISE) -> Tensor:
    """How much better each of ``values`` [n] is than the others of its prompt, in standard deviations.

    Args:
        values: [n] float64.
        prompts: [n] ids; equal ids are one group, wherever they stand.
        global_std: divide by the deviation of all values, not by the group's.
        noise: deviation of a group up to which its values count as equal.
    """
    _, member, count = torch.unique(prompts, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(count), dtype=values.dtype).index_add(0, member, values) / count
    around = values - mean[member]
    std = (torch.zeros_like(mean).index_add(0, member, around.square()) / count).sqrt()
    flat = (std <= indistinct(mean, noise))[member]
    scale = values.std(unbiased=False) if global_std else std[member]
    return torch.where(flat, 0.0, around / torch.where(flat, 1.0, scale))


def tracked_advantages(
    values: Tensor,
    prompts: Tensor,
    seen: dict[int, list[float]],
    size: int,
    min_count: int,
    noise: float = NOISE,
) -> Tensor:
    """``values`` [n] against the last ``size`` values of their prompts, these among them.

    Args:
        values: [n] float64. prompts: [n] ids.
        seen: the values so far by prompt, to which these are added.
        size: values kept for each prompt.
        min_count: a prompt with fewer is compared with the mean and deviation of all of ``values`` instead.
        noise: deviation up to which values count as equal.
    """
    for prompt, value in zip(prompts.tolist(), values.tolist(), strict=True):
        seen[prompt] = [*seen.get(prompt, []), value][-size:]
    mean, std = (v.expand(len(values)).clone() for v in (values.mean(), values.std(unbiased=False)))
    for prompt in prompts.unique().tolist():
        known = torch.tensor(seen[prompt], dtype=values.dtype)
        if len(known) >= min_count:
            mean[prompts == prompt], std[prompts == prompt] = known.mean(), known.std(unbiased=False)
    return standardised(values, mean, std, noise)


def flat_share(advantages: Tensor, prompts: Tensor) -> Tensor:
    """Share of the prompts whose advantages are all 0: there is nothing to learn from them."""
    names = prompts.unique()
    return torch.stack([(advantages[prompts == name] == 0).all() for name in names]).double().mean()


def extremes(advantages: Tensor, group: int, count: int) -> Tensor:
    """[b] bool: the ``count`` rows of each group that are best and worst, half of each; of equals the first."""
    order = advantages.view(-1, group).argsort(dim=1, descending=True, stable=True)
    best = (count + 1) // 2
    picked = torch.cat([order[:, :best], order[:, group - (count - best) :]], dim=1)
    return torch.zeros(len(order), group, dtype=torch.bool).scatter_(1, picked, True).flatten()
