"""T3-S2S: several objects, each of its words and in its region.

Sun et al., 2024, arXiv 2412.13486. Three changes of how a UNet reads its prompt. Nouns get one energy E = ||e||^2,
e_i sqrt(beta E_end / E_i) (balance). Channels of cross-attention in which a noun has one of the K greatest |values| are
alpha times as strong in its region (prominence). Logits go a share w a tau of the way to their row's greatest inside
of a region, and to its least outside (dense tuning), with a = 1 - area n_region / n, and tau = l^5 at level of noise l.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visiontune.errors import UserError
from visiontune.guidance import _words
from visiontune.guidance._layout import about, alike, apart, on_grid, prominent, pushed
from visiontune.guidance._network import Network
from visiontune.guidance._phrases import Balance, Named, Phrase, Text, columns_of, masks_of, named, read
from visiontune.guidance._pictures import check_mask
from visiontune.guidance._taps import Attention, attending
from visiontune.guidance.base import Point, Run, Shaping
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config(Shaping):
    """Balance of the nouns, prominence of their channels, and attention pushed into their regions."""

    scale: float = option(1.0, least=0, greatest=1, help="how much of all three there is; 0 is none")
    regions: list[Phrase] = option(
        help="{phrase: words of the prompt, mask: [left, top, width, height]} of each object"
    )
    background: str | None = option(None, help="phrase of the prompt for what no region covers; null for none")
    prompt: str | None = option(None, help="what all rows are told, where it is not known; null for each row's own")
    balance: Balance = option(
        "word",
        help="nouns are told as a prompt of that word alone, as in their phrase alone, or as they are; none: as is",
    )
    beta: float = option(1.0, above=0, greatest=100, help="energy of nouns, times that of the first token of the end")
    prominence: Literal["boost", "select"] = option(
        "boost", help="prominent channels are alpha times as strong; select: and all others are nothing"
    )
    alpha: float = option(2.0, least=0, greatest=100, help="of prominent channels; with boost, 1 is none")
    top: int = option(2, least=0, greatest=1000, help="K, how many words stand out in a channel; 0 for no prominence")
    cross: float = option(0.1, least=0, greatest=100, help="w, of attention to words; 0 for none")
    itself: float = option(0.1, least=0, greatest=100, help="w, of the picture's attention to itself; 0 for none")
    area: float = option(0.0, least=0, greatest=1, help="of a = 1 - area times the region's share of the picture")
    power: float = option(5.0, least=0, greatest=100, help="of the level of noise, for tau")
    layers: str | list[str] = option(
        "all",
        help="those with dense tuning: mid, all, numbers of blocks, or patterns of names (down_blocks.2, *.attn2)",
    )

    @property
    def idle(self) -> bool:
        return super().idle or not (self.balance != "none" or self._stands_out or self.cross or self.itself)

    @property
    def _stands_out(self) -> bool:
        return self.top > 0 and (self.prominence == "select" or self.alpha != 1)

    def check(self, network: Network) -> None:
        if not self.regions:
            raise UserError("t3s2s needs regions: give {phrase: ..., mask: ...} of each object of the prompt")
        network.attending(self.layers, self.name)
        for region in self.regions:
            check_mask(region.mask, self.name)

    def begins(self, run: Run) -> None:
        model = run.modelled(self.name)
        for prompt in {*_words.prompts_of(run, self.prompt, self.name)}:
            columns_of(model, prompt, self._phrases, self.name)
        if run.shape:
            self._masks(run)

    @contextmanager
    def shaping(self, network: Network, arguments: Mapping[str, Any], point: Point, side: str) -> Iterator[Any]:
        if side == "at":  # calls for latents or conditions of a term's own
            yield None
            return
        # Text encoders attend by the same kernel, so that prompts are read before it is watched.
        self._texts(point)
        reads, dense = network.reading(self.name), network.attending(self.layers, self.name)
        weights = {name: self.cross if name in reads else self.itself for name in dense}
        tapped = {name: layer for name, layer in dense.items() if weights[name]}
        tapped |= reads if self._stands_out else {}

        def attend(name: str) -> Attention:
            crossing, weight = name in reads, weights.get(name, 0.0)

            def seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **call: Any) -> Tensor:
                def gathered(at: slice, bias: Tensor | None) -> Tensor:
                    own = mask if mask is None or len(mask) < len(q) else mask[at]
                    given = own if bias is None else bias if own is None else bias + own
                    return scaled_dot_product_attention(q[at], k[at], v[at], attn_mask=given, **call)

                rows = _words.told(len(q), side)
                scale = call.get("scale") or q.shape[-1] ** -0.5
                found = gathered(
                    rows, self._bias(q[rows] * scale, k[rows], crossing, weight, point) if weight else None
                )
                if crossing and self._stands_out:
                    found = found * self._emphasis(v[rows], found.shape[-2], point)
                return torch.cat([gathered(slice(0, rows.start), None), found]) if rows.start else found

            return seen

        def balanced(words: Tensor) -> Tensor:
            raw = arguments["encoder_hidden_states"]
            return _words.added(words, self._offsets(raw[_words.told(len(raw), side)], point), side)

        with ExitStack() as entered:
            if self.balance != "none":
                entered.enter_context(_words.reading(reads, balanced))
            yield entered.enter_context(attending(tapped, self.name, attend))

    def _bias(self, q: Tensor, k: Tensor, crossing: bool, weight: float, point: Point) -> Tensor:
        """What logits [b, heads, n, m] get more; queries are scaled already."""
        rows, regions = len(q), self._regions(point, q.shape[-2])
        inside, outside = _words.kept(point, f"alike {q.shape[-2]}", lambda: alike(regions)), None
        share = 1 - self.area * inside.to(q).mean(1, keepdim=True)
        if crossing:
            columns = [text.columns for text in self._texts(point)]
            within = [about(regions, at, k.shape[-2]) for at in columns]
            without = [apart(one, at) for one, at in zip(within, columns, strict=True)]
            inside, outside = (torch.stack(_words.spread(one, rows))[:, None] for one in (within, without))
        at = zip(_words.strengths(self, point, rows), point.levels[-rows:], strict=True)
        tau = q.new_tensor([s * weight * level**self.power for s, level in at])
        return pushed(q @ k.mT, inside, outside, tau.view(-1, 1, 1, 1) * share)

    def _emphasis(self, v: Tensor, places: int, point: Point) -> Tensor:
        """[b, heads, places, d] by which what is gathered is multiplied."""
        regions, texts = self._regions(point, places), _words.spread(self._texts(point), len(v))
        stand = [
            prominent(values, text.words, about(regions, text.nouns, v.shape[-2]), self.top)
            for values, text in zip(v, texts, strict=True)
        ]
        strengths = v.new_tensor(_words.strengths(self, point, len(v))).view(-1, 1, 1, 1)
        others = float(self.prominence == "boost")
        return 1 + strengths * (torch.stack(stand).to(v) * (self.alpha - others) + others - 1)

    def _offsets(self, words: Tensor, point: Point) -> list[list[tuple[int, Tensor]]]:
        """Of each row, words [b, n, d], what its nouns' embeddings get more to be balanced."""
        rows, found = len(words), []
        for told, text, s in zip(
            words, _words.spread(self._texts(point), rows), _words.strengths(self, point, rows), strict=True
        ):
            most = self.beta * energy(told[text.words.stop])
            nouns = {at: text.told.get(at, told[at]).to(told) for several in text.nouns for at in several}
            found.append([(at, s * (e * (most / energy(e)).sqrt() - told[at])) for at, e in nouns.items()])
        return found

    # -- what is found once a run ----------------------------------------------------------------------------------

    @property
    def _phrases(self) -> list[Named]:
        """That of the background is the last."""
        more = [] if self.background is None else [named(self.background)]
        return [*(named(region.phrase, region.nouns) for region in self.regions), *more]

    def _masks(self, run: Run) -> Tensor:
        return masks_of(self.regions, run, self.name, rest=self.background is not None)

    def _regions(self, point: Point, places: int) -> Tensor:
        """bool [r, n] of the places of a layer."""
        (top, left), (height, width) = point.place, point.x.shape[-2:]
        masks = _words.kept(point, "masks", lambda: self._masks(point.run).to(point.x.device))
        mine = masks[:, top : top + height, left : left + width]
        found: Tensor = _words.kept(point, f"regions {places}", lambda: on_grid(mine, places))
        return found

    def _texts(self, point: Point) -> list[Text]:
        found: list[Text] = _words.kept(point, "texts", lambda: self._read_texts(point.run))
        return found

    def _read_texts(self, run: Run) -> list[Text]:
        model, prompts = run.modelled(self.name), _words.prompts_of(run, self.prompt, self.name)
        known = {prompt: read(model, prompt, self._phrases, self.name, self.balance) for prompt in {*prompts}}
        return [known[prompt] for prompt in prompts]


def energy(e: Tensor) -> Tensor:
    """||e||^2 of an embedding [d]."""
    return e.to(torch.promote_types(e.dtype, torch.float32)).square().sum()


def build(config: Config) -> Config:
    """The term."""
    return config
