"""Which implementation computes a denoiser's attention: probed, timed and remembered for each shape.

Every attention of the supported families ends in `scaled_dot_product_attention`, in a processor of its own or by
diffusers' dispatcher. Inside of its processors that call is answered by the dispatcher with a backend that was tried on
the same shape, type and mask before: its result and its gradients are held to those of torch's own.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visiontune.errors import UserError

Name = Literal["auto", "native", "flash", "flash3", "cudnn", "xformers", "sage", "flex"]
# What diffusers calls them.
BACKENDS = {
    "native": "native",
    "flash": "flash",
    "flash3": "_flash_3",
    "cudnn": "_native_cudnn",
    "xformers": "xformers",
    "sage": "sage",
    "flex": "flex",
}
# Relative to the norm, in units of the type's rounding: kernels that keep sums in float32 stay below one.
_ROUNDINGS = 2.0
_LEAST_TOLERANCE = 1e-5
_TIMED = 3

# (query, key, value [b, heads, n, d], mask, causal, scale, gqa) -> [b, heads, n, d]
Attend = Callable[..., Tensor]


class Refused(Exception):
    """A backend does not do what it should; the message says what."""


def _dispatched(backend: str) -> Attend:
    """A backend of diffusers' dispatcher, which has heads behind tokens, as torch's function."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        how: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": gqa}
        out = dispatch_attention_fn(q, k, v, mask, **how, backend=AttentionBackendName(backend))
        return out.transpose(1, 2)

    return attend


def native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Torch's own, to which the others are held."""
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


def backends(name: Name) -> dict[str, Attend]:
    """The backends that a word stands for, of those whose packages are there; torch's own is among those of `auto`.

    Raises:
        UserError: one that is asked for by name has no package.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    found = {}
    for word, known in BACKENDS.items():
        if name not in ("auto", word):
            continue
        try:
            _check_attention_backend_requirements(AttentionBackendName(known))
        except RuntimeError as error:
            if name != "auto":
                raise UserError(f"model.attention={word}: {str(error).splitlines()[0]}") from error
            continue
        found[word] = native if word == "native" else _dispatched(known)
    return found


class Choice:
    """What computes attention of each shape, decided when the shape is first seen.

    Args:
        candidates: by name. One alone was asked for by that name: where it fails, so does the run.

    Attributes:
        made: the name chosen for each shape, and what was said of those that were passed over.
    """

    def __init__(self, candidates: Mapping[str, Attend]) -> None:
        self.candidates = dict(candidates)
        self.made: dict[tuple[Any, ...], tuple[str, list[str]]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any) -> Tensor:
        """Attention of a call, by the backend of its shape.

        Raises:
            UserError: the backend that was asked for cannot do it, or gives other numbers.
        """
        key = (q.device.type, q.dtype, *(tuple(x.shape) for x in (q, k, v)), _kind(mask), *how)
        if key not in self.made:
            self.made[key] = _apart(lambda: self._choose(q.detach(), k.detach(), v.detach(), mask, *how))
        name, _ = self.made[key]
        return self.candidates[name](q, k, v, mask, *how)

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any) -> tuple[str, list[str]]:
        seconds, refused = dict[str, float](), list[str]()
        for name, attend in self.candidates.items():
            try:
                seconds[name] = probe(attend, q, k, v, None if mask is None else mask.detach(), *how)
            except Refused as why:
                refused.append(f"{name} {why}")
        if not seconds:
            raise UserError(f"model.attention={refused[0]}, at {_told(q, k, mask)}: take native or auto")
        return min(seconds, key=lambda name: seconds[name]), refused

    def told(self) -> list[str]:
        """A line for each backend that is used and each that was passed over, with the shapes."""
        lines: dict[str, int] = {}
        for name, refused in self.made.values():
            for line in (f"attention: {name}", *(f"attention passes over {why}" for why in refused)):
                lines[line] = lines.get(line, 0) + 1
        return [f"{line} ({count} {'shape' if count == 1 else 'shapes'})" for line, count in lines.items()]


def probe(attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any) -> float:
    """Try a backend on random values of a call's shapes, forward and backward; seconds of the fastest try.

    Raises:
        Refused: it raises, or its result or a gradient is not what torch's own gives.
    """
    made = torch.Generator().manual_seed(0)
    values = [torch.randn(x.shape, generator=made).to(x) for x in (q, k, v)]
    toward = torch.randn((*q.shape[:-1], v.shape[-1]), generator=made).to(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    exact_mask = mask.to(wide) if mask is not None and mask.is_floating_point() else mask
    exact = _forward_backward(native, [x.to(wide) for x in values], toward.to(wide), exact_mask, *how)
    fastest = float("inf")
    for _ in range(_TIMED):
        started = _now(q.device)
        try:
            found = _forward_backward(attend, values, toward, mask, *how)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refused(f"fails forward or backward ({first})") from error
        fastest = min(fastest, _now(q.device) - started)
    most = max(_LEAST_TOLERANCE, _ROUNDINGS * torch.finfo(q.dtype).eps)
    for what, a, b in zip(("result", "gradient of q", "gradient of k", "gradient of v"), found, exact, strict=True):
        # Of one key the gradients of q and k are zero, and what is left of rounding has no size of its own.
        off = float((a.to(wide) - b).norm() / torch.maximum(b.norm(), exact[0].norm()))
        if not off <= most:
            raise Refused(f"gives another {what} than torch's own, {off:.2g} of its norm away")
    return fastest


def _forward_backward(
    attend: Attend, values: list[Tensor], toward: Tensor, mask: Tensor | None, *how: Any
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in values]
    out = attend(*leaves, mask, *how)
    return [out.detach(), *torch.autograd.grad(out, leaves, toward)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _kind(mask: Tensor | None) -> Any:
    return None if mask is None else (mask.dtype, tuple(mask.shape))


def _told(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    masked = "" if mask is None else " under a mask"
    return f"{q.shape[1]} heads of {q.shape[-1]}, {q.shape[-2]} by {k.shape[-2]} tokens, {q.dtype}{masked}"


def _apart(work: Callable[[], Any]) -> Any:
    """Do something in a thread of its own, which no hook, autocast or mode of this one reaches, and wait for it.

    A probe inside of checkpointed layers would otherwise be taken for a part of what is to be computed again.
    """
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


class _Answered(TorchFunctionMode):
    """Answers attention inside the block."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self._choice = choice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, mask, dropout, causal, scale, gqa = _arguments(*args, **kwargs)
        if dropout or q.ndim != 4:
            return func(*args, **kwargs)
        return self._choice.attend(q, k, v, mask, causal, scale, gqa)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def route(network: nn.Module, choice: Choice) -> int:
    """Let a choice answer the attention of a network; how many of its modules it reaches."""
    reached = 0
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if processor is None or not callable(processor):
            continue
        if not hasattr(processor, "choice"):
            cls: Any = type(processor)
            processor.__class__ = _routed(cls)
        processor.choice = choice
        reached += 1
    return reached


@functools.cache
def _routed(cls: Any) -> Any:
    """The subclass of a processor's class whose calls a choice answers; diffusers reads the signature of the call."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Answered(self.choice):
            return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__call__": call})


def choose(networks: Mapping[str, nn.Module], name: Name, source: str) -> Choice:
    """See `visiontune.models.attention`."""
    choice = Choice(backends(name))
    for part, network in networks.items():
        if not route(network, choice):
            raise UserError(
                f"model.attention={name}: the {part} of '{source}' has no attention of diffusers: take native"
            )
    return choice
