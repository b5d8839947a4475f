"""What a run uses of the data that it was given, in lines for its reader."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from visiontune.data.base import DEFAULT_PROMPT, Config, Sample, listed
from visiontune.data.readers import left_out


def inventory(samples: Sequence[Sample], config: Config) -> list[str]:
    """Lines on the columns with their kinds of files, on where captions come from, and on what is ignored."""
    own = [sample for sample in samples if not sample.prior]
    if not own:
        return []
    kinds: dict[str, Counter[str]] = {}
    for sample in own:
        for column, source in sample.sources.items():
            kinds.setdefault(column, Counter())[source.file.suffix.lower() if source.file else "no file"] += 1
    columns = (f"{column} {count.total()} ({_counted(count)})" for column, count in kinds.items())
    lines = [f"columns: {', '.join(columns)}", f"captions: {_origins(own)}"]
    lines += _parts(own, config) if config.mix else []
    lines += _ratings(own, config)
    left = left_out(config, list(kinds))
    return [*lines, f"ignored: {listed(left)}"] if left else lines


def _parts(samples: Sequence[Sample], config: Config) -> list[str]:
    """A line on each of several sources: how many pictures, how often they come, and at what noise."""
    counts, total = Counter(sample.part for sample in samples), sum(config.weights())
    told = zip(config.parts(), config.weights(), config.ranges(), strict=True)
    return [
        f"{own.root}: {counts[i]} pictures, {weight / total:.0%} of the rows, noise {low:g} to {high:g}"
        for i, (own, weight, (low, high)) in enumerate(told)
    ]


def _ratings(samples: Sequence[Sample], config: Config) -> list[str]:
    """A line on each rating: how many pictures have it, and where they stand, since a rare best is hardly learnt."""
    lines = []
    for i, name in enumerate(config.scores):
        told = [sample.scores[i] for sample in samples if not math.isnan(sample.scores[i])]
        best, mean = sum(score == 1 for score in told) / len(told), sum(told) / len(told)
        lines.append(f"{name}: {len(told)} pictures, {best:.0%} at the best, mean {mean:.2f} of the way there")
    return lines


def unrated(samples: Sequence[Sample], config: Config) -> list[str]:
    """A line on pictures without a rating that others have, for each such rating; or nothing."""
    own, lines = [sample for sample in samples if not sample.prior], []
    for i, name in enumerate(config.scores):
        bare = [sample.id for sample in own if math.isnan(sample.scores[i])]
        lines += [f"{len(bare)} of {len(own)} pictures have no '{name}': {listed(bare)}"] if bare else []
    return lines


def uncaptioned(samples: Sequence[Sample]) -> list[str]:
    """A line on pictures that get ``data.prompt`` where others, or their table, have captions; or nothing."""
    own = [sample for sample in samples if not sample.prior]
    bare = [sample.id for sample in own if sample.caption_from.startswith(DEFAULT_PROMPT)]
    if not bare or all(sample.caption_from == DEFAULT_PROMPT for sample in own):
        return []
    return [f"{len(bare)} of {len(own)} pictures have no caption and get {DEFAULT_PROMPT}: {listed(bare)}"]


def _origins(samples: Sequence[Sample]) -> str:
    counts = Counter(sample.caption_from for sample in samples)
    return ", ".join(f"{count} from {origin}" for origin, count in counts.most_common())


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
