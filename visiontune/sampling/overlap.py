"""Batches that are scored, encoded and written in threads while the next one is drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")
# Batches that wait with all their pictures in memory, the one that is being finished among them.
_AHEAD = 2


class Map(Protocol):
    """The builtin ``map``, or one that does its work in threads."""

    def __call__(self, function: Callable[[Any], R], items: Sequence[Any], /) -> Iterator[R]: ...


class Overlap:
    """Finishes batches one after the other, the pictures of each in several threads.

    What is finished does not depend on the number of threads, and batches are finished in the order in which they are
    given. An error of a batch is raised by the next call, or where the block ends.

    Args:
        finish: does what is to be done with a batch, by a ``map`` over its pictures, and says how many they were.
        workers: threads for the pictures; 0 finishes a batch before the call ends.
        finished: is told of each batch, in the thread that gives them.
    """

    def __init__(
        self, finish: Callable[[Any, Map], int], workers: int, finished: Callable[[int], object] = lambda _: None
    ) -> None:
        self._finish, self._workers, self._finished = finish, workers, finished
        self._pending: deque[Future[int]] = deque()
        self._line = ThreadPoolExecutor(1, "finish") if workers else None
        self._pool = ThreadPoolExecutor(workers, "write") if workers else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            while error is None and self._pending:
                self._take()
        finally:
            # What has begun is finished: a picture is whole or absent.
            for executor in (self._line, self._pool):
                if executor is not None:
                    executor.shutdown(cancel_futures=True)

    def give(self, batch: Any) -> None:
        """Have a batch finished; waits while others are in its way.

        Raises:
            UserError: or whatever else finishing one before has raised.
        """
        if self._line is None or self._pool is None:
            self._finished(self._finish(batch, map))
            return
        while len(self._pending) >= _AHEAD:
            self._take()
        self._pending.append(self._line.submit(self._finish, batch, self._pool.map))

    def _take(self) -> None:
        self._finished(self._pending.popleft().result())
