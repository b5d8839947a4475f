"""Values that are made before they are asked for, in a thread, where making one takes long."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")

# In seconds. Below it a thread costs about as much as it saves.
WORTH = 0.01


class Ahead(Generic[T]):
    """``get(k)`` is ``make(k)``, and value ``k + 1`` is made while the caller works with value ``k``.

    A thread is started only after a value that took longer than ``worth``, makes one value and ends. ``make`` runs
    in one thread at a time. What it raises comes out of the ``get`` that asks for the value, and of no other.

    Args:
        make: a pure function of its number.
        worth: seconds from which a value is made ahead.
    """

    def __init__(self, make: Callable[[int], T], worth: float = WORTH) -> None:
        self._make, self._worth = make, worth
        self._worker: _Worker[T] | None = None

    def get(self, number: int) -> T:
        """Value ``number``."""
        worker = self._take()
        if worker is None or worker.number != number:
            worker = _Worker(self._make, number)
            worker.run()
        value = worker.value()
        if worker.seconds > self._worth:
            self._worker = _Worker(self._make, number + 1)
            self._worker.start()
        return value

    def close(self) -> None:
        """Wait for the thread, if one runs; what it made is there for the next ``get``."""
        if self._worker is not None:
            self._worker.join()

    def _take(self) -> _Worker[T] | None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.join()
        return worker


class _Worker(Thread, Generic[T]):
    """Makes one value, in its own thread by ``start`` or in the caller's by ``run``."""

    def __init__(self, make: Callable[[int], T], number: int) -> None:
        super().__init__(name=f"making batch {number}")
        self.number, self.seconds = number, 0.0
        self._make, self._made, self._error = make, list[T](), list[BaseException]()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            self._made.append(self._make(self.number))
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the value
            self._error.append(error)
        self.seconds = time.perf_counter() - started

    def value(self) -> T:
        if self._error:
            raise self._error[0]
        return self._made[0]
