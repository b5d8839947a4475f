"""The set of adapters that one call attached: how much it acts, merging, saving."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from visiontune.adapters import _attention, _header, _layers, _quantised, _storage
from visiontune.adapters._evidence import Evidence, Reduce
from visiontune.adapters._layers import Beneath, Entry
from visiontune.adapters._method import Adapter, Method
from visiontune.adapters._words import Places, Words
from visiontune.errors import UserError


class AdapterSet(nn.Module):
    """All adapters that one :func:`attach` made. The base model holds none of their parameters.

    Component methods are submodules under the component's name (``model`` for a single module), so parameter names
    start with it. Parameters are float32 whatever the base's dtype. Changing them through ``.data`` needs
    :meth:`refresh`, or a switch between ``train()`` and ``eval()``, before the next forward pass.

    Args:
        name: tells the sets of one model apart.
        method: the plug-in's name; config: its ``Config``; build: its ``build``; targets: as the user named them.
        layers: component -> layer name -> layer.
        owners: layer -> the attention module that reads its weight, where there is one.
        words: the words whose rows of embeddings are trained.
        whole: name of a layer, with its component's -> the layer and what changes all of it, whatever the method.

    Attributes:
        fused: names of the layers that have such an owner.
        words: what is trained of embeddings, by components. whole: what changes layers as a whole, likewise.
        skips: kappa of the model's long skips (`visiontune.ops.skips`).

    Raises:
        UserError: the method cannot serve a layer.
    """

    def __init__(
        self,
        name: str,
        method: str,
        config: Any,
        build: Any,
        targets: Sequence[str],
        layers: Mapping[str, Mapping[str, nn.Module]],
        owners: Mapping[nn.Module, nn.MultiheadAttention],
        words: Places | None = None,
        whole: Mapping[str, tuple[nn.Module, Adapter]] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.method, self.config, self.targets = name, method, config, list(targets)
        self._scale, self._enabled, self._originals = 1.0, True, dict[str, _layers.Values]()
        self._layers: dict[str, nn.Module] = {}
        self._adapters: dict[str, Adapter] = {}
        self._methods: dict[str, Method] = {}
        for component, found in layers.items():
            built = build(config, {layer_name: _quantised.plain(layer) for layer_name, layer in found.items()})
            self._methods[component] = built
            self.add_module(component or "model", built)
            for layer_name, layer in found.items():
                full = _full(component, layer_name)
                self._layers[full], self._adapters[full] = layer, built.adapters[layer_name]
        self.words = nn.ModuleDict()
        for full, (embedding, rows, known) in (words or {}).items():
            self._layers[full], self._adapters[full] = embedding, Words(embedding, rows, known)
            self.words[full.partition(".")[0]] = Method({full: self._adapters[full]})
        self.whole = nn.ModuleDict()
        for component, pairs in _by_component(whole or {}).items():
            self._layers |= {full: layer for full, (layer, _) in pairs.items()}
            self._adapters |= {full: adapter for full, (_, adapter) in pairs.items()}
            self.whole[component] = Method({full: adapter for full, (_, adapter) in pairs.items()})
        self._handles: list[RemovableHandle] = []
        self.fused = [name for name, layer in self._layers.items() if layer in owners]
        for name in self.fused:
            if self._adapters[name].random:
                raise UserError(
                    f"'{name}' is read by its attention module, where {method} cannot draw at random as its options "
                    "ask: set its dropout to 0 (mosa: experts=1), or narrow the targets"
                )
        self.base, self.skips = _storage.fingerprint(self._layers), 1.0
        for component, found in layers.items():
            own = self._methods[component]
            for layer_name, layer in found.items():
                entry = Entry(self, own, own.adapters[layer_name])
                _attention.adopt(layer, entry, owners.get(layer))
        for beside in self._beside():
            for full, adapter in beside.adapters.items():
                _attention.adopt(self._layers[full], Entry(self, beside, adapter), None)

    def watch(self, roots: Mapping[str, nn.Module]) -> None:
        """Let the methods watch their components until the set is detached; see :meth:`Method.watch`."""
        for component, root in roots.items():
            self._handles += self._methods[component].watch(root)

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the layers that the method adapts, with the component's prefix."""
        beside = {name for method in self._beside() for name in method.adapters}
        return [name for name in self._layers if name not in beside]

    def embeddings(self) -> dict[str, Words]:
        """What is trained of embeddings, by their names with the component's prefix."""
        return {name: adapter for name, adapter in self._adapters.items() if isinstance(adapter, Words)}

    def wholes(self) -> list[str]:
        """Names of the layers that are changed as a whole, whatever the method, with the component's prefix."""
        return [name for method in self.whole.values() if isinstance(method, Method) for name in method.adapters]

    def base_layers(self) -> dict[str, nn.Module]:
        """The adapted layers themselves, by the same names."""
        return dict(self._layers)

    @property
    def parameter_count(self) -> int:
        """Number of trainable values."""
        return sum(p.numel() for p in self.parameters())

    def layer(self, name: str) -> Any:
        """The adapted layer itself; its ``weight`` and ``bias`` are the base's."""
        return self._layers[name]

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer as this set's method defines it: with the sets beneath, without those above."""
        return self._up_to_here(layer).weight()

    def bias(self, layer: str) -> Tensor | None:
        """The bias likewise; ``None`` where there is none."""
        return self._up_to_here(layer).bias()

    def change(self, layer: str) -> tuple[Tensor, Tensor | None]:
        """What this set alone adds to the base's weight and bias (``None``: nothing), in float32 or wider."""
        base = self._layers[layer]
        return _layers.change(base, [entry for entry in _layers.entries_of(base) if entry.owner is self])

    def low_rank(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """The same change of the weight as two factors, where the method has them; see :meth:`Adapter.low_rank`."""
        return self._adapters[layer].low_rank(self._scale)

    def _up_to_here(self, layer: str) -> Beneath:
        entries = _layers.entries_of(self._layers[layer])
        top = next(i for i, entry in enumerate(entries) if entry.owner is self)
        return Beneath(self._layers[layer], [e for e in entries[: top + 1] if e.owner.active])

    # -- how much it acts ---------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Strength: 1 as trained, 0 the base model."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        with self._unmerged():
            self._scale = float(value)

    @property
    def merged(self) -> bool:
        """Whether the base holds the adapted weights now."""
        return bool(self._originals)

    @property
    def enabled(self) -> bool:
        """Whether the set acts at all."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value:
            self._refuse_merged_above()
        else:
            self.unmerge()
        self._enabled = bool(value)

    @property
    def active(self) -> bool:
        """Whether layers must call the adapters: enabled and not merged."""
        return self._enabled and not self._originals

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside the block the model runs without this set."""
        before = self._enabled
        with self._unmerged():
            self._enabled = False
            try:
                yield
            finally:
                self._enabled = before

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        merged = self.merged
        self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    # -- arithmetic on the base ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapted weights into the base; the originals are kept (one copy of the adapted weights).

        Raises:
            UserError: another set beneath this one acts and is not merged, or a weight is quantised.
        """
        if not self.active:
            return
        merged = {}
        for name, layer in self._layers.items():
            below = next(e.owner for e in _layers.entries_of(layer) if e.owner is self or e.owner.active)
            if below is not self:
                raise UserError(f"adapter '{self.name}' acts on top of '{below.name}': merge '{below.name}' first")
            merged[name] = _merged(name, layer, self._adapters[name], self._scale)
        self._originals = _layers.swap(self._layers, merged)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            UserError: another set was merged on top of this one.
        """
        if not self.merged:
            return
        self._refuse_merged_above()
        originals, self._originals = self._originals, {}
        _layers.swap(self._layers, originals)

    def _refuse_merged_above(self) -> None:
        for layer in self._layers.values():
            owners = [entry.owner for entry in _layers.entries_of(layer)]
            above = [owner for owner in owners[owners.index(self) + 1 :] if owner.merged]
            if above:
                raise UserError(f"adapter '{above[-1].name}' was merged after '{self.name}': unmerge it first")

    def detach(self) -> None:
        """Take the set off: unmerged, every layer is of its own class again. Its parameters stay readable."""
        self.unmerge()
        for layer in self._layers.values():
            _attention.release(layer, self)
        self._layers = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- training and files -------------------------------------------------------------------------------------

    def methods(self) -> list[Method]:
        """The methods of the components, and what is trained beside them."""
        return [*self._methods.values(), *self._beside()]

    def _beside(self) -> list[Method]:
        """Words, and layers that are changed as a whole."""
        return [one for one in (*self.words.values(), *self.whole.values()) if isinstance(one, Method)]

    @property
    def plans(self) -> bool:
        """Whether :meth:`prepare` is to be called before training."""
        return any(method.plans for method in self.methods())

    def prepare(self, losses: Sequence[Callable[[], Tensor]], reduce: Reduce | None = None) -> None:
        """Let the method look at the task; parameters may be replaced by others of other shapes.

        Args:
            losses: ``config.batches`` of them; see :class:`Evidence`.
            reduce: sums a tensor over processes.
        """
        for component, method in self._methods.items():
            layers = {layer: self._layers[_full(component, layer)] for layer in method.adapters}
            method.prepare(Evidence(layers, losses, reduce, self.disable))
        self.refresh()

    def before_step(self, step: int = 0, loss_scale: float = 1.0) -> None:
        """To be called when the gradients of a step are complete; see :meth:`Method.before_step`."""
        for method in self.methods():
            method.before_step(step, loss_scale)

    def after_step(self, done: float = 0.0, optimizer: Optimizer | None = None) -> None:
        """To be called after each optimiser step (projections such as COFT's); see :meth:`Method.after_step`."""
        for method in self.methods():
            method.after_step(done, optimizer)
            # Optimisers that are none of torch's may leave no trace of the change.
            method.refresh()

    def refresh(self) -> None:
        """To be called after a change of parameters through ``.data``: forget what was computed from them."""
        for method in self.methods():
            method.refresh()

    def adapters(self) -> dict[str, Any]:
        """What the method does in each layer, by the layer's name."""
        return dict(self._adapters)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, ``<layer>.<name>`` -> tensor; it shares memory with the parameters unless they are packed."""
        return _flat({layer: adapter.packed() or adapter.tensors() for layer, adapter in self._adapters.items()})

    def restore(self, path: str | Path) -> None:
        """Take on what :meth:`save` wrote for a set of the same method on the same layers.

        Raises:
            UserError: the file is damaged, or does not fit.
        """
        self.fill(path, _storage.read(path)[1])

    def fill(self, path: str | Path, saved: Mapping[str, Tensor]) -> None:
        """Take on the shapes and values of saved tensors, named as in :meth:`tensors`.

        Args:
            path: where they come from, for messages.
            saved: every tensor of the set.

        Raises:
            UserError: a key on one side only, or another shape.
        """
        self._fit(saved)
        packed = {layer: adapter.packed() for layer, adapter in self._adapters.items()}
        own = {layer: packed[layer] or adapter.tensors() for layer, adapter in self._adapters.items()}
        _storage.fill(path, _flat(own), saved)
        for layer, values in packed.items():
            if values is not None:
                self._adapters[layer].unpack(values)
        self.refresh()

    def _fit(self, saved: Mapping[str, Tensor]) -> None:
        """See :meth:`Method.fit`."""
        grouped = _storage.by_layer(saved)
        for component, method in self._methods.items():
            full = {layer: _full(component, layer) for layer in method.adapters}
            method.fit({layer: grouped[name] for layer, name in full.items() if name in grouped})

    def digest(self) -> str:
        """A hash of all that decides what the set does: method, options, strength, and every tensor."""
        told = json.dumps([self.method, asdict(self.config), self.scale], sort_keys=True)
        return _storage.digest(told, self.tensors())

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
        """Write a safetensors file whose header holds method, config, targets, layers and a hash of the base.

        Args:
            path: the file; it is whole or absent.
            metadata: further header entries, for instance ``trigger``.
        """
        header = {
            "visiontune_format": str(_header.FORMAT),
            "method": self.method,
            "config": json.dumps(asdict(self.config)),
            "targets": json.dumps(self.targets),
            "layers": json.dumps(self.layers),
            "base_hash": self.base.digest,
            "base_sample": json.dumps(self.base.sample),
        }
        if words := self.embeddings():
            header["words"] = json.dumps({name: own.words for name, own in words.items()})
        if whole := self.wholes():
            header["whole"] = json.dumps(whole)
        if self.skips != 1:
            header["skips"] = str(self.skips)
        if self.base.error:
            header["base_error"] = json.dumps(self.base.error)
        return _storage.write(path, self.tensors(), header, metadata or {})


def _full(component: str, layer: str) -> str:
    return f"{component}.{layer}" if component else layer


def _by_component(whole: Mapping[str, tuple[nn.Module, Adapter]]) -> dict[str, dict[str, tuple[nn.Module, Adapter]]]:
    found: dict[str, dict[str, tuple[nn.Module, Adapter]]] = {}
    for name, pair in whole.items():
        found.setdefault(name.partition(".")[0], {})[name] = pair
    return found


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{layer}.{key}": value for layer, values in tensors.items() for key, value in values.items()}


def _merged(name: str, layer: Any, adapter: Adapter, scale: float) -> _layers.Values:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if _quantised.is_quantised(layer):
        raise UserError(f"layer '{name}' is quantised: load the base in a floating-point dtype to merge")
    high = torch.promote_types(weight.dtype, torch.float32)
    # empty_like keeps the memory format, channels_last for instance.
    merged = torch.empty_like(weight).copy_(adapter.weight(weight.to(high), scale))
    precise = None if bias is None else bias.to(high)
    other = adapter.bias(precise, scale)
    return merged, bias if other is precise or other is None else other.to(weight.dtype)
