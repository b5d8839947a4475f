"""What of a recipe can be changed so that it fits into some memory, and what each change costs: a ladder of settings.

Every rung keeps the settings of those before it, and as many rows count in an optimiser step as the recipe says.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from visiontune.config import Run
from visiontune.errors import UserError
from visiontune.estimate import Estimate, measure, size

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30, "T": 10**12, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One setting, measured.

    Attributes:
        words: what it changes of the recipe, as overrides; the first rung changes nothing.
        estimate: what a step costs; ``None`` where it cannot be done, and ``why`` says so.
    """

    words: tuple[str, ...] = ()
    estimate: Estimate | None = None
    why: str = ""

    def fits(self, most: int | None) -> bool:
        """Whether its peak is at most so many bytes; nothing fits into ``None``, which asks for every rung."""
        return most is not None and self.estimate is not None and self.estimate.memory_bytes <= most

    def text(self) -> str:
        """Memory, seconds and settings in one line."""
        setting = " ".join(self.words) or "the recipe as it is"
        if self.estimate is None:
            return f"{'-':>10}  {'-':>12}  {setting}: {self.why}"
        return f"{size(self.estimate.memory_bytes):>10}  {self.estimate.step_seconds:>7.3g} s/step  {setting}"


def parse(text: str) -> int | None:
    """Bytes of ``24GB`` (24 x 10^9) or ``24GiB`` (24 x 2^30); ``None`` for ``all``.

    Raises:
        UserError: it is neither.
    """
    if text == "all":
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise UserError(f"--fit {text!r} is no size: write 24GB (24 x 10^9 bytes) or 24GiB (24 x 2^30), or all")
    return int(float(found[1]) * _UNITS[found[2]])


def climb(read: Callable[[Sequence[str]], Run], most: int | None) -> Iterator[Rung]:
    """Measure one rung after the other up to the first that fits into ``most`` bytes, or all of them.

    Args:
        read: the recipe with further overrides.

    Raises:
        UserError: whatever would stop the recipe as it is.
    """
    run = read(())
    for words in ladder(run):
        rung = _tried(read, words)
        yield rung
        if rung.fits(most):
            return


def ladder(run: Run) -> Iterator[tuple[str, ...]]:
    """The overrides of each rung for a run, without what it has already.

    Recomputed activations, smaller batches whose gradients are added up (or an objective's micro-batches), a frozen
    base in 8 and then in 4 bits, and one whose blocks rest in the main memory.
    """
    yield ()
    words: dict[str, object] = {}
    for step in (_recomputed(run), *_smaller(run), *_coded(run), *_rested(run)):
        words |= step
        if step:
            yield tuple(f"{name}={value}" for name, value in words.items() if value is not None)


def _recomputed(run: Run) -> dict[str, object]:
    return {} if run.train.gradient_checkpointing else {"train.gradient_checkpointing": "true"}


def _smaller(run: Run) -> Iterator[dict[str, object]]:
    """Micro-batches of fewer rows, as many in all, down to one."""
    online = "micro_batch" in run.objective
    rows = run.objective.get("micro_batch") or run.train.batch_size
    while rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        rows //= factor
        if online:
            yield {"objective.micro_batch": rows}
        else:
            yield {"train.batch_size": rows, "train.accumulate": run.train.accumulate * run.train.batch_size // rows}


def _coded(run: Run) -> list[dict[str, object]]:
    if run.adapter is None or run.model.quantize:
        return []
    return [{"model.quantize": kind} for kind in ("int8", "nf4")]


def _rested(run: Run) -> list[dict[str, object]]:
    """Blocks that rest, which is slow but changes no number; then in 8 bits, which are half as long on their way."""
    if run.adapter is None or run.model.offload:
        return []
    rested: dict[str, object] = {"model.offload": "block"}
    return [rested] if run.model.quantize else [{"model.quantize": None, **rested}, {"model.quantize": "int8"}]


def _tried(read: Callable[[Sequence[str]], Run], words: tuple[str, ...]) -> Rung:
    """A rung, measured, or why it cannot be; the recipe itself has to be possible."""
    if torch.accelerator.is_available():
        # What is left of the last rung would count among what the device holds.
        gc.collect()
        torch.accelerator.empty_cache()
    try:
        return Rung(words=words, estimate=measure(read(words)))
    except torch.OutOfMemoryError:
        return Rung(words=words, why="more than this device has")
    except UserError as error:
        if not words:
            raise
        return Rung(words=words, why=str(error))
