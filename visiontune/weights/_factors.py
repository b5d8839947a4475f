"""Changes of weights as two factors, and files of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontune.adapters._layers import CONVOLUTIONS
from visiontune.adapters.lora import DoRA
from visiontune.errors import UserError
from visiontune.files import atomic_write
from visiontune.weights.export import Exported, Job, is_joint

if TYPE_CHECKING:
    from visiontune.adapters import AdapterSet

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

    def shaped_up(self) -> Tensor:
        """``up`` as the weight of a layer: [out, r, 1 ...]."""
        return self.up.view(*self.up.shape, *[1] * (self.down.dim() - 2))


def write_factors(
    adapters: AdapterSet,
    path: Path,
    job: Job,
    kind: str,
    names: Mapping[str, str],
    tensors_of: Callable[[str, Factors], dict[str, Tensor]],
) -> Exported:
    """A file of the factors of each layer, which ``tensors_of`` puts under its name.

    Raises:
        UserError: a layer whose change ``kind`` cannot hold.
    """
    done, tensors = Exported(path, f"{len(adapters.layers)} layers"), dict[str, Tensor]()
    for layer in adapters.layers:
        weight, bias = adapters.change(layer)
        _refuse(adapters, layer, bias, kind)
        own = decomposed(adapters, layer) if job.rank is None else None
        found = own or Factors(*(adapters.low_rank(layer) or factorise(weight, job.rank)))
        if not found.rank:
            continue  # a layer to which a method gave no rank
        done.dora |= own is not None
        done.errors[layer] = 0.0 if own else _error(weight, found)
        done.ranks[layer] = found.rank
        tensors |= tensors_of(names[layer], found)
    save_tensors(tensors, path, job.dtype)
    return done


def _refuse(adapters: AdapterSet, layer: str, bias: Tensor | None, kind: str) -> None:
    if is_joint(adapters, layer):
        raise UserError(
            f"'{layer}' is the joint weight of an attention, which {kind} has no name for: export 'diff', or merge"
        )
    if not isinstance(adapters.layer(layer), _FACTORED):
        raise UserError(f"'{layer}' is neither linear nor a convolution, as {kind} needs: export as 'diff', or merge")
    if bias is not None and bias.any():
        raise UserError(f"'{layer}' has a changed bias, which {kind} cannot hold: export as 'diff', or merge")


def decomposed(adapters: AdapterSet, layer: str) -> Factors | None:
    """Factors and lengths of rows of a layer with DoRA; none for other methods and for several groups."""
    adapter = adapters.adapters()[layer]
    found = adapter.decomposed(adapters.layer(layer).weight, adapters.scale) if isinstance(adapter, DoRA) else None
    return None if found is None else Factors(*found)


def factorise(change: Tensor, rank: int | None = None, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The best ``up @ down`` of a rank for ``change`` [out, in, kernel ...]: down [r, in, kernel ...], up [out, r].

    Without ``rank``, all singular values above ``tolerance`` of the largest.
    """
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    r = rank or max(1, int((s > tolerance * s[0]).sum()))
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).view(-1, *change.shape[1:]), u[:, :r] * root


def _error(change: Tensor, factors: Factors) -> float:
    left = change.flatten(1).double() - factors.up.double() @ factors.down.flatten(1).double()
    return float(left.norm() / change.double().norm().clamp_min(1e-30))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Write a ``.safetensors`` file, whole or not at all."""
    written = {key: value.to(dtype).cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(written, temporary, {"format": "pt"})
