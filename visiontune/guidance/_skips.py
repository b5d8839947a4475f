"""The long skips of a UNet: where they are, and a network in which they are scaled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.guidance._network import Network
from visiontune.guidance._taps import Forward, replaced
from visiontune.guidance.base import Strength


def taking(network: Network, term: str) -> dict[str, nn.Module]:
    """The stages that take long skips, the deepest first.

    Raises:
        UserError: the network has none.
    """
    return network.stages(term)[2]


def count(network: Network, term: str) -> int:
    """How many long skips there are; errors as of `taking`."""
    return sum(map(_taken, taking(network, term).values()))


@contextmanager
def scaled(stages: Mapping[str, nn.Module], factors: Sequence[Strength]) -> Iterator[None]:
    """In the block, long skips are scaled where they are taken, and with them what a ControlNet has added to them.

    Args:
        stages: as of `taking`. factors: of each skip, the deepest first; one number, or one for each row of the
            picture, [b, 1, 1, 1], of which a call may see both sides.
    """
    left = iter(factors)
    mine = {name: [next(left) for _ in range(_taken(stage))] for name, stage in stages.items()}

    def make(name: str, forward: Forward) -> Forward:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def shaped(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            # A stage takes the last one first.
            pairs = zip(call.arguments["res_hidden_states_tuple"], reversed(mine[name]), strict=True)
            call.arguments["res_hidden_states_tuple"] = tuple(_scaled(skip, factor) for skip, factor in pairs)
            return forward(*call.args, **call.kwargs)

        return shaped

    with replaced(stages, make):
        yield


def powers(bases: Sequence[float], exponent: Strength) -> list[Strength]:
    """Each of the bases to the power of one number, or of one for each row."""
    if isinstance(exponent, Tensor):
        return [torch.pow(base, exponent) for base in bases]
    return [base**exponent for base in bases]


def _scaled(skip: Tensor, factor: Strength) -> Tensor:
    if isinstance(factor, Tensor):
        factor = factor.to(skip).repeat(len(skip) // len(factor), 1, 1, 1)
    return skip * factor


def _taken(stage: Any) -> int:
    return len(stage.resnets)
