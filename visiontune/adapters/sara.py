"""SaRA: training in place of the entries that a pre-trained model uses least.

Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025,
arXiv 2409.06633, sections 3.2 to 3.5.

    P = P_0 + scatter(delta at M),   M = {i : |P_0,i| < theta},   loss + lambda sum_l ||(P . M)_l||_*

One theta serves all parameters of a component: weights, biases and norms. Only ``delta`` (zero at the start, one value
for each chosen entry) has a gradient and optimiser state. Half-way through the run those entries that have grown past
theta are frozen at their values, and the others go on with a fresh optimiser state (progressive parameter adjustment).

The nuclear norm's sub-gradient U V^T at the chosen entries is added to the gradient of one linear layer a step, drawn
at random. Weight decay pulls ``delta``, that is the model towards its base rather than the entries towards zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontune.adapters._layers import CONVOLUTIONS, NORMS, masters
from visiontune.adapters._sparse import Entries, InPlace
from visiontune.adapters.base import Adapter, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding, *NORMS)
# Why a process must have the base's weights whole.
WHOLE_BASE = "chooses among the base's weights between steps"
EXACT_SIZE, ITERATIONS = 512, 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SaRA; as many parameters as entries lie under the threshold."""

    budget: float = option(
        0.05, above=0, greatest=1, help="share of each component's entries to train, the smallest ones; in (0, 1]"
    )
    threshold: float | None = option(
        None, above=0, greatest=1e6, help="theta itself instead of a share; the paper: 2e-4 to 2e-3 for SD 1.5"
    )
    biases: bool = option(True, help="choose among biases and norms too")
    rank_loss: float = option(5e-4, least=0, greatest=1e6, help="lambda, weight of the nuclear norm; 0 for none")
    progressive: bool = option(True, help="half-way, freeze the entries that have outgrown the threshold")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SaRA for the layers of one component.

    Raises:
        UserError: no entry lies under the threshold.
    """
    return SaRA(config, layers)


class SaRA(InPlace):
    """The chosen entries of one component."""

    reselected: Tensor

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        theta = config.threshold
        if theta is None:
            theta = smallest(_candidates(config, layers.values()), config.budget)
        adapters: dict[str, Adapter] = {name: Unused(config, layer, theta) for name, layer in layers.items()}
        super().__init__(adapters)
        self.config, self.theta = config, theta
        self.register_buffer("reselected", torch.tensor(False))
        if not list(self.parameters()):
            raise UserError(f"no weight is smaller than adapter.threshold={theta:g}: raise it, or use adapter.budget")

    def entries(self) -> list[Unused]:
        """The adapters."""
        return [a for a in self.adapters.values() if isinstance(a, Unused)]

    @torch.no_grad()
    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """Hold the frozen entries, and add the rank loss to the gradient of one layer."""
        for entry in self.entries():
            entry.hold()
        able = [e for e in self.entries() if e.matrix and e.change is not None and e.change.grad is not None]
        if self.config.rank_loss and able:
            # The same layer on every process, and after a restart.
            drawn = torch.randint(len(able), (), generator=torch.Generator().manual_seed(step))
            able[int(drawn)].add_rank_gradient(self.config.rank_loss * loss_scale)

    @torch.no_grad()
    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """Put frozen entries back, whatever the optimiser did to them; reselect half-way."""
        for entry in self.entries():
            entry.put_back()
        if self.config.progressive and done >= 0.5 and not self.reselected:
            self.reselected.fill_(True)
            for entry in self.entries():
                entry.reselect(self.theta)
            if optimizer is not None:
                for parameter in self.parameters():
                    optimizer.state.pop(parameter, None)


class Unused(Entries):
    """The entries of one layer under the threshold, and which of them are ``frozen`` at their values."""

    frozen: Tensor
    bias_frozen: Tensor

    def __init__(self, config: Config, layer: Any, theta: float) -> None:
        bias, none = getattr(layer, "bias", None), torch.zeros(0, dtype=torch.int64)
        super().__init__(
            layer,
            none if isinstance(layer, NORMS) and not config.biases else below(layer.weight, theta),
            none if bias is None or not config.biases else below(bias, theta),
        )
        self.matrix = isinstance(layer, nn.Linear)
        self._held: list[Tensor] = []

    def choose(self, index: Tensor, bias_index: Tensor) -> None:
        """Train these entries, from zero change, none of them frozen."""
        super().choose(index, bias_index)
        self.register_buffer("frozen", torch.zeros_like(self.index, dtype=torch.bool))
        self.register_buffer("bias_frozen", torch.zeros_like(self.bias_index, dtype=torch.bool))

    def _parts(self) -> list[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
        """Parameter, frozen mask, positions and the base tensor, for weight and bias."""
        layer, parts = self.layer[0], []
        if self.change is not None:
            parts.append((self.change, self.frozen, self.index, layer.weight))
        if self.bias_change is not None:
            parts.append((self.bias_change, self.bias_frozen, self.bias_index, layer.bias))
        return parts

    def hold(self) -> None:
        """Remember the frozen entries and take them out of the gradient."""
        self._held = []
        for parameter, frozen, _, _ in self._parts():
            self._held.append(parameter[frozen])
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0)

    def put_back(self) -> None:
        """Undo what weight decay did to the frozen entries."""
        for (parameter, frozen, _, _), held in zip(self._parts(), self._held, strict=False):
            parameter[frozen] = held

    def reselect(self, theta: float) -> None:
        """Freeze the entries whose present value is not under ``theta``."""
        for parameter, frozen, index, base in self._parts():
            frozen.copy_((base.detach().take(index).to(parameter) + parameter).abs() >= theta)

    def add_rank_gradient(self, weight: float) -> None:
        """Add ``weight`` times the sub-gradient of the nuclear norm of the chosen entries' matrix."""
        assert self.change is not None and self.change.grad is not None
        base = self.layer[0].weight.detach()
        values = base.take(self.index).to(self.change) + self.change
        matrix = torch.zeros(base.shape, **masters(self.layer[0])).put_(self.index, values)
        gradient = polar_factor(matrix).take(self.index).masked_fill_(self.frozen, 0)
        self.change.grad.add_(gradient, alpha=weight)


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition, without directions of vanishing singular value.

    Above ``EXACT_SIZE`` rows and columns a Newton-Schulz iteration stands in, which leaves directions below some
    3e-4 of the largest singular value short of length one.
    """
    if min(matrix.shape) <= EXACT_SIZE:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u * (s > 1e-6 * s[:1])) @ v
    x = matrix / torch.linalg.matrix_norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
    for _ in range(ITERATIONS):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x if x.shape[0] <= x.shape[1] else 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


# ---------------------------------------------------------------------------------------------------- choosing


def below(values: Tensor, theta: float) -> Tensor:
    """Flat positions, ascending, of the entries with ``|p| < theta``."""
    return (_magnitude(values.detach()) < theta).nonzero().squeeze(1)


def smallest(tensors: Iterable[Tensor], share: float) -> float:
    """The threshold under which a ``share`` of all entries lies, rounded up; histograms spare a sort of them all."""
    tensors = [t.detach() for t in tensors]
    wanted = max(1, math.ceil(share * sum(t.numel() for t in tensors) - 1e-6))
    low, high = 0.0, max(float(t.abs().max()) for t in tensors if t.numel())
    for _ in range(2):
        counts = torch.stack([_histogram(t, low, high) for t in tensors]).sum(0)
        under = sum(int((_magnitude(t) < low).sum()) for t in tensors)
        bucket, width = int((under + counts.cumsum(0) < wanted).sum()), (high - low) / len(counts)
        # One bucket to spare on both sides, since the edges are rounded.
        low, high = max(low + (bucket - 1) * width, low), min(low + (bucket + 2) * width, high)
    under = sum(int((_magnitude(t) < low).sum()) for t in tensors)
    inside = torch.cat([_between(t, low, high) for t in tensors])
    value = inside.kthvalue(wanted - under).values
    return float(torch.nextafter(value, value.new_tensor(math.inf)))


def _magnitude(values: Tensor) -> Tensor:
    return values.flatten().to(torch.promote_types(values.dtype, torch.float32)).abs()


def _between(values: Tensor, low: float, high: float) -> Tensor:
    magnitude = _magnitude(values)
    return magnitude[(magnitude >= low) & (magnitude <= high)]


def _histogram(values: Tensor, low: float, high: float, buckets: int = 1024) -> Tensor:
    return torch.histc(_between(values, low, high).cpu(), buckets, low, high).double()


def _candidates(config: Config, layers: Iterable[Any]) -> list[Tensor]:
    tensors = []
    for layer in layers:
        if config.biases or not isinstance(layer, NORMS):
            tensors.append(layer.weight)
        if config.biases and getattr(layer, "bias", None) is not None:
            tensors.append(layer.bias)
    return tensors
