"""TokenCompose: denoising, while the words of each object are attended to where it is, and nowhere else.

Wang et al., "TokenCompose: Text-to-Image Diffusion with Token-level Supervision", 2023, arXiv 2312.03626, equations 2
to 4. With A [heads, places, tokens] the shares of a layer's attention among the words, M_i the mask of noun i and K_i
its tokens,

    rho_k = mean over heads of (sum over places of A M_i / sum over places of A),    k in K_i
    L_token = sum over layers of the mean over nouns and their tokens of (1 - rho_k)^2
    L_pixel = sum over groups of the mean over nouns of BCE(sum over K_i of A, M_i)

A group is the layers of one part of the network and one resolution, over which, and over heads, A is averaged for
L_pixel. L_token does not depend on how much attention there is; L_pixel says how much there should be. Nothing changes
when pictures are drawn. In joint attention A is what the picture gives to words, in shares of that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, binary_cross_entropy

from visiontune.core import Batch, Loss
from visiontune.data.base import SEGMENTS, Sample, listed
from visiontune.data.segments import planes
from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._probe import probing, shares_of_words
from visiontune.guidance._taps import Inside, noted
from visiontune.models.words import places
from visiontune.objectives import denoising
from visiontune.objectives.base import Needs, Tools, by_range, combine
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel
    from visiontune.models.pipeline import PipelineModel

_TERM = "objective=tokencompose"


@dataclass(frozen=True, kw_only=True)
class Config(denoising.Noising):
    """Options of TokenCompose: those of the denoising loss, and the weights of what attention should do."""

    token_weight: float = option(
        1e-3, least=0, greatest=1e6, help="of attention that a noun's words get outside of its mask"
    )
    pixel_weight: float = option(
        5e-5, least=0, greatest=1e6, help="of how far attention to a noun's words is from its mask"
    )
    layers: list[str] = option(
        [], help="layers that are looked at, by patterns of names; empty: the middle and, of UNets, the way up"
    )


def build(config: Config) -> TokenCompose:
    """The objective that ``config`` describes."""
    return TokenCompose(config)


def token_loss(shares: Tensor, mask: Tensor, tokens: Sequence[int]) -> Tensor:
    """Mean over a noun's tokens of (1 - rho)^2.

    Args:
        shares: ``[heads, h, w, words]``. mask: ``[h, w]`` bool. tokens: the noun's, places along the words.
    """
    own = shares[..., list(tokens)]
    inside = (own * mask[..., None]).sum((1, 2))
    rho = (inside / own.sum((1, 2)).clamp(min=torch.finfo(own.dtype).tiny)).mean(0)
    return (1 - rho).square().mean()


def pixel_loss(shares: Tensor, mask: Tensor, tokens: Sequence[int]) -> Tensor:
    """BCE between what a noun's tokens get together, ``[h, w, words]`` being the means over heads, and its mask."""
    own = shares[..., list(tokens)].sum(-1)
    return binary_cross_entropy(own.clamp(1e-6, 1 - 1e-6), mask.to(own))


class TokenCompose(denoising.Denoising):
    """``l + token_weight L_token + pixel_weight L_pixel`` of each row; logs the means of the three.

    A noun that a crop has left outside of the picture does not count; nor do rows whose caption was dropped.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._places: dict[tuple[str, str], list[int]] = {}

    @property
    def needs(self) -> Needs:
        given = super().needs
        return replace(given, columns=(*given.columns, SEGMENTS))

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a network whose attention to words is not known.

        Raises:
            UserError: see above.
        """
        super().check(model, reward)
        self.layers(Network.of_model(model))

    def layers(self, network: Network) -> Mapping[str, Any]:
        """The layers that are looked at, by name."""
        unet = network.structure is not None and network.structure.stages is not None
        usual = ["mid", "up_blocks"] if unet else ["mid"]
        return network.worded(self.config.layers or usual, _TERM)

    def prepare(
        self, model: PipelineModel, data: Any, samples: Sequence[Sample], cache_dir: Path, tools: Tools
    ) -> Sequence[Sample]:
        """Find every noun in its caption.

        Raises:
            UserError: some are not there, or stand behind the last token that is read; it names them.
        """
        lost = []
        for sample in samples:
            for noun in sample.nouns:
                try:
                    self.places(model, sample.caption, noun)
                except UserError:
                    lost.append(f"'{noun}' of {sample.id}")
        if lost:
            raise UserError(
                f"{len(lost)} nouns are not among the words that the model reads of their captions: {listed(lost)}: "
                "write them as the caption does, shorten the caption, or give them null for a mask"
            )
        return []

    def places(self, model: PipelineModel, prompt: str, noun: str) -> list[int]:
        """The tokens of a noun along those of its prompt.

        Raises:
            UserError: it is not read, or not to its end.
        """
        if (prompt, noun) not in self._places:
            found = places(model, prompt, noun)
            if not {*found} & {*places(model, prompt, noun.split()[-1])}:
                raise UserError(f"'{noun}' is read in part of the prompt '{prompt[:80]}'")
            self._places[prompt, noun] = found
        return self._places[prompt, noun]

    def loss(self, model: DiffusionModel, batch: Batch, tools: Tools) -> Loss:
        with self.looking(model) as shares:
            errors = self.errors(model, batch, tools)
        own = [{name: found[i] for name, found in shares.items()} for i in range(len(batch))]
        rows = [self.grounding(model, batch[i], found) for i, found in enumerate(own)]
        token, pixel = (torch.stack(column).to(errors) for column in zip(*rows, strict=True))
        total = errors + self.config.token_weight * token + self.config.pixel_weight * pixel
        terms = {"denoising": errors.detach().mean(), "token": token.detach().mean(), "pixel": pixel.detach().mean()}
        return Loss(total=combine(total, batch), terms={**terms, **by_range(errors, batch)})

    @contextmanager
    def looking(self, model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
        """In the block the first prediction leaves each layer's shares ``[b, heads, h, w, words]``, with their graph.

        Raises:
            UserError: a layer computes attention elsewhere than in torch's function, or its graph is thrown away.
        """
        network = Network.of_model(model)
        found: dict[str, Tensor] = {}
        arguments: dict[str, Any] = {}
        graph, open_ = torch.is_grad_enabled(), True

        def tell(name: str, shares: Tensor) -> None:
            if graph and open_ and not torch.is_grad_enabled():
                raise UserError(
                    f"{_TERM} learns from attention that re-entrant checkpointing computes without a graph: take "
                    "checkpointing with use_reentrant=False, as train.gradient_checkpointing does"
                )
            # What is checkpointed is computed again in the backward pass, and looked at again.
            if open_:
                found[name] = shares

        layers = self.layers(network)
        inside = Inside(lambda: probing(network, layers, arguments, _TERM, tell, shares_of_words))
        with noted(network.denoiser, arguments), inside.around(network.denoiser) as check:
            yield found
            check()
        open_ = False

    def grounding(self, model: DiffusionModel, row: Batch, shares: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_token and L_pixel of one row, of each layer's shares ``[heads, h, w, words]``."""
        zero = next(iter(shares.values())).new_zeros(())
        nouns = row.nouns[0] if row.nouns and row.prompts[0] else ()
        masks = zip(nouns, planes(row.data[SEGMENTS][0], len(nouns)), strict=True)
        there = [(self.places(model, row.prompts[0], noun), mask) for noun, mask in masks if mask.any()]
        if not there:
            return zero, zero
        groups: dict[tuple[str, torch.Size], list[Tensor]] = {}
        token = zero
        for name, found in shares.items():
            groups.setdefault((name.partition(".")[0], found.shape[1:3]), []).append(found)
            token = token + _mean(token_loss(found, _at(mask, found.shape[1:3]), own) for own, mask in there)
        pixel = zero
        for (_, grid), layers in groups.items():
            mean = torch.stack([found.mean(0) for found in layers]).mean(0)
            pixel = pixel + _mean(pixel_loss(mean, _at(mask, grid), own) for own, mask in there)
        return token, pixel


def _mean(losses: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _at(mask: Tensor, grid: torch.Size) -> Tensor:
    """A mask ``[h, w]`` at a layer's grid: wherever there is some of it."""
    return adaptive_max_pool2d(mask[None].float(), tuple(grid))[0] > 0
