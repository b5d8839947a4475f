"""How a stock pipeline calls its denoiser and what that is made of: for guidance that reaches into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from visiontune.core import Condition

Arguments = Mapping[str, Any]
Words = Literal["none", "before", "after"]


def _as_it_is(told: Tensor) -> Tensor:
    return told


def thousandths(told: Tensor) -> Tensor:
    """Timesteps of a network that is told them in [0, 1]."""
    return told * 1000


def _unchanged(x: Tensor, arguments: Arguments) -> Tensor:
    return x


def _noisy_sides(arguments: Arguments, noisy: str) -> tuple[int, int]:
    height, width = arguments[noisy].shape[-2:]
    return height, width


def _as_they_are(network: Any, scale: Tensor) -> Arguments:
    return {"guidance": scale}


def _tokens_alone(arguments: Arguments) -> Condition:
    return Condition(tokens=arguments["encoder_hidden_states"])


def pooled(arguments: Arguments) -> Condition:
    """Tokens and a pooled vector."""
    return Condition(tokens=arguments["encoder_hidden_states"], pooled=arguments["pooled_projections"])


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The facts of a family. Names are those of the arguments of the denoiser's `forward`; patterns are regular
    expressions for the whole name of a module in the denoiser.

    Attributes:
        sides: how its pipeline guides: in one call, with the rows of the negative prompt first or last, or in two
            calls, `apart`, the first of which is the prompt's.
        noisy: the noisy latents, or masked tokens; a tensor, or a list of the rows.
        told: the time. time: timestep of the schedule, of what is told; None for masked tokens, which have none.
        sign: of the network's output beside `schedule.prediction`.
        blocks: pattern of the blocks that can be skipped, and those of their arguments that they return, in order; of
            one alone they return it bare.
        attention: pattern of the layers in which the picture attends to itself, and where the words stand among their
            tokens. words: the argument whose second axis tells how many.
        cross: pattern of the layers in which it attends to words alone; None where those are the layers above.
        tokenizers: components of the pipeline that read what stands along the tokens, one after the other.
        mid: beginning of the names of what is in the middle; None takes the block in the middle of all.
        grid: height and width of the picture's tokens, or in the same ratio.
        stages: of a network with long skips, patterns of what goes down, of the middle, and of what comes up and takes
            the skips as `res_hidden_states_tuple`, the last of them first.
        canonical: latents and predictions [b, c, (f), h, w] of those of the denoiser, or of the sampler. native: back.
        telling: of a network with guidance inside, the arguments that say scales [b] to it.
        condition: what the rows of a call are told, as `embed` gives it.
        pipelines: the pipeline classes that this holds for; None for all of the family.
    """

    sides: Literal["negative first", "prompt first", "apart"]
    noisy: str = "hidden_states"
    told: str = "timestep"
    time: Callable[[Tensor], Tensor] | None = _as_it_is
    sign: int = 1
    blocks: Mapping[str, tuple[str, ...]]
    attention: Mapping[str, Words]
    words: str = "encoder_hidden_states"
    cross: str | None = None
    tokenizers: tuple[str, ...] = ("tokenizer",)
    mid: str | None = None
    grid: Callable[[Arguments, str], tuple[int, int]] = _noisy_sides
    stages: tuple[str, str, str] | None = None
    canonical: Callable[[Tensor, Arguments], Tensor] = _unchanged
    native: Callable[[Tensor, Arguments], Tensor] = _unchanged
    telling: Callable[[Any, Tensor], Arguments] = _as_they_are
    condition: Callable[[Arguments], Condition] = _tokens_alone
    pipelines: tuple[str, ...] | None = None
