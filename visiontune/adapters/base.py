"""The small core under every adapter method: attach, find and load sets of adapters.

A method is a module with ``Config``, ``LAYERS`` (the layer classes it adapts) and ``build(config, layers) -> Method``.
A :class:`Method` owns the parameters of one component (a UNet, a text encoder); an :class:`Adapter` is what one layer
sees of it and defines the adapted weight, ``weight(w, scale)``, beside the fast path that must equal it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from visiontune import outside, plugin
from visiontune.adapters import _attention, _bounded, _layers, _storage, _targets
from visiontune.adapters._layers import Beneath
from visiontune.adapters._method import Adapter, Method, start_follows
from visiontune.adapters._set import AdapterSet
from visiontune.adapters._start import start
from visiontune.adapters._words import Places
from visiontune.errors import UserError
from visiontune.ops.skips import kappa_of

__all__ = ["Adapter", "AdapterSet", "Beneath", "Method", "attach", "attached", "load", "start"]


def attach(
    modules: nn.Module | Mapping[str, nn.Module],
    method: str | Any,
    /,
    *,
    targets: str | Sequence[str] = "attention",
    name: str = "default",
    presets: Mapping[str, Sequence[str]] | None = None,
    words: Places | None = None,
    whole: Mapping[str, nn.Module] | None = None,
    **config: Any,
) -> AdapterSet:
    """Adapt layers of ``modules`` and freeze everything else in them.

    Args:
        modules: one module, or component name -> module; component names prefix layer and parameter names.
        method: a plug-in's name (``lora``, ``oft``, a dotted path) with its options as ``config``, or its ``Config``.
        targets: see :func:`visiontune.adapters._targets.match`.
        name: must differ from the other sets' on these layers; later sets act on top of earlier ones.
        presets: further target presets, for instance ``DiffusionModel.presets()``.
        words: words whose rows of embeddings are trained too: name of the embedding, with its component's -> the
            embedding, the rows of each word, and those that stay as they are, as
            :func:`visiontune.models.words.rows_of` finds them.
        whole: layers that are changed as a whole, by ``W + D``, whatever the method and the targets: name, with its
            component's -> the layer.

    Raises:
        UserError: unknown method or option, a target that matches nothing, a layer that the method cannot adapt.
    """
    roots = dict(modules) if isinstance(modules, Mapping) else {"": modules}
    key, module, options = _resolve(method, config)
    apart = {*(whole or {}).values()}
    # Words may be all that is trained.
    matched = _targets.match(roots, targets, module.LAYERS, presets) if roots or not words else {}
    layers = {c: {n: layer for n, layer in found.items() if layer not in apart} for c, found in matched.items()}
    listed = [targets] if isinstance(targets, str) else targets
    return assemble(roots, name, key, options, module, listed, layers, words, whole)


def assemble(
    roots: Mapping[str, nn.Module],
    name: str,
    key: str,
    config: Any,
    module: ModuleType,
    targets: Sequence[str],
    layers: Mapping[str, Mapping[str, nn.Module]],
    words: Places | None = None,
    whole: Mapping[str, nn.Module] | None = None,
) -> AdapterSet:
    """An attached set over layers that are already chosen."""
    # A method as any other, which is made of what is defined here.
    from visiontune.adapters import dense

    owners: dict[nn.Module, nn.MultiheadAttention] = {}
    for component, found in layers.items():
        for layer_name, layer in found.items():
            if owner := _attention.owner_of(roots[component], layer_name):
                owners[layer] = owner
            _targets.check(roots[component], layer_name, layer)
            for other in (entry.owner for entry in _layers.entries_of(layer)):
                if other.name == name:
                    raise UserError(f"an adapter '{name}' is already attached to '{layer_name}': pass another name=")
                if other.merged:
                    raise UserError(f"adapter '{other.name}' is merged into '{layer_name}': unmerge it first")
    for root in roots.values():
        root.requires_grad_(False)
    chosen = {component: found for component, found in layers.items() if found}
    changes = {full: (layer, dense.Change(dense.Config(), layer)) for full, layer in (whole or {}).items()}
    made = AdapterSet(name, key, config, module.build, targets, chosen, owners, words, changes)
    made.watch({component: roots[component] for component in chosen})
    made.skips = kappa_of(roots.values())
    return made


def attached(modules: nn.Module | Mapping[str, nn.Module]) -> dict[str, AdapterSet]:
    """The sets on a model by name, the lowest first; also how to reach those of a deep copy."""
    roots = list(modules.values()) if isinstance(modules, Mapping) else [modules]
    layers = (layer for root in roots for _, layer in _attention.named_layers(root))
    return {entry.owner.name: entry.owner for layer in layers for entry in _layers.entries_of(layer)}


def whole_base(config: Any) -> str | None:
    """What the method of a ``Config`` does with the base's weights outside of forward passes: its ``WHOLE_BASE``."""
    return getattr(sys.modules[type(config).__module__], "WHOLE_BASE", None)


def _resolve(method: str | Any, options: Mapping[str, Any]) -> tuple[str, ModuleType, Any]:
    if isinstance(method, str):
        return method, *plugin.configure("adapters", {**options, "name": method}, "adapter")
    if options:
        raise UserError(f"options {sorted(options)} beside a Config: set them in the Config")
    module = sys.modules[type(method).__module__]
    # A plug-in from a .py file has no importable name; its path is what `plugin.load` takes.
    from_file = module.__name__.startswith("visiontune_plugin_")
    key = str(module.__file__) if from_file else module.__name__.removeprefix(f"{__package__}.")
    return key, module, method


def load(
    modules: nn.Module | Mapping[str, nn.Module],
    path: str | Path,
    *,
    strict: bool = True,
    name: str = "default",
    allow_other_base: bool = False,
    trust: Sequence[str] = (),
) -> AdapterSet:
    """Attach the adapters of a file that :meth:`AdapterSet.save` wrote; the set comes back in evaluation mode.

    Args:
        modules: as for :func:`attach`; components without saved layers may be present.
        strict: refuse layers of the file that the modules do not have; otherwise warn and leave them out.
        allow_other_base: accept base weights that differ from those of the training. Another precision of the same
            weights is no other base.
        trust: methods from outside the package that the file may name (``mypackage.mymethod``, ``mine.py``). Without
            it a file cannot have any code run.

    Raises:
        UserError: not such a file, a method that is neither visiontune's nor trusted, another base, a key without a
            layer or the other way round.
    """
    roots = dict(modules) if isinstance(modules, Mapping) else {"": modules}
    header, tensors = _storage.read(path)
    method = plugin.permitted("adapters", header["method"], trust, str(path))
    key, module, config = _resolve(method, header["config"])
    layers, missing = _find(roots, header["layers"], module.LAYERS)
    if missing:
        message = f"{path}: no layer for '{missing[0]}' and {len(missing) - 1} more of {len(header['layers'])}"
        if strict or not any(layers.values()):
            base = f" ({outside.shown(header['base_model'])})" if "base_model" in header else ""
            raise UserError(f"{message}: load it into the model it was trained on{base}, or pass strict=False")
        warnings.warn(message, stacklevel=2)
        tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in missing}
    words, whole = _words(roots, header, path), _whole(roots, header, path)
    if not allow_other_base:
        _check_skips(header["skips"], kappa_of(roots.values()), path)
        flat = {f"{c}.{n}" if c else n: layer for c, found in layers.items() for n, layer in found.items()}
        _storage.check_base(path, header, {**flat, **{name: layer for name, (layer, *_) in words.items()}, **whole})
    adapted = [*(layer for found in layers.values() for layer in found.values()), *whole.values()]
    adapters = None
    try:
        with start_follows(), _bounded.building(path, tensors, adapted):
            adapters = assemble(roots, name, key, config, module, header["targets"], layers, words, whole)
            adapters.fill(path, tensors)
    except UserError:
        if adapters is not None:
            adapters.detach()
        raise
    return adapters.eval()


def _check_skips(trained: float, here: float, path: str | Path) -> None:
    if trained != here:
        raise UserError(
            f"{path} was trained with model.skips={trained:g}, and this model has {here:g}: open it with that, in "
            f"Python by visiontune.models.load(..., skips={trained:g})"
        )


def _words(
    roots: Mapping[str, nn.Module], header: Mapping[str, Any], path: str | Path
) -> dict[str, tuple[nn.Embedding, dict[str, list[int]], set[int]]]:
    """The embeddings of which a file has rows.

    Raises:
        UserError: there is none of that name, or it has fewer rows.
    """
    found: dict[str, tuple[nn.Embedding, dict[str, list[int]], set[int]]] = {}
    for name, words in header["words"].items():
        layers, missing = _find(roots, [name], (nn.Embedding,))
        layer = next((layer for own in layers.values() for layer in own.values()), None)
        if missing or not isinstance(layer, nn.Embedding) or max(map(max, words.values())) >= layer.num_embeddings:
            raise UserError(
                f"{path}: no embedding '{outside.shown(name)}' with as many words: load it into the model it was "
                "trained on, its text encoders among the modules"
            )
        found[name] = (layer, words, set())
    return found


def _whole(roots: Mapping[str, nn.Module], header: Mapping[str, Any], path: str | Path) -> dict[str, nn.Module]:
    """The layers that a file changes as a whole.

    Raises:
        UserError: the modules have no such layer.
    """
    found: dict[str, nn.Module] = {}
    for name in header["whole"]:
        layers, missing = _find(roots, [name], (nn.Linear,))
        if missing:
            raise UserError(
                f"{path}: the base has no layer '{outside.shown(name)}', which the adapter was trained with: have the "
                "model make room for it, by model.accept(adapters.read_header(file))"
            )
        found[name] = next(layer for own in layers.values() for layer in own.values())
    return found


def _find(
    roots: Mapping[str, nn.Module], names: Sequence[str], kinds: tuple[type[nn.Module], ...]
) -> tuple[dict[str, dict[str, nn.Module]], list[str]]:
    """Component -> layer name -> layer for saved names, and the names without a layer."""
    known = {c: {n: m for n, m in _attention.named_layers(root) if isinstance(m, kinds)} for c, root in roots.items()}
    found: dict[str, dict[str, nn.Module]] = {c: {} for c in roots}
    missing = []
    for name in names:
        component, _, rest = ("", "", name) if "" in roots else name.partition(".")
        layer = known.get(component, {}).get(rest)
        if layer is None:
            missing.append(name)
        else:
            found[component][rest] = layer
    return found, missing
