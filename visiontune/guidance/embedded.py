"""Embedded: the scale of guidance that was distilled into the network, which is told it.

Meng et al., 2022, arXiv 2210.03142; FLUX.1 dev is such a model. Outside its window, it is told a scale of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance.base import Told
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Told):
    """What the network is told, at no cost; in a stock pipeline it takes the place of its guidance_scale."""

    scale: float = option(3.5, least=-1000, greatest=1000, help="the scale that the network is told")

    def check(self, network: Network) -> None:
        told = [getattr(one, "config", {}) for one in network.denoisers.values()]
        if not any(config.get("guidance_embeds") or config.get("time_cond_proj_dim") for config in told):
            raise UserError(f"'{network.source}' carries no guidance inside, which embedded is for: take cfg")


def build(config: Config) -> Config:
    """The term."""
    return config
