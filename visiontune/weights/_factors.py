"""Changes of weights as two factors, and files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontune.adapters._header import sort_header
from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.lora import row_lengths
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights._sets import Changes
from visiontune.weights.export import Exported, Job, off_by

_FACTORED = (nn.Linear, *CONVOLUTIONS)


class Factors(NamedTuple):
    """The change of a layer.

    Attributes:
        down: [r, in, kernel ...]. up: [out, r], with the strength.
        lengths: of the adapted weight's rows, [out]; none but for DoRA.
    """

    down: Tensor
    up: Tensor
    lengths: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self, base: Tensor) -> Tensor:
        """``up @ down`` in the shape of the layer's weight."""
        return (self.up.double() @ self.down.double().flatten(1)).view_as(base)

    def change(self, base: Tensor, alpha: float | None = None) -> Tensor:
        """What readers add to ``base``, for whom the product counts ``alpha / rank`` times; once without ``alpha``."""
        change = self.product(base) * (alpha / self.rank if alpha else 1.0)
        if self.lengths is None:
            return change
        turned = base.double() + change
        stretch = self.lengths.double() / row_lengths(turned).to(turned).clamp_min(1e-30)
        return turned * stretch.view(-1, *[1] * (base.dim() - 1)) - base.double()

    def rounded(self, dtype: torch.dtype, times: float) -> Factors:
        """As they are written in ``dtype``, ``up`` multiplied by ``times``; lengths stay float32.

        For float16, which has few digits below 1e-4, a power of two goes from the greater factor to the smaller, which
        leaves the product as it is. A rounded length would be off by more than a small change.
        """
        down, up = self.down.double(), self.up.double() * times
        if dtype == torch.float16 and up.any() and down.any():
            shift = torch.exp2(torch.log2(down.abs().max() / up.abs().max()).div(2).round())
            down, up = down / shift, up * shift
        return Factors(down.to(dtype), up.to(dtype), None if self.lengths is None else self.lengths.float())

    def shaped_up(self) -> Tensor:
        """``up`` as the weight of a layer: [out, r, 1 ...]."""
        return self.up.view(*self.up.shape, *[1] * (self.down.dim() - 2))


def factored(changes: Changes, job: Job, path: Path, alpha: float | None = None) -> tuple[Exported, dict[str, Factors]]:
    """The factors of each layer, rounded, and what will have been written to ``path`` with them.

    With ``alpha``, readers multiply by ``alpha / rank``, and the second factors are as much greater.
    """
    found = _found(changes, job)
    done, written = Exported(path, f"{len(found)} layers"), dict[str, Factors]()
    done.dora = any(factors.lengths is not None for factors in found.values())
    for layer, factors in found.items():
        base = changes.layer(layer).weight
        if done.dora and factors.lengths is None:
            # Readers take a file with some lengths for one of DoRA throughout.
            factors = factors._replace(lengths=row_lengths(base.double() + factors.product(base)))
        written[layer] = factors.rounded(job.dtype, factors.rank / alpha if alpha else 1.0)
        change = changes.change(layer)[0]
        done.errors[layer] = off_by(written[layer].change(base, alpha), change, change)
        done.ranks[layer] = factors.rank
    return done, written


def _found(changes: Changes, job: Job) -> dict[str, Factors]:
    """The factors of each layer that changes."""
    found = {}
    for layer in changes.layers:
        own = changes.decomposed(layer) if job.rank is None else None
        factors = own or changes.low_rank(layer)
        if factors is None:
            weight = changes.change(layer)[0]
            factors = factorise(weight, job.rank) if weight.any() else None
        # There may also be layers to which a method gave no rank.
        if factors is not None and len(factors[0]):
            found[layer] = Factors(*factors)
    return found


def check_factored(changes: Changes, kind: str) -> None:
    """Refuse what two factors of a layer's weight are not.

    Raises:
        UserError: naming the first layer that ``kind`` cannot hold.
    """
    for layer in changes.layers:
        if changes.joint(layer):
            raise UserError(f"'{layer}' is the joint weight of an attention, which {kind} has no name for")
        if not isinstance(changes.layer(layer), _FACTORED):
            raise UserError(f"'{layer}' is neither linear nor a convolution, as {kind} needs")
        if getattr(changes.layer(layer), "groups", 1) > 1:
            raise UserError(f"'{layer}' is a convolution in groups, of which {kind} reads other factors")
        if changes.moves_bias(layer):
            raise UserError(f"'{layer}' has a changed bias, which {kind} cannot hold")


def factorise(change: Tensor, rank: int | None = None, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The best ``up @ down`` of a rank for ``change`` [out, in, kernel ...]: down [r, in, kernel ...], up [out, r].

    Without ``rank``, all singular values above ``tolerance`` of the largest.
    """
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    r = rank or max(1, int((s > tolerance * s[0]).sum()))
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).view(-1, *change.shape[1:]), u[:, :r] * root


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a ``.safetensors`` file, whole or not at all; equal ones are equal files.

    Raises:
        UserError: there is nothing to write, or a number that is none in the format of its tensor.
    """
    if not tensors:
        raise UserError(
            "the adapter changes nothing at this strength, so there is nothing to write: give another scale"
        )
    for key, value in tensors.items():
        if not value.isfinite().all():
            name = str(value.dtype).removeprefix("torch.")
            raise UserError(f"'{key}' is not finite in {name}: write it by --dtype fp32, or lower --scale")
    written = {key: value.cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(written, temporary, {"format": "pt", **metadata})
        sort_header(temporary)
