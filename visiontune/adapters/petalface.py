"""PETALface: two LoRAs in every layer, mixed for each sample by a weight that comes with it.

Narayan et al., "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition", WACV 2025,
arXiv 2412.07771.

    y = W x + (1 - mix) s B1 A1 x + mix s B2 A2 x,    s = alpha / r,    mix in [0, 1] for each sample

The paper's mixture is the quality of a picture. A denoiser has the noise level at hand, which is the default here:
mix = timestep / ``timesteps``, read from the arguments of each of its forward passes. :func:`gated` gives any other.
Without either, mix is 1/2.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visiontune.adapters import lora
from visiontune.adapters._layers import CONVOLUTIONS, pointwise, run
from visiontune.adapters.base import AdapterSet, Method
from visiontune.errors import UserError
from visiontune.schema import option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PETALface; twice as many parameters as LoRA."""

    rank: int = option(8, least=1, greatest=16384, help="r, the rank of each of the two changes of a weight")
    alpha: float | None = option(
        None, above=0, greatest=1e6, help="strength: each change is multiplied by alpha / rank; default: rank"
    )
    dropout: float = option(
        0.0, least=0, below=1, help="probability of dropping an input of the trained branch while training"
    )
    gate: Literal["timestep", "none"] = option("timestep", help="what mixes the two where no mixture is given")
    timesteps: float = option(
        1000, above=0, greatest=1e6, help="the timestep at which only the second acts; 1 where they are given as shares"
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """PETALface for the layers of one component."""
    return Petal(config, layers)


@contextmanager
def gated(adapters: AdapterSet, mix: Tensor | float) -> Iterator[None]:
    """Inside the block, ``mix`` mixes the pairs of an attached set: one number for all, or one for each sample [b].

    A batch of several times b samples takes the b numbers again and again. Merging and export are possible inside the
    block if ``mix`` is one number.
    """
    values = torch.as_tensor(mix, dtype=torch.float32).detach().reshape(-1).clamp(0, 1)
    gates = [method.gate for method in adapters.methods() if isinstance(method, Petal)]
    before = [gate.given for gate in gates]
    for gate in gates:
        gate.given = values
    try:
        yield
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.given = value


class Gate:
    """The mixture of one component: what is given, and what the forward pass at hand uses.

    A checkpointed layer is computed again in the backward pass, when other forward passes may have gone by. So every
    output of the component brings the mixture of its own pass back when its gradient arrives, which is before anything
    inside that pass is computed again.
    """

    def __init__(self, timesteps: float | None) -> None:
        self.timesteps = timesteps
        self.position: int | None = None
        self.by_timestep = False
        self.given: Tensor | None = None
        self._now: list[Tensor | None] = []
        self._replayed: Tensor | None = None

    def watch(self, root: nn.Module) -> Sequence[RemovableHandle]:
        names = list(inspect.signature(root.forward).parameters)
        self.by_timestep = self.timesteps is not None and "timestep" in names
        self.position = names.index("timestep") if self.by_timestep else None
        enter = root.register_forward_pre_hook(self.enter, with_kwargs=True)
        return enter, root.register_forward_hook(self.leave, always_call=True)

    def enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass of the component."""
        mix = self._replay()
        if mix is None:
            mix = self.given if self.given is not None else self._from_timestep(args, kwargs)
        sample = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
        if mix is not None and sample is not None:
            mix = mix.to(sample.device)
            # Guidance doubles the batch by appending it to itself.
            if 1 < len(mix) < len(sample) and len(sample) % len(mix) == 0:
                mix = mix.repeat(len(sample) // len(mix))
        self._now.append(mix)

    def leave(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it, also where it failed."""
        mix = self._now.pop()
        if mix is None or self._replay() is not None:
            return
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: setattr(self, "_replayed", mix))

    def now(self) -> Tensor | None:
        """The mixture for a layer, [b] or [1]; ``None`` is 1/2."""
        for mix in (self._replay(), *self._now[-1:], self.given):
            if mix is not None:
                return mix
        return None

    def fixed(self) -> float:
        """The mixture that one weight stands for.

        Raises:
            UserError: it differs between samples.
        """
        mix = self.now()
        if mix is not None and len(mix) == 1 and (self.given is not None or not self.by_timestep):
            return float(mix)
        if mix is not None or self.by_timestep:
            raise UserError(
                "petalface mixes its pairs for each sample, which one weight cannot hold: use it unmerged, "
                "or inside petalface.gated(adapters, 0.5)"
            )
        return 0.5

    def _from_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if self.position is None or self.timesteps is None:
            return None
        timestep = args[self.position] if self.position < len(args) else kwargs.get("timestep")
        if timestep is None:
            return None
        return (torch.as_tensor(timestep).detach().float().reshape(-1) / self.timesteps).clamp(0, 1)

    def _replay(self) -> Tensor | None:
        """What the backward pass at hand brought back; between backward passes, whatever their end was, nothing."""
        return self._replayed if torch._C._current_graph_task_id() != -1 else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


class Petal(Method):
    """The pairs of one component, and what mixes them."""

    def __init__(self, config: Config, layers: Mapping[str, nn.Module]) -> None:
        gate = Gate(config.timesteps if config.gate == "timestep" else None)
        super().__init__({name: Pairs(config, layer, gate) for name, layer in layers.items()})
        self.gate = gate

    def watch(self, root: nn.Module) -> Sequence[RemovableHandle]:
        return self.gate.watch(root)


class Pairs(lora.LoRA):
    """Both pairs of one layer as one LoRA of rank 2r: ``down`` [groups 2r, ...], ``up`` [out, 2r]."""

    def __init__(self, config: Config, layer: nn.Module, gate: Gate) -> None:
        super().__init__(lora.Config(rank=2 * config.rank, dropout=config.dropout), layer)
        self.strength = 1.0 if config.alpha is None else config.alpha / config.rank
        self.gate = gate

    def final_up(self) -> Tensor:
        """B with its columns weighted by a mixture that is the same for all samples."""
        return self.up * self._shares(self.up.new_tensor([self.gate.fixed()]))

    def _shares(self, mix: Tensor) -> Tensor:
        """1 - mix r times, then mix r times: [b, 2r] for mix [b]."""
        return torch.stack([1 - mix, mix], 1).repeat_interleave(self.rank // 2, 1)

    def _low(self, x: Tensor, layer: Any) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        mix = self.gate.now()
        shares = self._shares(x.new_tensor([0.5]) if mix is None else _rows(mix, x))
        low = run(layer, x, down, None)
        # A convolution's channels lie before as many dimensions as its kernel has.
        shares = _beside(shares.repeat(1, self.groups), low, 1 - down.dim())
        return pointwise(layer, low * shares.to(low.dtype), up)


def _rows(mix: Tensor, x: Tensor) -> Tensor:
    """One number for each row of ``x``: a sample's windows or heads follow each other."""
    if len(mix) == 1:
        return mix.to(x.device)
    if len(x) % len(mix):
        raise UserError(
            f"petalface mixes {len(mix)} samples but a layer takes {len(x)} rows: leave it out of the targets"
        )
    return mix.to(x.device).repeat_interleave(len(x) // len(mix))


def _beside(shares: Tensor, low: Tensor, channels: int) -> Tensor:
    """``shares`` [b or 1, c] in the shape of ``low`` [b, ..., c, ...], whose channels lie at ``channels``."""
    shape = [1] * low.dim()
    shape[channels] = shares.shape[1]
    if len(shares) > 1:
        shape[0] = len(shares)
    return shares.view(shape)
