"""How many threads the CPU computes with.

The operations of a small model take less time than it takes to wake a second thread, and where other processes keep the
cores busy each operation waits for the thread that is not scheduled: a step may take thirty times as long with two
threads as with one. What is faster depends on the model and on who else computes, so it is tried.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from statistics import median

import torch

# Larger models have work enough for all threads, and one trial of them would take minutes.
SMALL = 30_000_000
_TRIALS, _WINDOW, _SLOWER = 3, 8, 2.0
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Threads:
    """Chooses between one thread and all that torch has, by trial, and again when the work has become slow.

    Nothing is chosen where the user has (a variable of the environment, ``torch.set_num_threads``), on another device
    than the CPU, or for a model that is not small.

    Args:
        device: where it computes.
        parameters: of the model.
        given: the number to take; 0 leaves the choice to trials.
    """

    def __init__(self, device: torch.device, parameters: int, given: int = 0) -> None:
        if given:
            torch.set_num_threads(given)
        self.most = torch.get_num_threads()
        ours = not given and not any(os.environ.get(name) for name in _VARIABLES)
        self.free = ours and device.type == "cpu" and parameters <= SMALL and self.most > 1
        self._taken_up = False
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._usual = 0.0

    def begin(self, work: Callable[[], object]) -> int:
        """:meth:`choose`, unless a checkpoint told the number: another one would round otherwise."""
        return torch.get_num_threads() if self._taken_up else self.choose(work)

    def choose(self, work: Callable[[], object]) -> int:
        """Try ``work`` with one thread and with all, and keep the faster number, which is returned."""
        if self.free:
            work()  # what is done once must not count
            times: dict[int, list[float]] = {1: [], self.most: []}
            for _ in range(_TRIALS):
                for count, seconds in times.items():
                    torch.set_num_threads(count)
                    started = time.perf_counter()
                    work()
                    seconds.append(time.perf_counter() - started)
            torch.set_num_threads(min(times, key=lambda count: median(times[count])))
        self._recent.clear()
        self._usual = 0.0
        return torch.get_num_threads()

    def slowed(self, seconds: float) -> bool:
        """Note how long a step took; whether the last ones took twice as long as those after the last choice."""
        if not self.free:
            return False
        self._recent.append(seconds)
        if len(self._recent) < _WINDOW:
            return False
        now = median(self._recent)
        self._usual = self._usual or now
        return now > _SLOWER * self._usual

    def state_dict(self) -> dict[str, int]:
        return {"count": torch.get_num_threads()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the number of the checkpoint, unless the user has chosen or there are not as many."""
        if self.free and state["count"] <= self.most:
            torch.set_num_threads(state["count"])
            self._taken_up = True
