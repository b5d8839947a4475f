"""WiCLP and CLP: words read through a linear projection while a picture finds its layout.

Zarei et al., 2024, arXiv 2406.07844. A projection g was fitted to pictures that are as their captions say
(`visiontune.guidance.projector`); the network reads c + s (g(c) - c) in the place of the prompt's words c in the steps
of the window, the words themselves in all others, and those of the negative prompt always as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.guidance import _words
from visiontune.guidance._network import Network
from visiontune.guidance.base import Point, Shaping
from visiontune.guidance.oneactor import width_of
from visiontune.guidance.projector import TextProjector
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Shaping):
    """A fitted projection of the prompt's words."""

    scale: float = option(1.0, least=-10, greatest=10, help="s, how much of what it changes; 0 is none")
    window: tuple[float, float] = option(
        (0.8, 1.0), least=0, greatest=1, help="levels of noise, both included, between which it acts; 1 is pure noise"
    )
    file: Any = option(help="file of a fitted projection")

    @property
    def projector(self) -> TextProjector:
        """The projection, read anew where it is a file."""
        return self.file if isinstance(self.file, TextProjector) else TextProjector.load(self.file)

    def check(self, network: Network) -> None:
        network.reading(self.name)
        width, fitted = width_of(network.denoiser), self.projector.width
        if width != fitted:
            raise UserError(
                f"wiclp: the projection was fitted to words of {fitted} numbers, and '{network.source}' reads such of "
                f"{width}: fit it on this model"
            )

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        if side == "at":  # calls for latents or conditions of a term's own
            return nullcontext()
        g: TextProjector = _words.kept(point, "projector", lambda: self.projector)

        # In each layer anew: what is checkpointed has to be computed again from what that layer is given.
        def projected(words: Tensor) -> Tensor:
            rows = _words.told(len(words), side)
            own = words[rows]
            strengths = words.new_tensor(_words.strengths(self, point, len(own))).view(-1, 1, 1)
            return torch.cat([words[: rows.start], own + strengths * g.to(words.device).change(own)])

        return _words.reading(network.reading(self.name), projected)


def build(config: Config) -> Config:
    """The term."""
    return config
