"""Which rows each step trains on: a pure function of seed and step, for any number of processes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from visiontune.core import Batch
from visiontune.data.ahead import Ahead
from visiontune.data.buckets import Size
from visiontune.data.captions import names_side
from visiontune.data.rows import Pick, Rows

__all__ = ["BatchSampler", "Pick", "Rows"]

_ORDER, _CYCLE, _DRAWS = range(3)  # separate the random streams of one seed


class BatchSampler:
    """Deterministic batches without state: step ``k`` is the same batch whether a run gets there or starts there.

    Each bucket is an endless stream of shuffled passes over its samples. A step takes the next ``world * batch_size``
    rows of one bucket's stream, ``batch_size`` for each rank, so no sample comes twice before all others of its bucket
    have come once, and together the ranks see just what one process with the whole batch would see, random choices
    included. Buckets take turns in proportion to their sizes, evenly spread. A bucket smaller than the batch wraps
    round.

    With prior samples a batch holds ``batch_size`` instance rows and after them ``prior_rows`` prior rows, drawn in the
    same way from the prior samples and brought to the size of the instance rows.

    Args:
        rows: the samples.
        batch_size: instance rows of a batch, for each rank.
        seed: any integer.
        rank: this process, from 0.
        world: number of processes.
        prior_rows: prior rows of a batch, for each rank; as many as instance rows unless given.
        ahead: make the next batch in a thread while its caller works with one, where making one takes long.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        prior_rows: int | None = None,
        ahead: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"no batches of {batch_size} rows for rank {rank} of {world}")
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world
        self.prior_rows = batch_size if prior_rows is None else prior_rows
        self.seed = seed % 2**64
        self._sizes: list[Size] = sorted(rows.buckets)
        self._counts = tuple(len(rows.buckets[size]) for size in self._sizes)
        self._ahead = Ahead(self._collate) if ahead else None

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self._collate(step) if self._ahead is None else self._ahead.get(step)

    def close(self) -> None:
        """Wait until nothing works ahead; the next ``batch`` may begin it again."""
        if self._ahead is not None:
            self._ahead.close()

    def _collate(self, step: int) -> Batch:
        return self.rows.collate(self.plan(step))

    def plan(self, step: int) -> list[Pick]:
        """The rows of a step's batch before they are encoded."""
        bucket, turn = self._turn(step)
        size = self._sizes[bucket]
        groups = [(1 + bucket, self.rows.buckets[size], turn, self.batch_size)]
        if self.rows.prior:
            groups.append((0, self.rows.prior, step, self.prior_rows))
        rng = np.random.default_rng([self.seed, _DRAWS, step])
        config = self.rows.config
        picks = []
        for name, members, visit, own in groups:
            total = own * self.world
            group = self._stream(name, members, visit * total, total)
            chance, drop = rng.random((2, total))
            seeds = rng.integers(2**63, size=total)
            for i in range(self.rank * own, (self.rank + 1) * own):
                picks.append(
                    Pick(
                        index=group[i],
                        size=size,
                        flip=bool(config.flip and chance[i] < 0.5 and not names_side(self._caption(group[i]))),
                        drop=bool(drop[i] < config.caption_dropout),
                        # Of one draw with the caption, so that half of as many are dropped together.
                        hide=bool(0 <= drop[i] - config.caption_dropout / 2 < config.source_dropout),
                        seed=int(seeds[i]),
                    )
                )
        return picks

    def _caption(self, index: int) -> str:
        return self.rows.samples[index].caption

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many earlier steps had the same bucket."""
        cycle, position = divmod(step, sum(self._counts))
        order = _cycle(self.seed, cycle, self._counts)
        bucket = int(order[position])
        return bucket, cycle * self._counts[bucket] + int((order[:position] == bucket).sum())

    def _stream(self, name: int, members: list[int], start: int, count: int) -> list[int]:
        """Elements ``start .. start + count`` of the endless concatenation of shuffled passes over ``members``."""
        places = (divmod(p, len(members)) for p in range(start, start + count))
        return [members[_shuffled(self.seed, name, epoch, len(members))[place]] for epoch, place in places]


@lru_cache(maxsize=64)
def _shuffled(seed: int, name: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, name, epoch]).permutation(count)


@lru_cache(maxsize=4)
def _cycle(seed: int, cycle: int, counts: tuple[int, ...]) -> np.ndarray:
    """Bucket numbers of ``sum(counts)`` steps: bucket ``b`` has ``counts[b]`` of them, at even distances."""
    rng = np.random.default_rng([seed, _CYCLE, cycle])
    times = np.concatenate([(np.arange(n) + rng.random()) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[times.argsort(kind="stable")]
