"""Being asked to end: Ctrl-C, and the SIGTERM that schedulers send before they take a machine back."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from visiontune.errors import UserError

_ASKING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(UserError):
    """Work that was ended by a signal, at a point from which it can go on; ``number`` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)  # by which it can be sent to another process
        self.number, self.status = number, 128 + number

    def __str__(self) -> str:
        return str(self.args[0])


class Terminated(BaseException):
    """SIGTERM where nothing waits for it, so that what is half-written is removed as after Ctrl-C."""

    status = 128 + signal.SIGTERM


class Asked:
    """In the block the first signal is noted, and the second acts as it did before the block.

    Signals reach the main thread of a process alone; elsewhere nothing is noted, and neither is a signal that the
    process was started to ignore.

    Args:
        what: what is finished first, for the line that says so.

    Attributes:
        number: of the signal that came; 0 for none.
    """

    def __init__(self, what: str) -> None:
        self.what, self.number, self._before = what, 0, dict[int, Any]()

    def __enter__(self) -> Asked:
        if threading.current_thread() is threading.main_thread():
            # What a shell has a background job ignore (Ctrl-C) is not for it.
            heard = [number for number in _ASKING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__(None, None, None)
        # Not print, which may be what was interrupted.
        words = f"\n{name(number)}: {self.what} is finished first; a second one ends at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, words.encode())


def name(number: int) -> str:
    """What a signal is called by those who send it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def terminable() -> Iterator[None]:
    """In the block SIGTERM raises :class:`Terminated`."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
