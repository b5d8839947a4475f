"""PEFT: a bridge to any of its methods for linear layers, inside visiontune's sets.

PEFT's own layer does the work; what it takes for its base is a stand-in that answers as everything beneath this adapter
does. Its methods are affine in the input, so the adapted bias is what its layer makes of zero, and the adapted weight
what it makes of the identity beyond that. A scale other than 1 goes the straight way from the base to them.

    W' = W + scale (W_peft - W),    b' = b + scale (b_peft - b)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontune.adapters._layers import brought, compute_dtype, masters
from visiontune.adapters.base import Adapter, Beneath, Method
from visiontune.errors import UserError
from visiontune.schema import nearest, option

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear,)
_NAME = "default"
# With these PEFT imports a module, or fetches models or adapters, that an adapter file could name.
_OUTSIDE = ("megatron_config", "megatron_core", "adapters", "shadow_model")
# What PEFT chooses layers by; the bridge chooses them, and calls them otherwise. So do all that end in `_pattern`.
_CHOICE = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which of PEFT's methods, with what options; the layers are chosen by ``targets``."""

    method: str = option(help="name of PEFT's config class, with or without 'Config': LoHa, VeRA, HRA ...")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of that class, as PEFT names them"}
    )


def build(config: Config, layers: Mapping[str, nn.Module]) -> Method:
    """PEFT's method for the layers of one component.

    Raises:
        UserError: PEFT is not installed or has no such method, an option is none of its own, or it refuses the layers.
    """
    return Bridge(config, layers)


def peft_config(config: Config, targets: list[str]) -> Any:
    """The object of PEFT that ``config`` describes."""
    try:
        import peft
    except ImportError as error:
        raise UserError("PEFT is not installed: pip install peft") from error
    known = {name.removesuffix("Config").lower(): name for name in dir(peft) if name.endswith("Config")}
    word = config.method.lower().removesuffix("config")
    if word not in known:
        raise UserError(f"PEFT has no method '{config.method}'{nearest(word, known)}")
    kind = getattr(peft, known[word])
    for name in config.options:
        if name in (*_CHOICE, *_OUTSIDE) or name.endswith("_pattern") or name not in inspect.signature(kind).parameters:
            raise UserError(f"adapter.options.{name} is not an option of PEFT's {kind.__name__}")
    try:
        return kind(**{**config.options, "target_modules": targets})
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"PEFT's {kind.__name__} refuses its options: {error}") from error


class StandIn(nn.Linear):
    """What PEFT's layer takes for its base: no parameters of its own, and the answers of ``beneath``."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # PEFT makes its tensors in the dtype that it finds here.
        self.home: Any = Offered(layer)
        self._beneath: Any = self.home

    weight = property(lambda self: self._beneath.weight())
    bias = property(lambda self: self._beneath.bias())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the layer that it stands for, of which PEFT takes the device; parents do not see them."""
        return self._beneath.layer.parameters(recurse=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._beneath(x)

    def lie_on(self, beneath: Any) -> None:
        """Answer as ``beneath`` from now on."""
        self._beneath = beneath


class Precise:
    """A layer without adapters, in the dtype of trained parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.place = layer, masters(layer)

    def weight(self) -> Tensor:
        return self.layer.weight.to(**self.place)

    def bias(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.bias.to(**self.place)


class Offered(Precise):
    """The same while PEFT makes its layers, in copies, since some of its starts move what they find (PiSSA, OLoRA)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self._copies: dict[str, nn.Parameter] = {}

    def weight(self) -> Tensor:
        return self._copy("weight")

    def bias(self) -> Tensor | None:
        return None if self.layer.bias is None else self._copy("bias")

    def _copy(self, name: str) -> Tensor:
        if name not in self._copies:
            value = getattr(self.layer, name).detach().to(**self.place, copy=True)
            self._copies[name] = nn.Parameter(value, requires_grad=False)
        return self._copies[name]

    def moved(self) -> bool:
        """Whether a copy is no longer what it was made of."""
        return any(
            not torch.equal(copied, getattr(self.layer, name).to(**self.place)) for name, copied in self._copies.items()
        )


class Alone:
    """A weight and a bias in the role of a layer."""

    def __init__(self, layer: nn.Linear, w: Tensor, b: Tensor | None) -> None:
        self.layer, self._w, self._b = layer, w, b

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._w, self._b)

    def weight(self) -> Tensor:
        return self._w

    def bias(self) -> Tensor | None:
        return self._b


class Host(nn.ModuleDict):
    """The model that PEFT is given: stand-ins by name."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the layers that are stood for."""
        for layer in self.values():
            yield from layer.parameters()


class Bridge(Method):
    """PEFT's layers of one component. They are made together, since some methods share tensors among layers."""

    def __init__(self, config: Config, layers: Mapping[str, Any]) -> None:
        # PEFT finds targets by the ends of names, so each gets one that is the end of no other.
        names = {layer: f"layer{i}_" for i, layer in enumerate(layers)}
        host = Host({name: StandIn(layers[layer]) for layer, name in names.items()})
        tuner = _tuner(config, host, list(names.values()))
        for layer, name in names.items():
            _keep_base(config, layer, host[name])
        place = masters(next(iter(layers.values())))
        for tensor in (*tuner.parameters(), *tuner.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(**place)
        super().__init__({layer: Bridged(config, host[name]) for layer, name in names.items()})
        self.tuner = tuner
        _check_linear(config, next(iter(self.adapters.values())), next(iter(layers.values())))


def _tuner(config: Config, host: nn.Module, targets: list[str]) -> nn.Module:
    """PEFT's own model around ``host``, whose layers become PEFT's."""
    described = peft_config(config, targets)
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    try:
        return PEFT_TYPE_TO_TUNER_MAPPING[described.peft_type](host, described, _NAME)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"PEFT cannot put its '{config.method}' on linear layers of these sizes: {reason}") from error


def _keep_base(config: Config, name: str, layer: Any) -> None:
    """Let the layer lie on the base itself, or refuse a start that would have moved it.

    Raises:
        UserError: PEFT changed the weight that it was shown.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
    if not isinstance(base, StandIn):
        raise UserError(f"PEFT's '{config.method}' does not adapt linear layers")
    if base.home.moved():
        options = {key: value for key, value in config.options.items() if "init" in key} or "its defaults"
        raise UserError(
            f"PEFT's '{config.method}' with {options} moves the base's own weights ('{name}') when it starts, so its "
            "file would fit no base: take another start"
        )
    base.home = Precise(base.home.layer)
    base.lie_on(base.home)


@torch.no_grad()
def _check_linear(config: Config, adapter: Any, layer: Any) -> None:
    """Refuse a method that is more than another weight: it could not be merged, exported or stacked.

    A copy of one layer's adapter is moved, and what it gives for an input compared with its adapted weight.
    """
    rng, probe = torch.Generator().manual_seed(0), copy.deepcopy(adapter)
    # Only what the options ask for is let differ in training.
    probe.layer.train(not probe.random)
    for parameter in probe.layer.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(parameter))
    x, w = torch.randn(4, layer.in_features, generator=rng).to(layer.weight.device), layer.weight.float()
    b = None if layer.bias is None else layer.bias.float()
    try:
        found, expected = probe.run(x, Alone(layer, w, b)), F.linear(x, probe.weight(w, 1.0), probe.bias(b, 1.0))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"PEFT's '{config.method}' does not run on a plain linear layer: {error}") from error
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(f"PEFT's '{config.method}' is more than another weight and bias, which the bridge cannot hold")


class Bridged(Adapter):
    """One of PEFT's layers."""

    def __init__(self, config: Config, layer: Any) -> None:
        base: StandIn = layer.get_base_layer()
        self.layer, self.stand_in, self.home = layer, base, base.home
        self._random = any("dropout" in name and bool(value) for name, value in config.options.items())

    @property
    def random(self) -> bool:
        """Whether the options ask for one of PEFT's dropouts, each of which has that word in its name."""
        return self._random

    def weight(self, w: Tensor, scale: float) -> Tensor:
        """``w + scale (W_peft - w)``, the second from what the layer makes of the identity."""
        rows = self._alone(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), w, None)
        adapted = (rows - self._at_zero(w, None)).mT.to(w.dtype)
        return adapted if scale == 1 else w + scale * (adapted - w)

    def bias(self, b: Tensor | None, scale: float) -> Tensor | None:
        """``b + scale (b_peft - b)``, the second from what the layer makes of zero; ``b`` where that is the same."""
        weight = brought(self.home.layer.weight, next(self.layer.parameters()).device)
        adapted = self._at_zero(weight if b is None else weight.to(b.dtype), b)
        before = torch.zeros_like(adapted) if b is None else b
        return b if torch.equal(adapted, before) else before + scale * (adapted - before)

    def forward(self, x: Tensor, beneath: Beneath, scale: float) -> Tensor:
        """PEFT's layer on top of ``beneath``."""
        y = self.run(x, beneath)
        if scale == 1:
            return y
        below = beneath(x)
        return below + scale * (y - below)

    def _at_zero(self, w: Tensor, b: Tensor | None) -> Tensor:
        return self._alone(w.new_zeros(1, w.shape[1]), w, b)[0].to(w.dtype)

    def _alone(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """What PEFT's layer gives on that weight and bias without dropout, in training too."""
        training = self.layer.training
        self.layer.eval()
        try:
            return self.run(x, Alone(self.home.layer, w, b))
        finally:
            self.layer.train(training)

    def tensors(self) -> dict[str, Tensor]:
        own = self.layer.state_dict(keep_vars=True)
        return {key.replace(f".{_NAME}", "").replace(".", "_"): value for key, value in own.items()}

    def run(self, x: Tensor, beneath: Any) -> Tensor:
        """What PEFT's layer gives on that base."""
        self.stand_in.lie_on(beneath)
        try:
            return self.layer(x).to(compute_dtype(x))
        finally:
            self.stand_in.lie_on(self.home)
