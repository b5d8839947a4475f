"""The projections of ``nn.MultiheadAttention``, whose weights torch reads without calling a layer.

An attention module keeps the weights of query, key and value in one parameter, ``in_proj_weight`` [3 d, d]. To the
methods it looks like a linear layer, :class:`InProj`, under the name ``<attention>.in_proj``, which is no submodule:
the state dict, ``named_modules`` and ``save_pretrained`` stay as they are.

While one of its projections has an adapter, the attention module's class is a subclass in which reading
``in_proj_weight``, ``in_proj_bias`` and ``out_proj`` gives the weights with the active adapters applied. Torch's own
``forward`` reads them there, and so do its fused kernels for inference. A method therefore acts through ``weight`` and
``bias``, never through its ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from visiontune.adapters import _layers
from visiontune.adapters._layers import Beneath, Entry

if TYPE_CHECKING:
    from visiontune.adapters._set import AdapterSet

IN, OUT = "in_proj", "out_proj"


class _Parameters(MutableMapping[str, Any]):
    """The attention module's ``in_proj_*`` parameters as ``weight`` and ``bias``, to read and to replace."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention

    def __getitem__(self, name: str) -> Any:
        return self.attention._parameters[f"{IN}_{name}"]

    def __setitem__(self, name: str, value: Any) -> None:
        self.attention._parameters[f"{IN}_{name}"] = value

    def __delitem__(self, name: str) -> None:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("weight", "bias"))

    def __len__(self) -> int:
        return 2


class InProj(nn.Linear):
    """The joint projection of an attention module as a linear layer; its parameters are the attention module's."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim
        self.__dict__["_parameters"] = _Parameters(attention)


class View(nn.Linear):
    """An output projection with its adapters applied, for whoever reads its weight and bias."""

    def __init__(self, layer: nn.Linear, values: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.training = layer.training
        self.__dict__.update(layer=layer, values=values)

    weight = property(lambda self: self.values()[0])
    bias = property(lambda self: self.values()[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["layer"](x)


class Adapted(nn.Module):
    """What is mixed into an attention module's class while a projection of it has adapters."""

    in_proj_weight = property(lambda self: self._values(IN)[0])
    in_proj_bias = property(lambda self: self._values(IN)[1])

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # TransformerEncoderLayer asks before it passes `forward` by, and takes a bias here for biases everywhere.
        return "read" in self.__dict__ or (self.in_proj_bias is None) == (in_proj(self).bias is None)

    @property
    def out_proj(self) -> nn.Module:
        layer: Any = self._modules[OUT]
        # The fused kernel wants both biases or none, and an adapter may have given the other projection one.
        lacking = layer.bias is None and self.in_proj_bias is not None
        return View(layer, lambda: self._values(OUT)) if lacking or _active(layer) else layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Torch reads each weight several times.
        self.__dict__["read"] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["read"]

    def _values(self, name: str) -> tuple[Tensor, Tensor | None]:
        read = self.__dict__.get("read", {})
        if name not in read:
            read[name] = self._computed(name)
        return read[name]

    def _computed(self, name: str) -> tuple[Tensor, Tensor | None]:
        layer: Any = in_proj(self) if name == IN else self._modules[name]
        beneath = Beneath(layer, _active(layer))
        try:
            weight, bias = beneath.weight(), beneath.bias()
        except AttributeError as error:
            # Left as it is, it would make `nn.Module.__getattr__` answer with the parameter without adapters.
            raise RuntimeError(f"an adapter of '{name}' failed: {error}") from error
        if bias is None and name == OUT and self.in_proj_bias is not None:
            bias = weight.new_zeros(len(weight))
        # The order in memory decides about the kernel, and so about the last bits.
        return weight.contiguous(), bias if bias is None else bias.to(weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        _layers.follow(in_proj(self))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _layers.empty, (Adapted, type(self).__mro__[2]), self.__dict__


def _active(layer: nn.Module) -> list[Entry]:
    return [entry for entry in _layers.entries_of(layer) if entry.owner.active]


def in_proj(attention: Any) -> InProj:
    """The joint projection of an attention module, the one with the adapters where there are any."""
    return attention.__dict__.get(IN) or InProj(attention)


def named_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()`` and, after each attention module, its joint projection."""
    for name, module in root.named_modules():
        yield name, module
        if isinstance(module, nn.MultiheadAttention):
            yield f"{name}.{IN}" if name else IN, in_proj(module)


def owner_of(root: nn.Module, name: str) -> nn.MultiheadAttention | None:
    """The attention module that reads the weight of the layer ``name`` of ``root``, if there is one."""
    parent, _, last = name.rpartition(".")
    module = root.get_submodule(parent)
    return module if isinstance(module, nn.MultiheadAttention) and last in (IN, OUT) else None


def adopt(layer: nn.Module, entry: Entry, attention: nn.MultiheadAttention | None) -> None:
    """Put an adapter on top of those that the layer has; ``attention`` is its owner, see :func:`owner_of`."""
    _layers.adopt(layer, entry)
    if attention is None:
        return
    layer.__dict__["attention"] = attention
    if isinstance(layer, InProj):
        attention.__dict__[IN] = layer
    if not isinstance(attention, Adapted):
        cls: Any = type(attention)
        attention.__class__ = _layers.mixed(Adapted, cls)


def release(layer: nn.Module, owner: AdapterSet) -> None:
    """Take the adapter of the set ``owner`` off; without adapters layer and owner have their own classes again."""
    _layers.release(layer, owner)
    attention = layer.__dict__.get("attention")
    if attention is None or _layers.entries_of(layer):
        return
    del layer.__dict__["attention"]
    if isinstance(layer, InProj):
        del attention.__dict__[IN]
    if not any(_layers.entries_of(part) for part in (in_proj(attention), attention._modules[OUT])):
        attention.__class__ = type(attention).__mro__[2]
