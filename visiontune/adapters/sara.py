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

from visiontune.adapters._layers import CONVOLUTIONS, NORMS, compute_dtype, masters
from visiontune.adapters._sparse import pad, product_of, with_entries
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Embedding, *NORMS)
EXACT_SIZE, ITERATIONS = 512, 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SaRA; as many parameters as entries lie under the threshold."""

    budget: float = option(0.05, help="share of each component's entries to train, the smallest ones; in (0, 1]")
    threshold: float | None = option(None, help="theta itself instead of a share; the paper: 2e-4 to 2e-3 for SD 1.5")
    biases: bool = option(True, help="choose among biases and norms too")
    rank_loss: float = option(5e-4, help="lambda, weight of the nuclear norm; 0 for none")
    progressive: bool = option(True, help="half-way, freeze the entries that have outgrown the threshold")

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError("budget must be in (0, 1]")
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError("threshold must be positive")
        if self.rank_loss < 0:
            raise ValueError("rank_loss must not be negative")


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """SaRA for the layers of one component.

    Raises:
        UserError: no entry lies under the threshold.
    """
    return SaRA(config, layers)


class SaRA(Method):
    """The chosen entries of one component."""

    reselected: Tensor

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        theta = config.threshold
        if theta is None:
            theta = smallest(_candidates(config, layers.values()), config.budget)
        adapters: dict[str, Adapter] = {name: Entries(config, layer, theta) for name, layer in layers.items()}
        super().__init__(adapters)
        self.config, self.theta = config, theta
        self.register_buffer("reselected", torch.tensor(False))
        if not list(self.parameters()):
            raise UserError(f"no weight is smaller than adapter.threshold={theta:g}: raise it, or use adapter.budget")

    def entries(self) -> list[Entries]:
        """The adapters."""
        return [a for a in self.adapters.values() if isinstance(a, Entries)]

    def fit(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the saved choice of entries: the base at hand may be rounded, and choose others."""
        for name, tensors in saved.items():
            entry = self.adapters[name]
            if isinstance(entry, Entries) and {"index", "bias_index"} <= tensors.keys():
                entry.choose(tensors["index"], tensors["bias_index"])

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


class Entries(nn.Module, Adapter):
    """The chosen entries of one layer: ``index`` [n] in its weight, ``bias_index`` [m] in its bias."""

    change: nn.Parameter | None
    bias_change: nn.Parameter | None
    index: Tensor
    bias_index: Tensor
    frozen: Tensor
    bias_frozen: Tensor

    def __init__(self, config: Config, layer: Any, theta: float) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, lest the base become a submodule
        self.norm, self.matrix = isinstance(layer, NORMS), isinstance(layer, nn.Linear)
        bias, none = getattr(layer, "bias", None), torch.zeros(0, dtype=torch.int64)
        self._held: list[Tensor] = []
        self.choose(
            none if self.norm and not config.biases else below(layer.weight, theta),
            none if bias is None or not config.biases else below(bias, theta),
        )

    def choose(self, index: Tensor, bias_index: Tensor) -> None:
        """Train these entries, from zero change."""
        place = masters(self.layer[0])
        for prefix, positions in (("", index), ("bias_", bias_index)):
            positions = positions.to(place["device"])
            self.register_buffer(f"{prefix}index", positions)
            self.register_buffer(f"{prefix}frozen", torch.zeros_like(positions, dtype=torch.bool))
            change = nn.Parameter(torch.zeros(len(positions), **place)) if len(positions) else None
            self.register_parameter(f"{prefix}change", change)
        self.product = None if self.norm or self.change is None else product_of(self.layer[0], self.index)

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale scatter(change)``."""
        return w if self.change is None else _scattered(w, self.index, scale * self.change)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``b + scale scatter(bias_change)``."""
        return b if b is None or self.bias_change is None else _scattered(b, self.bias_index, scale * self.bias_change)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """The layer with its entries changed; neither a second weight nor a dense gradient outlives this layer."""
        bias = self.bias(beneath.bias(), scale)
        if self.change is None or self.product is None or not beneath.frozen:
            return beneath.using(x, self.weight(beneath.weight(), scale), bias)
        dtype = compute_dtype(x) if x.is_floating_point() else beneath.layer.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = pad(beneath.layer, x.to(dtype) if x.is_floating_point() else x)
            bias = None if bias is None else bias.to(dtype)
            return with_entries(x, scale * self.change, bias, beneath.layer.weight, self.index, self.product)

    def tensors(self) -> dict[str, Tensor]:
        saved = {f"{prefix}index": index for prefix, index in (("", self.index), ("bias_", self.bias_index))}
        return saved | {name: parameter for name, parameter in self.named_parameters()}

    # -- training -----------------------------------------------------------------------------------------------

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


def _scattered(w: Tensor, index: Tensor, change: Tensor) -> Tensor:
    return w.put(index, (w.take(index).to(change.dtype) + change).to(w.dtype))


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
