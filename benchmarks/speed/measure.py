"""Ratios of times, exact peaks of memory and counts of operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]


def ratios(steps: Mapping[str, Step], base: str, rounds: int = 9) -> dict[str, float]:
    """Median over rounds of each step's time in units of the step ``base`` of the same round.

    The steps take turns, so that a busy machine slows all of them; each runs twice before. Without an accelerator it is
    processor time, which other programs lengthen less than the clock's: a thread that waits for another of its own
    that is not running makes whatever is split among threads look slow.
    """
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    now = time.perf_counter if torch.cuda.is_available() else time.process_time
    for _ in range(rounds):
        for name, step in steps.items():
            _wait()
            start = now()
            step()
            _wait()
            times[name].append(now() - start)
    return {n: statistics.median(a / b for a, b in zip(own, times[base], strict=True)) for n, own in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(step: Step) -> int:
    """Most bytes that ``step`` holds at once beyond what was there when it began, by the allocator's own events."""
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = most = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Operations(TorchDispatchMode):
    """Counts the operations that do arithmetic or copy; views and bookkeeping launch nothing."""

    _FREE = frozenset(
        {"view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "t", "transpose", "permute", "detach", "alias"}
        | {"unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "unsafe_split", "as_strided"}
        | {"unbind", "narrow", "diagonal", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
        | {"lift_fresh"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in self._FREE
        return func(*args, **(kwargs or {}))


def operations(step: Step) -> int:
    """How many non-view operations ``step`` dispatches."""
    step()
    with Operations() as counted:
        step()
    return counted.count
