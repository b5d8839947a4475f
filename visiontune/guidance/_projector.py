"""The network that OneActor fits (Wang et al., 2024, arXiv 2404.10267): features of a middle block to offsets."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Projector(nn.Module):
    """phi: features [b, c, h, w] of the middle block -> offsets [b, d], normalised.

    Groups are normalised where the authors' network normalises batches, which are of five rows here.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        sizes = [max(channels // n, 1) for n in (2, 4, 8)]
        self.start = nn.Sequential(nn.Conv2d(channels, sizes[0], 7, stride=2, padding=3), _norm(sizes[0]), nn.ReLU())
        before, blocks = sizes[0], []
        for i, size in enumerate(sizes):
            blocks += [_Residual(before, size, stride=2 if i else 1), _Residual(size, size)]
            before = size
        self.blocks = nn.Sequential(*blocks)
        for _ in range(3):
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        self.end = nn.Sequential(nn.Flatten(), nn.Linear(before * math.prod(grid), width), nn.LayerNorm(width))

    def forward(self, h: Tensor) -> Tensor:
        found: Tensor = self.end(self.blocks(self.start(h)))
        return found


class _Residual(nn.Module):
    def __init__(self, before: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, size, 3, stride, 1), _norm(size), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(size, size, 3, 1, 1), _norm(size))
        self.across = nn.Identity() if before == size else nn.Conv2d(before, size, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.across(x)).relu()


def _norm(channels: int) -> nn.GroupNorm:
    # Of some sixteen channels each: the last grid may be a single place.
    return nn.GroupNorm(math.gcd(channels, max(channels // 16, 1)), channels)
