"""Control: a drawing follows a picture (outlines, depth, poses) through a trained ControlNet or T2I-Adapter.

Zhang et al., 2023, arXiv 2302.05543; Mou et al., 2023, arXiv 2302.08453. A ControlNet sees latents, words and picture,
and adds to the long skips and the middle of a UNet; an adapter sees the picture alone, and adds to what goes down. Both
sides of guidance get it, and several terms add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visiontune.guidance import _controls
from visiontune.guidance._network import Network
from visiontune.guidance._pictures import check_picture, fitted
from visiontune.guidance.base import Feeding, Point, Run
from visiontune.ops.pixels import to_tensor
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Feeding):
    """A trained net, and the picture that it is shown."""

    scale: float = option(1.0, least=0, greatest=10, help="how much of what the net gives is added; 0 is none")
    net: Any = option(help="pocket/sketch, pocket/colors, or folder or Hub id of a ControlNet or a T2I-Adapter")
    picture: Any = option(help="file of the picture that the drawing follows, in its ratio, of the kind the net knows")

    def fed(self, network: Network, arguments: Mapping[str, Any], point: Point) -> Mapping[str, Any]:
        found = self.scaled(self.features(network, arguments, point), arguments, point)
        return _controls.given(arguments, found, _controls.is_adapter(self.opened))

    @property
    def opened(self) -> Any:
        """The net, a `ControlNetModel` or a `T2IAdapter`."""
        return _controls.opened(self.net, self.name)

    def features(self, network: Network, arguments: Mapping[str, Any], point: Point) -> _controls.Features:
        """What the net gives in a call; of an adapter that is the same in all calls of a run."""
        if not _controls.is_adapter(self.opened):
            return _controls.features(self.opened, arguments, self.shown(network, point))
        if "features" not in point.memory:
            with torch.no_grad():
                point.memory["features"] = _controls.features(self.opened, arguments, self.shown(network, point))
        found: _controls.Features = point.memory["features"]
        return found

    def scaled(self, found: _controls.Features, arguments: Mapping[str, Any], point: Point) -> _controls.Features:
        """Features of all rows of a call, as strong as they are at the point."""
        return _controls.scaled(found, self.amount(point.levels, point.x), len(arguments["sample"]))

    def shown(self, network: Network, point: Point) -> Tensor:
        """[1, c, h, w] in [0, 1], the part of the picture that the point's latents are of; the net goes where they are
        and takes their type, as pipelines have theirs."""
        # The method of diffusers' own class warns of types that have to stay float32, even where there are none.
        net = nn.Module.to(self.opened, point.x.device, point.x.dtype)
        if "shown" not in point.memory:
            unit = _controls.pixels_a_latent(net, network)
            picture = fitted(self.picture, unit, point.run.shape or point.x.shape, self.name)
            if _controls.channels(net) == 1:
                picture = picture.convert("L")
            pixels = to_tensor(np.atleast_3d(np.array(picture)))[None]
            (top, left), (height, width) = (
                (unit * side for side in sides) for sides in (point.place, point.x.shape[-2:])
            )
            point.memory["shown"] = pixels[..., top : top + height, left : left + width]
        found: Tensor = point.memory["shown"].to(point.x)
        return found

    def check(self, network: Network) -> None:
        _controls.check(self.net, network, self.name)
        check_picture(self.picture, self.name)

    def begins(self, run: Run) -> None:
        if run.shape:
            fitted(self.picture, 1, run.shape, self.name)

    def note(self, network: Network, levels: Sequence[float]) -> str:
        if _controls.is_adapter(self.opened):
            return f"{self.name} has its T2I-Adapter see the picture, which costs next to nothing"
        acting = sum(self.acts([level]) for level in levels)
        return f"{self.name} has its ControlNet see, in {acting} of the steps, whatever the network sees"


def build(config: Config) -> Config:
    """The term."""
    return config
