"""Perturbations of a network for one call: attention computed otherwise, blocks skipped, all else as it was.

A tap replaces the `forward` of the chosen modules alone, so that every other layer keeps its kernels. Attention is seen
where it calls torch's `scaled_dot_product_attention`, whatever stands around it (norms, rotations, adapters).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visiontune.errors import UserError

Forward = Callable[..., Any]
# (q, k, v, mask, **of scaled_dot_product_attention) -> what the tokens gathered, all [b, heads, n, d].
Attention = Callable[..., Tensor]
_NOTHING = object()


@contextmanager
def replaced(modules: Mapping[str, nn.Module], make: Callable[[str, Forward], Forward]) -> Iterator[None]:
    """In the block, each module's `forward` is what `make` makes of its name and the forward that it has."""
    before = {name: vars(module).get("forward", _NOTHING) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = make(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is _NOTHING:
                vars(module).pop("forward", None)
            else:
                module.forward = before[name]


@contextmanager
def attending(
    layers: Mapping[str, nn.Module], term: str, attend: Callable[[str], Attention]
) -> Iterator[Callable[[], None]]:
    """In the block, the attention of each layer is `attend(name)`; gives a check that it was so in all that ran.

    Raises:
        UserError: by the check, where a layer computed its attention in another way.
    """
    unseen: set[str] = set()

    def make(name: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            with _Attending(attend(name)) as mode:
                found = forward(*args, **kwargs)
            if not mode.seen:
                unseen.add(name)
            return found

        return tapped

    def check() -> None:
        if unseen:
            raise UserError(
                f"{term} sees attention where torch's scaled_dot_product_attention computes it, and layer "
                f"'{min(unseen)}' uses another kernel: set the attention backend to native"
            )

    with _fused(layers), replaced(layers, make):
        yield check


@contextmanager
def _fused(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """In the block, layers that compute attention as plain products do so by torch's function."""
    plain: list[Any] = [layer for layer in layers.values() if type(getattr(layer, "processor", None)) is AttnProcessor]
    before = [layer.processor for layer in plain]
    for layer in plain:
        layer.processor = AttnProcessor2_0()
    try:
        yield
    finally:
        for layer, processor in zip(plain, before, strict=True):
            layer.processor = processor


class _Attending(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` go to `attend`."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend, self.seen = attend, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen = True
        call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        q, k, v = (call.pop(name) for name in ("query", "key", "value"))
        return self.attend(q, k, v, call.pop("attn_mask", None), **call)


@contextmanager
def skipping(blocks: Mapping[str, nn.Module], returned: Callable[[str], tuple[str, ...]]) -> Iterator[None]:
    """In the block, each block gives what it was given: its arguments `returned(name)`; one alone stands bare."""

    def make(name: str, forward: Forward) -> Forward:
        signature = inspect.signature(forward)

        def skipped(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            values = tuple(given[one] for one in returned(name))
            return values if len(values) > 1 else values[0]

        return skipped

    with replaced(blocks, make):
        yield


class Inside:
    """A perturbation that can be entered again: `enter()` inside itself does nothing.

    Args:
        make: the perturbation, made anew for each time that it is entered from outside.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make, self.inside = make, False

    @contextmanager
    def enter(self) -> Iterator[Any]:
        if self.inside:
            yield None
            return
        with self.make() as value:
            self.inside = True
            try:
                yield value
            finally:
                self.inside = False

    @contextmanager
    def around(self, denoiser: nn.Module) -> Iterator[Any]:
        """`enter` for a call of the denoiser. What it checkpoints is computed again after the block, inside it too."""
        with ExitStack() as stack:
            for module in denoiser.modules() if torch.is_grad_enabled() else ():
                if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
                    stack.enter_context(self._again(module))
            yield stack.enter_context(self.enter())

    @contextmanager
    def _again(self, module: Any) -> Iterator[None]:
        before = module._gradient_checkpointing_func
        module._gradient_checkpointing_func = lambda part, *args: before(_Part(part, self), *args)
        try:
            yield
        finally:
            module._gradient_checkpointing_func = before


class _Part:
    """A part of a network, called inside a perturbation whenever that is."""

    def __init__(self, part: Callable[..., Any], inside: Inside) -> None:
        self.part, self.inside = part, inside

    def __call__(self, *args: Any) -> Any:
        with self.inside.enter():
            return self.part(*args)


def bound(forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


@contextmanager
def noted(
    denoiser: nn.Module,
    arguments: dict[str, Any],
    feed: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Iterator[None]:
    """In the block, calls of the denoiser leave what they were given in `arguments`, and are given what `feed` makes
    of it."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments.clear()
        arguments.update(bound(module.forward, args, kwargs))
        return None if feed is None else ((), dict(feed(arguments)))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
