"""What a stock pipeline and its denoiser pass to each other, in our shape [b, c, (f), h, w] and sign, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontune.models._structure import Structure

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Native:
    """The formats of a denoiser.

    Args:
        structure: of its family. denoiser: the network.
    """

    structure: Structure
    denoiser: nn.Module

    def latents(self, arguments: Arguments) -> Tensor:
        """The noisy latents in our shape, or masked tokens."""
        return self.structure.canonical(stacked(arguments[self.structure.noisy]), arguments)

    def with_latents(self, arguments: Arguments, x: Tensor) -> Arguments:
        """The arguments with other latents, which are in our shape."""
        noisy, native = arguments[self.structure.noisy], self.structure.native(x, arguments)
        given = list(native.to(noisy[0]).unbind()) if isinstance(noisy, list) else native.to(noisy)
        return {**arguments, self.structure.noisy: given}

    def prediction(self, found: Any, arguments: Arguments) -> Tensor:
        """Of what the network gave, the part that is of its noisy input; some give a variance behind it."""
        value = stacked(value_of(found))
        noisy = arguments[self.structure.noisy]
        mine = value[:, : noisy.shape[1]] if self._has_more(value, noisy) else value
        return self.structure.sign * self.structure.canonical(mine, arguments)

    def _has_more(self, value: Tensor, noisy: Any) -> bool:
        return isinstance(noisy, Tensor) and noisy.ndim == value.ndim and value.shape[1] > noisy.shape[1]

    def packed(self, p: Tensor, arguments: Arguments, found: Any) -> Any:
        """A prediction as the network gives one, and gave `found`."""
        value = value_of(found)
        made = self.structure.native(self.structure.sign * p, arguments)
        if isinstance(value, list):
            return with_value(found, list(made.to(value[0]).unbind()))
        if value.shape[1] > made.shape[1]:
            behind = value[:, made.shape[1] :]
            made = torch.cat([made, torch.cat([behind] * (len(made) // len(behind)))], dim=1)
        return with_value(found, made.to(value))

    def blank(self, arguments: Arguments) -> Any:
        """Zeros, as the network would give them without being called."""
        noisy = arguments[self.structure.noisy]
        if isinstance(noisy, list):
            return ([torch.zeros_like(row) for row in noisy],)
        doubled = getattr(self.denoiser.config, "out_channels", None) == 2 * noisy.shape[1]
        return (torch.zeros_like(torch.cat([noisy] * 2, dim=1) if doubled else noisy),)


def value_of(found: Any) -> Any:
    """The prediction in what a network gave: itself, or the first of a tuple or an output of diffusers."""
    return found if isinstance(found, Tensor) else found[0]


def with_value(found: Any, value: Any) -> Any:
    """What a network gave, with another prediction in it."""
    if isinstance(found, Tensor):
        return value
    if isinstance(found, tuple):
        return (value, *found[1:])
    return type(found)(**{**found, next(iter(found)): value})


def stacked(rows: Tensor | list[Tensor]) -> Tensor:
    """Rows in one tensor; some networks take and give them in a list."""
    return torch.stack(rows) if isinstance(rows, list) else rows


def rows_within(value: Any, rows: int, part: slice) -> Any:
    """Of whatever has one entry a row, those of a part."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == rows else value
    if isinstance(value, list):
        return value[part] if len(value) == rows else value
    if isinstance(value, dict):
        return {key: rows_within(item, rows, part) for key, item in value.items()}
    return value
