"""Which rows each step trains on: a pure function of seed and step, for any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from visiontune.core import Batch
from visiontune.data.ahead import Ahead
from visiontune.data.base import Config, Sample
from visiontune.data.buckets import Size
from visiontune.data.captions import names_side
from visiontune.data.picks import Pick

_ORDER, _CYCLE, _DRAWS, _PARTS, _MEMBERS = range(5)  # separate the random streams of one seed
_ABSENT = -1
_TURNS = 1000  # rows in which several sources come as often as their weights say


class Samples(Protocol):
    """What batches are made of: `rows.Rows`, or `pixel_rows.PixelRows`."""

    train_text: bool

    def __len__(self) -> int: ...
    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def config(self) -> Config: ...
    @property
    def prior(self) -> list[int]: ...
    @property
    def buckets(self) -> Mapping[Size, list[int]]: ...
    @property
    def sets(self) -> Mapping[int, list[int]]: ...
    def collate(self, picks: Sequence[Pick]) -> Batch: ...


class BatchSampler:
    """Deterministic batches without state: step ``k`` is the same batch whether a run gets there or starts there.

    Each bucket is an endless stream of shuffled passes over its samples. A step takes the next ``world * batch_size``
    rows of one bucket's stream, ``batch_size`` for each rank, so no sample comes twice before all others of its bucket
    have come once, and together the ranks see just what one process with the whole batch would see, random choices
    included. Buckets take turns in proportion to their sizes, evenly spread. A bucket smaller than the batch wraps
    round.

    Of several sources (``data.mix``) each has such passes of its own, and they take turns within a bucket as often as
    their weights say, at even distances; in a bucket of which a source has no picture the others take its turns.

    Of sets (``data.set_size``) each bucket is a stream of sets, and each brings as many of its pictures as are set
    beside one another, others and in another order at every visit, or all that it has.

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
        rows: Samples,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        *,
        prior_rows: int | None = None,
        ahead: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % rows.config.set_size or not 0 <= rank < world:
            raise ValueError(f"no batches of {batch_size} rows for rank {rank} of {world}")
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world
        self.prior_rows = batch_size if prior_rows is None else prior_rows
        self.seed = seed % 2**64
        self._sizes: list[Size] = sorted(rows.buckets)
        self._counts = tuple(len(rows.buckets[size]) for size in self._sizes)
        self._parts = [self._parted(rows.buckets[size]) for size in self._sizes]
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
        alike = self.rows.config.set_size
        firsts = self._mixed(bucket, self._span(turn, self.batch_size // alike))
        own_rows = firsts if alike == 1 else self._members(firsts, alike, step)
        groups = [(own_rows, self.batch_size)]
        if self.rows.prior:
            prior = self._stream(0, self.rows.prior, self._span(step, self.prior_rows))
            groups.append((prior, self.prior_rows))
        rng = np.random.default_rng([self.seed, _DRAWS, step])
        config = self.rows.config
        picks = []
        for group, own in groups:
            total = own * self.world
            chance, drop = rng.random((2, total))
            seeds = rng.integers(2**63, size=total)
            for i in range(self.rank * own, (self.rank + 1) * own):
                if group[i] == _ABSENT:
                    continue
                picks.append(
                    Pick(
                        index=group[i],
                        size=size,
                        flip=bool(config.flip and chance[i] < 0.5 and not names_side(self._caption(group[i]))),
                        drop=bool(drop[i] < config.caption_dropout),
                        # Of one draw with the caption, so that half of as many are dropped together.
                        hide=bool(0 <= drop[i] - config.caption_dropout / 2 < config.source_dropout),
                        seed=int(seeds[i]),
                        set=i // alike,
                    )
                )
        return picks

    def _members(self, firsts: Sequence[int], count: int, step: int) -> list[int]:
        """So many samples of each set, in an order of chance; ``_ABSENT`` in the places of those that it has not."""
        rng = np.random.default_rng([self.seed, _MEMBERS, step])
        found: list[int] = []
        for first in firsts:
            members = rng.permutation(self.rows.sets[first])[:count].tolist()
            found += [*members, *[_ABSENT] * (count - len(members))]
        return found

    def _caption(self, index: int) -> str:
        return self.rows.samples[index].caption

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many earlier steps had the same bucket."""
        return _turn_of(self.seed, _CYCLE, self._counts, step)

    def _span(self, visit: int, own: int) -> range:
        """The places in a stream of a visit's rows, ``own`` for each rank."""
        total = own * self.world
        return range(visit * total, (visit + 1) * total)

    def _stream(self, name: int, members: list[int], span: Iterable[int]) -> list[int]:
        """Elements at some places of the endless concatenation of shuffled passes over ``members``."""
        places = (divmod(p, len(members)) for p in span)
        return [members[_shuffled(self.seed, name, epoch, len(members))[place]] for epoch, place in places]

    def _parted(self, members: list[int]) -> list[tuple[int, list[int], float]]:
        """Number, members and weight of each source that has some among ``members``."""
        weights = self.rows.config.weights()
        if len(weights) == 1:
            return [(0, members, 1.0)]
        split = [[m for m in members if self.rows.samples[m].part == part] for part in range(len(weights))]
        return [(part, own, weights[part]) for part, own in enumerate(split) if own]

    def _mixed(self, bucket: int, span: range) -> list[int]:
        """Elements at some places of a bucket's stream, in which its sources take turns."""
        parts = self._parts[bucket]
        if len(parts) == 1:
            return self._stream(self._name(bucket, parts[0][0]), parts[0][1], span)
        total = sum(weight for *_, weight in parts)
        counts = tuple(max(1, round(_TURNS * weight / total)) for *_, weight in parts)
        found = []
        for place in span:
            which, turn = _turn_of(self.seed, _PARTS, counts, place)
            part, members, _ = parts[which]
            found += self._stream(self._name(bucket, part), members, [turn])
        return found

    def _name(self, bucket: int, part: int) -> int:
        """Of the stream of a source in a bucket; that of prior samples is 0."""
        return 1 + bucket + part * (1 + len(self._sizes))


@lru_cache(maxsize=64)
def _shuffled(seed: int, name: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, name, epoch]).permutation(count)


def _turn_of(seed: int, stream: int, counts: tuple[int, ...], place: int) -> tuple[int, int]:
    """Who of ``len(counts)`` has a place of an endless order, and how many earlier places it has had."""
    cycle, position = divmod(place, sum(counts))
    order = _cycle(seed, stream, cycle, counts)
    which = int(order[position])
    return which, cycle * counts[which] + int((order[:position] == which).sum())


@lru_cache(maxsize=16)
def _cycle(seed: int, stream: int, cycle: int, counts: tuple[int, ...]) -> np.ndarray:
    """Numbers of ``sum(counts)`` places: number ``b`` has ``counts[b]`` of them, at even distances."""
    rng = np.random.default_rng([seed, stream, cycle])
    times = np.concatenate([(np.arange(n) + rng.random()) / n for n in counts])
    return np.repeat(np.arange(len(counts)), counts)[times.argsort(kind="stable")]
