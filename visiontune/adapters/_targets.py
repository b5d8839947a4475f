"""Which layers an adapter set changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from visiontune import outside
from visiontune.adapters._attention import InProj, named_layers
from visiontune.adapters._layers import CONVOLUTIONS, NORMS, Adapted
from visiontune.errors import UserError
from visiontune.schema import nearest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "in_proj", "out_proj")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2", "fc1", "fc2"),
    "linear": ("Linear",),
    "conv": ("Conv2d",),
    "norm": ("LayerNorm", "GroupNorm"),
    "all": ("Linear", "Conv2d"),
}
_TYPES: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Embedding": nn.Embedding}
_TYPES |= {kind.__name__: kind for kind in (*CONVOLUTIONS, *NORMS)}
# `unet:Linear`: the layers of one component, which presets of several need.
_SCOPED = re.compile(r"([a-z_0-9]+):(.+)")
_REGEX_CHARACTERS = set("*+?[](){}^$|\\")


def match(
    roots: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    supported: tuple[type[nn.Module], ...],
    presets: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, nn.Module]]:
    """Find the layers that ``targets`` name.

    A target is a preset's name, a dotted end of a layer's name (``to_q``, ``attn2.to_k``), the name of a layer class
    (``Linear``, ``Conv2d``, ``Embedding``), or a regular expression of the whole name.

    Args:
        roots: component name -> module.
        targets: one target or several. Each must match; of a preset's own patterns one match is enough.
        supported: the layer classes that the method adapts; other modules are passed over.
        presets: further presets, which win over the built-in ones. What a pattern of theirs names after a minus is
            left out.

    Returns:
        Component -> layer name within the component -> layer, in the order of ``named_layers``.

    Raises:
        UserError: a target matches no layer, matches only modules of other classes, or matches a layer whose forward
            is never called.
    """
    known: dict[str, Sequence[str]] = {**PRESETS, **(presets or {})}
    words = [targets] if isinstance(targets, str) else list(targets)
    modules = _modules(roots)
    found: set[tuple[str, str]] = set()
    for word in words:
        hits = _hits(known.get(word, (word,)), modules)
        usable = {hit for hit in hits if _usable(modules[hit[0]][hit[1]], supported)}
        if not usable:
            raise _nothing(word, hits, modules, supported, known)
        found |= usable
    chosen = {c: {n: m for n, m in named.items() if (c, n) in found} for c, named in modules.items()}
    for component, layers in chosen.items():
        if not layers:
            raise UserError(f"targets {words} match no layer of '{component}': add a target for it or leave it out")
        for name, layer in layers.items():
            check(roots[component], name, layer)
    return chosen


def passed_over(
    roots: Mapping[str, nn.Module],
    targets: str | Sequence[str],
    supported: tuple[type[nn.Module], ...],
    presets: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """Layers with weights that ``targets`` name and the method cannot adapt, by their classes; see :func:`match`."""
    known: dict[str, Sequence[str]] = {**PRESETS, **(presets or {})}
    modules, found = _modules(roots), dict[str, list[str]]()
    for word in [targets] if isinstance(targets, str) else targets:
        for component, name in sorted(_hits(known.get(word, (word,)), modules)):
            module = modules[component][name]
            weighty = isinstance(module, tuple(_TYPES.values())) and module.weight is not None
            if weighty and not isinstance(module, supported):
                found.setdefault(_kind(module).__name__, []).append(f"{component}.{name}" if component else name)
    return {kind: list(dict.fromkeys(names)) for kind, names in found.items()}


def _modules(roots: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    return {c: {name: module for name, module in named_layers(root) if name} for c, root in roots.items()}


def _hits(patterns: Sequence[str], modules: Mapping[str, Mapping[str, nn.Module]]) -> set[tuple[str, str]]:
    """Components and names of the modules that some pattern matches, and none after a minus."""
    taken, left = ([p for p in patterns if p.startswith("-") is minus] for minus in (False, True))
    return _found(taken, modules) - _found([pattern[1:] for pattern in left], modules)


def _found(patterns: Sequence[str], modules: Mapping[str, Mapping[str, nn.Module]]) -> set[tuple[str, str]]:
    return {
        (component, name)
        for pattern in patterns
        for component, named in modules.items()
        for name, module in named.items()
        if _matches(pattern, component, name, module)
    }


def _kind(module: nn.Module) -> type:
    """The class of a layer, under its adapters."""
    return type(module).__mro__[2] if isinstance(module, Adapted) else type(module)


def check(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Refuse a layer whose ``forward`` would be passed by, since an adapter on it would do nothing.

    Raises:
        UserError: torch reads the weight without calling the layer, or the instance has a patched ``forward``.
    """
    if isinstance(layer, InProj) and layer.weight is None:
        raise UserError(
            f"layer '{name}' cannot be adapted: its attention has separate weights for keys and values of other sizes "
            "(kdim, vdim); leave it out of the targets"
        )
    if isinstance(root.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise UserError(
            f"layer '{name}' cannot be adapted: torch's TransformerEncoderLayer reads its weight without calling it; "
            "narrow the targets, for instance to the attention (in_proj, out_proj)"
        )
    if "forward" in layer.__dict__:
        raise UserError(f"layer '{name}' has a patched forward: attach adapters before offloading or other hooks")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UserError(f"layer '{name}' cannot be adapted: max_norm rewrites its weight; leave it out of the targets")


def _usable(module: nn.Module, supported: tuple[type[nn.Module], ...]) -> bool:
    """Whether a method adapts such a module, and it has a weight to adapt: many norms have none."""
    return isinstance(module, supported) and (module.weight is not None or isinstance(module, InProj))


def _matches(pattern: str, component: str, name: str, module: nn.Module) -> bool:
    if (scoped := _SCOPED.fullmatch(pattern)) is not None:
        # With one component alone nobody has named it.
        return component in ("", scoped[1]) and _matches(scoped[2], component, name, module)
    if pattern in _TYPES:
        return isinstance(module, _TYPES[pattern])
    full = f"{component}.{name}" if component else name
    if not _REGEX_CHARACTERS & set(pattern):
        return full == pattern or full.endswith(f".{pattern}")
    return outside.matches(pattern, full, "target") or outside.matches(pattern, name, "target")


def _nothing(
    word: str,
    hits: set[tuple[str, str]],
    modules: Mapping[str, Mapping[str, nn.Module]],
    supported: tuple[type[nn.Module], ...],
    presets: Mapping[str, Sequence[str]],
) -> UserError:
    able = ", ".join(kind.__name__ for kind in supported)
    if hits:
        component, name = min(hits)
        module = modules[component][name]
        return UserError(f"target '{word}' matches '{name}', a {_kind(module).__name__}; this method adapts {able}")
    ends = {
        ".".join(parts[-n:])
        for named in modules.values()
        for name, module in named.items()
        if isinstance(module, supported)
        for parts in [[part for part in name.split(".")]]
        for n in (1, 2)
        if not parts[-n:][0].isdigit()
    }
    return UserError(f"target '{word}' matches no layer{nearest(word, ends | set(presets))}")
