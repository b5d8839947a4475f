"""The numbers that an option may have, in recipes and on the command line alike."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visiontune.errors import UserError

# Whole numbers end up in torch, which has none of more bits.
_BITS = 64


class OutOfRange(UserError):
    """A number of the right type that an option cannot have."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number; without any it must still be finite, and a whole one must fit 64 bits.

    Args:
        least, greatest: bounds that the number may equal; an infinite one says that it may be infinite.
        above, below: bounds that it may not equal.
        multiple: what a whole number must be a multiple of.
    """

    least: float | None = None
    greatest: float | None = None
    above: float | None = None
    below: float | None = None
    multiple: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether it ends at both sides."""
        return (self.least, self.above) != (None, None) and (self.greatest, self.below) != (None, None)

    def admits(self, number: float) -> bool:
        """Whether an option may have ``number``."""
        if isinstance(number, int):
            if not -(2 ** (_BITS - 1)) <= number < 2 ** (_BITS - 1):
                return False
        elif not math.isfinite(number) and number not in (self.least, self.greatest):
            return False
        return not (
            (self.least is not None and number < self.least)
            or (self.greatest is not None and number > self.greatest)
            or (self.above is not None and number <= self.above)
            or (self.below is not None and number >= self.below)
            or (self.multiple is not None and number % self.multiple)
        )

    def text(self) -> str:
        """The bounds in words that follow "a number" or "numbers", with a space before them; empty without any."""
        if self.least is not None and self.greatest is not None:
            words = [f"from {_digits(self.least)} to {_digits(self.greatest)}"]
        else:
            bounds = {"of at least": self.least, "above": self.above, "of at most": self.greatest, "below": self.below}
            words = [f"{name} {_digits(bound)}" for name, bound in bounds.items() if bound is not None]
        if self.multiple is not None:
            words.append(f"divisible by {self.multiple}")
        return f" {' and '.join(words)}" if words else ""


def _digits(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def read_number(kind: type, value: Any) -> Any:
    """The ``int`` or ``float`` that ``value`` is or spells, ``"1e-4"`` for instance, or ``None``.

    A number too large for ``float`` comes out infinite, so that a range refuses it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    number: float
    try:
        number = value if not isinstance(value, str) else int(value)
    except ValueError:
        try:
            number = float(value)
        except ValueError:
            return None
    if kind is float:
        try:
            return float(number)
        except OverflowError:
            return math.inf if number > 0 else -math.inf
    if isinstance(number, int) or not math.isfinite(number):
        return number
    return int(number) if number.is_integer() else None


def argument(kind: type, **bounds: Any) -> Callable[[str], Any]:
    """What ``argparse`` takes as the ``type`` of a number with the bounds of a :class:`Range`."""
    limits = Range(**bounds)

    def read(text: str) -> Any:
        number = read_number(kind, text)
        if number is None or not limits.admits(number):
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {word}{limits.text()}, not {text[:60]!r}")
        return number

    return read
