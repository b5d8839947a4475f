"""StyleID: a picture redrawn in the style of another.

Chung et al., 2024, arXiv 2312.09008. Both pictures are inverted along the run's own chain, without a prompt. The run
starts from the content's noise with the style's statistics of each channel,

    x_T = std_s (z_c - mean_c) / std_c + mean_s,

and in the chosen layers the queries q of the picture's tokens look for what is nearest to them in the style,

    softmax(T (gamma q_c + (1 - gamma) q) k_s^T / sqrt(d)) v_s,

with q_c of the content's inversion, k_s and v_s of the style's, at the same time. Where words stand among the tokens
(SD3, FLUX) their keys, values and queries stay: an extension of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visiontune.diffusion.inversion import invert
from visiontune.errors import UserError
from visiontune.guidance._features import Kept, pictured, put
from visiontune.guidance._network import Network
from visiontune.guidance._pictures import check_picture, latents_of
from visiontune.guidance._taps import Attention, attending
from visiontune.guidance.base import Edit, Point, Shaping, Strength, rows_of
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Edit, Shaping):
    """A picture redrawn in the style of another, by attention."""

    STARTS = True

    scale: float = option(
        1.0,
        least=0,
        greatest=1,
        help="how far it goes over to the style; near 0 the content as it is, 0 a free drawing",
    )
    content: Any = option(help="file of the picture that is redrawn, in the ratio of what is drawn")
    style: Any = option(help="file of the picture whose style it gets, in that ratio, too")
    gamma: float = option(
        0.75, least=0, greatest=1, help="how much of the content's queries there is; less, more style"
    )
    adain: float = option(
        1.0, least=0, greatest=1, help="how far mean and deviation of the noise's channels go over to the style's"
    )
    temperature: float = option(1.5, above=0, greatest=100, help="T, by which logits of attention are multiplied")
    layers: str | list[str] = option(
        "late", help="late, mid, all, numbers of blocks, or patterns of the names of attention layers (up_blocks.2)"
    )
    offload: bool = option(False, help="keep what the layers are given in main memory, and not on the model's device")

    def edit(self, x: Tensor, s: Strength, point: Point) -> Tensor:
        if "kept" in point.memory:
            return x
        network = Network.of_model(point.run.modelled(self.name))
        kept = Kept(
            term=self.name,
            network=network,
            layers=self._layers(network),
            rows=(slice(1), slice(1, 2)),
            offload=self.offload,
        )
        content, style = self._inverted(kept, point).split(1)
        point.memory["kept"] = kept
        return restyled(content, style, self.adain).to(x).repeat(len(x), *(1,) * (x.ndim - 1))

    def overwrites(self, start: float) -> bool:
        # What comes before it acts, since then the content takes its place.
        return start > self.window[1]

    def shaping(
        self, network: Network, arguments: Mapping[str, Any], point: Point, side: str
    ) -> AbstractContextManager[Any]:
        if "kept" not in point.memory:
            raise self._not_whole()
        level = point.levels[0]
        stored = point.memory["kept"].at(level)
        share = self.at(level)

        def attend(name: str) -> Attention:
            def injected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
                q_s, k_s, v_s = self._injected((q, k, v), stored[name], network.words(name, arguments))
                found = scaled_dot_product_attention(q_s, k_s, v_s, attn_mask=mask, **call)
                if share == 1:
                    return found
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, **call).lerp(found, share)

            return injected

        return attending(self._layers(network), self.name, attend)

    def check(self, network: Network) -> None:
        for name in ("content", "style"):
            check_picture(getattr(self, name), self.name, name)
        self._layers(network)

    def note(self, network: Network, levels: Sequence[float]) -> str:
        return f"{self.name} has {2 * len(self._chain(levels))} rows seen before them, once for all pictures"

    def _layers(self, network: Network) -> dict[str, nn.Module]:
        if self.layers != "late":
            return network.attention(self.layers, self.name)
        return late(network.attention("all", self.name))

    def _chain(self, levels: Sequence[float]) -> Sequence[float]:
        """The levels from the first one at which it acts."""
        return levels[next(i for i, level in enumerate(levels) if self.acts([level])) :]

    def _inverted(self, kept: Kept, point: Point) -> Tensor:
        """The noise of content and style, [2, c, h, w]; what layers are given on the way is kept."""
        assert point.schedule is not None
        model, levels = point.run.model, self._chain(point.run.levels)
        x_0 = torch.cat([latents_of(getattr(self, name), point, self.name, name) for name in ("content", "style")])
        times = torch.tensor(levels, dtype=torch.float64) * point.schedule.num_train_timesteps
        start = times.float() if point.schedule.prediction == "flow" else times.round().long()
        chain = start, torch.cat([start[1:], start.new_full((1,), -1)])
        return invert(model, x_0, model.embed([""] * 2), guidance=kept, chain=chain, most_error=None).noise

    def _injected(self, own: tuple[Tensor, Tensor, Tensor], stored: tuple[Tensor, ...], words: slice) -> list[Tensor]:
        """q, k and v [b, heads, n, d] of a layer, with what is injected among the picture's tokens."""
        at = pictured(words, own[0].shape[-2])
        q_c, k_s, v_s = (one.to(own[0]).expand(len(own[0]), -1, -1, -1) for one in stored)
        q = own[0][..., at, :]
        if q.shape != q_c.shape:
            raise self._not_whole()
        given = (self.temperature * q.lerp(q_c, self.gamma), k_s, v_s)
        return [put(whole, part, at) for whole, part in zip(own, given, strict=True)]

    def _not_whole(self) -> UserError:
        return UserError(
            f"{self.name} redraws whole pictures from the first step of a run: leave out terms that draw in regions, "
            "and do not ask for single predictions"
        )


def restyled(content: Tensor, style: Tensor, share: float = 1.0) -> Tensor:
    """Latents [b, c, ...] whose channels' means and deviations have gone a share of the way to those of `style`."""
    axes = rows_of(content)[1:]
    (std_c, mean_c), (std_s, mean_s) = (torch.std_mean(one, axes, keepdim=True) for one in (content, style))
    return std_c.lerp(std_s, share) * (content - mean_c) / std_c + mean_c.lerp(mean_s, share)


def late(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of a decoder's blocks all but the coarsest, which of SD leaves 6 to 11; of transformers the later half."""
    ups = [name for name in layers if name.startswith("up_blocks.")]
    blocks = sorted({name.split(".")[1] for name in ups})
    if not ups:
        names = [*layers]
        return {name: layers[name] for name in names[len(names) // 2 :]}
    return {name: layers[name] for name in ups if len(blocks) == 1 or name.split(".")[1] != blocks[0]}


def build(config: Config) -> Config:
    """The term."""
    return config
