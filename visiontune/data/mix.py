"""Several sources of pictures in one run: how often each comes, and the noise that it is trained at.

With ranges of noise for each source it is Style Tailoring (Sinha et al., "Text-to-Sticker: Style Tailoring Latent
Diffusion Models for Human Expression", 2023, arXiv 2311.10794): what decides content is learnt of one source, what
decides the look of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visiontune.schema import option

Bounds = tuple[float, float]
WHOLE: Bounds = (0.0, 1.0)
RANGE_HELP = (
    "[low, high], the noise that its rows are trained at, as shares of the schedule; for flow models the noise that "
    "Stable Diffusion has there"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Further pictures of a run; a bare value is ``root``."""

    SHORTHAND: ClassVar[str] = "root"

    root: str = option(help="its pictures, as data.root")
    prompt: str | None = option(None, help="caption of its images without one; null: data.prompt")
    timestep_range: Bounds = option(WHOLE, least=0, greatest=1, help=RANGE_HELP)
    weight: float = option(1.0, above=0, greatest=1e6, help="how often its rows come; as data.weight")


def check_tiles(ranges: Sequence[Bounds]) -> None:
    """Refuse ranges that leave some noise to no source, or give it to sources whose ranges differ.

    Args:
        ranges: low and high of each source, in [0, 1].

    Raises:
        ValueError: naming the gap or the overlap.
    """
    for low, high in ranges:
        if low >= high:
            raise ValueError(f"timestep_range: low must be below high, but they are {low:g} and {high:g}")
    if len(ranges) == 1 and ranges[0] != WHOLE:
        raise ValueError(
            "timestep_range is for several sources (data.mix): of one, set objective.timesteps.low and high instead"
        )
    end = 0.0
    for low, high in [*sorted(set(ranges)), (1.0, 1.0)]:
        if low != end:
            what = f"overlap between {low:g} and {end:g}" if low < end else f"leave a gap from {end:g} to {low:g}"
            raise ValueError(
                f"timestep_range: those of data and data.mix {what}: let each begin where another ends, from 0 to 1"
            )
        end = high
