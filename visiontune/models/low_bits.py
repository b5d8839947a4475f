"""A UNet that computes as if in few bits: weights and what layers are given are rounded, gradients pass the rounding.

Wang et al., "QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning", 2024, arXiv 2402.03666:
weights have a step for each output channel, inputs one step and offset for each noise level. The gradient of a step is
that of Esser et al., "Learned Step Size Quantization", 2019, arXiv 1902.08153, equation 3. Nothing is faster by this:
it shows what kernels of few bits would draw, and is what is tuned for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from visiontune import outside
from visiontune.errors import UserError
from visiontune.models import _fitted
from visiontune.schema import from_mapping, option

_MARK, _MAKER = "visiontune_low_bits", "pipelines/distil/quest.py"

# Shares of a channel's range of which the best is its step, since few codes are spent better on its bulk.
_SHRINK = torch.linspace(0.4, 1.0, 25)


@dataclass(frozen=True, kw_only=True)
class Bits:
    """How many bits numbers have; 32 leaves them as they are."""

    weights: int = option(4, least=2, greatest=32, help="of weights, whose steps are of an output channel each")
    inputs: int = option(8, least=2, greatest=32, help="of what layers are given, of one step for each noise level")
    ends: int = option(8, least=2, greatest=32, help="of both in the first and the last layer")


def rounded(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``step (clip(round(x / step) + zero, 0, 2^bits - 1) - zero)``; gradients take the rounding for the identity."""
    scaled = x / step
    whole = scaled + (scaled.round() - scaled).detach()
    return step * ((whole + zero).clamp(0, 2**bits - 1) - zero)


def channel_steps(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero of each output channel, [out, 1, ...], with the least squared error among shares of its range."""
    flat = w.flatten(1)
    low, high = flat.amin(1, keepdim=True).clamp(max=0), flat.amax(1, keepdim=True).clamp(min=0)
    whole = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(w.dtype).tiny)
    best = torch.full_like(whole, torch.inf)
    step = whole
    for share in _SHRINK.tolist():
        tried = whole * share
        error = (rounded(flat, tried, (-low * share / tried).round(), bits) - flat).square().sum(1, keepdim=True)
        step, best = torch.where(error < best, tried, step), torch.minimum(error, best)
    zero = (-low * (step / whole) / step).round()
    shape = (-1, *(1,) * (w.ndim - 1))
    return step.view(shape), zero.view(shape)


class Weights(nn.Module):
    """Rounds a weight; its steps are those of the weight that it is put on."""

    step: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.on = bits, True
        step, zero = channel_steps(weight.detach(), bits)
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)

    def forward(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.step, self.zero, self.bits) if self.on else weight


class Inputs(nn.Module):
    """Rounds what a layer is given, by a table over noise levels that is interpolated between its entries.

    Attributes:
        step, low: [L], the size of a code and the least value of each level.
    """

    low: Tensor
    high: Tensor

    def __init__(self, levels: int, bits: int) -> None:
        super().__init__()
        self.bits, self.on, self.watching = bits, True, False
        self.step = nn.Parameter(torch.ones(levels))
        self.register_buffer("low", torch.full((levels,), torch.inf))
        self.register_buffer("high", torch.full((levels,), -torch.inf), persistent=False)

    def forward(self, x: Tensor, place: float) -> Tensor:
        """``x`` at a place of the table, a whole number for an entry itself."""
        if self.watching:
            level = round(place)
            self.low[level] = torch.minimum(self.low[level], x.min().detach().float())
            self.high[level] = torch.maximum(self.high[level], x.max().detach().float())
            return x
        if not self.on:
            return x
        step, low = _between(self.step, place).clamp_min(1e-8), _between(self.low, place)
        zero = (-low / step).round().clamp(0, 2**self.bits - 1).detach()
        return rounded(x, step.to(x.dtype), zero.to(x.dtype), self.bits)

    @torch.no_grad()
    def settle(self) -> None:
        """Steps of the ranges that were watched."""
        self.low.clamp_(max=0)
        self.step.copy_(((self.high.clamp(min=0) - self.low) / (2**self.bits - 1)).clamp_min(1e-8))


class LowBits:
    """The rounding of a model's UNet, from when it is made on; all rows of a call are of one noise level.

    Args:
        model: of Stable Diffusion or SDXL, without adapters; its weights are those that are rounded.
        bits: how many. timesteps: [L] of the table, falling.

    Attributes:
        layers: the layers by their names in the UNet; inputs: what rounds what they are given. base: the model's hash.

    Raises:
        UserError: the model's denoiser is no UNet of these families.
    """

    def __init__(self, model: Any, bits: Bits, timesteps: Sequence[float]) -> None:
        if getattr(model, "family", None) not in ("sd", "sdxl"):
            raise UserError(
                f"few bits are of UNets of Stable Diffusion and SDXL, and '{model.source}' is none: leave them out, or "
                "take such a model"
            )
        self.model, self.bits, self.timesteps = model, bits, [float(t) for t in timesteps]
        self.base = model.fingerprint("denoiser")
        unet = model.denoiser
        named = ((name, m) for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        self.layers: dict[str, Any] = dict(named)
        self.inputs: dict[str, Inputs] = {}
        self._table = _log_snr(model, torch.tensor(self.timesteps))
        self._place = 0.0
        self._handles = [unet.register_forward_pre_hook(self._see, with_kwargs=True)]
        for name, layer in self.layers.items():
            ends = name in ("conv_in", "conv_out")
            if (own := bits.ends if ends else bits.weights) < 32:
                parametrize.register_parametrization(layer, "weight", Weights(layer.weight, own), unsafe=True)
            if (own := bits.ends if ends else bits.inputs) < 32:
                self.inputs[name] = Inputs(len(self.timesteps), own).to(model.device)
                self._handles.append(layer.register_forward_pre_hook(self._rounding(name)))

    def weight(self, name: str) -> nn.Parameter:
        """The weight of a layer before it is rounded: what can be trained."""
        layer = self.layers[name]
        whole = parametrize.is_parametrized(layer)
        found: nn.Parameter = layer.parametrizations.weight.original if whole else layer.weight
        return found

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """In the block one layer alone is rounded, or none."""
        self._switch(lambda own: own == name)
        try:
            yield
        finally:
            self._switch(lambda own: True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In the block nothing is rounded, and the ranges of inputs are seen, from which their steps follow."""
        with self.only(None):
            for one in self.inputs.values():
                one.watching = True
            try:
                yield
            finally:
                for one in self.inputs.values():
                    one.watching = False
        for name, one in self.inputs.items():
            if not one.low.isfinite().all():
                raise ValueError(f"layer '{name}' was not called at every one of {self.timesteps}")
            one.settle()

    def remove(self) -> None:
        """Put the UNet back, with the weights as they are before rounding."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    def save(self, path: str | Path, tuned: Sequence[str] = ()) -> Path:
        """Write a safetensors file, whole or not at all: steps, and the weights of layers that were ``tuned``."""
        tensors = {
            f"{name}.{key}": value for name, own in self.inputs.items() for key, value in own.state_dict().items()
        }
        about = {"model": self.model.source, "base": self.base, "bits": json.dumps(asdict(self.bits))}
        about |= {"timesteps": json.dumps(self.timesteps), "tuned": json.dumps([*tuned])}
        return _fitted.save(path, _MARK, tensors | {f"{name}.weight": self.weight(name) for name in tuned}, about)

    @staticmethod
    @torch.no_grad()
    def load(model: Any, path: str | Path) -> LowBits:
        """Have a model's UNet computed as :meth:`save` wrote it.

        Raises:
            UserError: there is no such file, it is of another base, or it is damaged.
        """
        told = ("base", "model", "bits", "timesteps", "tuned")
        tensors, about = _fitted.load(path, _MARK, "model of few bits", _MAKER, None, told)
        if about["base"] != model.fingerprint("denoiser"):
            raise UserError(
                f"'{path}' was tuned on '{about['model'][:80]}', and '{model.source}' is another: name that"
            )
        bits, timesteps, tuned = (outside.parse_json(about[key], f"'{key}' of '{path}'") for key in told[2:])
        last = model.schedule.num_train_timesteps
        placed = isinstance(timesteps, list) and all(type(t) in (int, float) and 0 <= t <= last for t in timesteps)
        if not placed or not timesteps or not isinstance(tuned, list) or not all(type(n) is str for n in tuned):
            raise _fitted.damaged(path, "no timesteps of its schedule, or no names")
        found = LowBits(model, from_mapping(Bits, bits, f"'{path}'"), timesteps)
        targets: dict[str, Tensor] = {
            f"{n}.{key}": v for n, own in found.inputs.items() for key, v in own.state_dict().items()
        }
        targets |= {f"{name}.weight": found.weight(name) for name in tuned if name in found.layers}
        fits = targets.keys() == tensors.keys() and all(
            tensors[name].shape == one.shape for name, one in targets.items()
        )
        if not fits or not all(one.isfinite().all() for one in tensors.values()):
            found.remove()
            raise _fitted.damaged(path, "other tensors than its layers have")
        for name, one in targets.items():
            one.copy_(tensors[name])
        return found

    def _switch(self, chosen: Any) -> None:
        for name, layer in self.layers.items():
            if parametrize.is_parametrized(layer):
                layer.parametrizations.weight[0].on = chosen(name)
            if name in self.inputs:
                self.inputs[name].on = chosen(name)

    def _see(self, unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find the place of a call's noise in the table."""
        t = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[:1].cpu().float()
        if t.item() in self.timesteps:
            self._place = float(self.timesteps.index(t.item()))
            return
        level, last = _log_snr(self.model, t).item(), len(self._table) - 1
        above = int((self._table < level).sum())
        if above in (0, last + 1):
            self._place = float(min(above, last))
            return
        low, high = self._table[above - 1].item(), self._table[above].item()
        self._place = above - 1 + (level - low) / (high - low)

    def _rounding(self, name: str) -> Any:
        return lambda layer, args: (self.inputs[name](args[0], self._place), *args[1:])


def _between(table: Tensor, place: float) -> Tensor:
    """A table's entry, or what lies between two."""
    below = int(place)
    share = place - below
    return table[below] if not share else (1 - share) * table[below] + share * table[below + 1]


def _log_snr(model: Any, t: Tensor) -> Tensor:
    found: Tensor = model.schedule.snr(t).clamp_min(1e-12).log()
    return found
