"""What a sampling run will take, told before its first picture."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visiontune.errors import UserError
from visiontune.sampling.cells import Cell
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.drawing import WORTH_TRYING, plain
from visiontune.sampling.manifest import Job

if TYPE_CHECKING:
    from visiontune.models.pipeline import PipelineModel

# Pictures of one folder: from the first on a run is likely to take days, from the second on it was not meant. A grid
# multiplies faster than one thinks.
_MANY, _MOST, _MOST_UNCONFIRMED = 10_000, 1_000_000, 1_000
# Bytes of a file for each byte of pixels: what busy pictures take.
_SHARE = {"png": 0.8, "webp": 0.7, "jpg": 0.3, "tar": 0.8}


def check_count(prompts: int, config: SampleConfig) -> str:
    """Refuse more pictures than a folder can hold, or than one may have meant, before they are listed.

    Returns:
        What a grid multiplies to; nothing without one.
    """
    axes = {} if config.grid is None else {axis: len(values) for axis, values in config.grid.axes().items()}
    seeds = config.seed_count
    count = prompts * seeds * math.prod(axes.values())
    grid = "".join(f"{number} of {axis} x " for axis, number in axes.items())
    words = f"{grid}{prompts} prompts and {seeds} seeds make {count} pictures"
    if count > _MOST:
        raise UserError(f"{words}, more than the {_MOST} of one folder: give fewer seeds, or parts of the prompts")
    if axes and count > _MOST_UNCONFIRMED and not config.confirm:
        raise UserError(f"{words}, which may be more than was meant: confirm=true draws them")
    if count > _MANY:
        steps = "" if config.steps is None else f" of {config.steps} steps each"
        warnings.warn(f"{words}{steps}; stopped, it goes on with what is missing", stacklevel=4)
    return f"grid: {words}" if axes else ""


def check_disk(config: SampleConfig, model: PipelineModel, out: Path, pictures: int) -> int:
    """The bytes that pictures are likely to take.

    Raises:
        UserError: the disk has not as many; ``confirm`` lets that pass.
    """
    height, width = model.size(config.height, config.width)
    lossy = config.quality is not None
    need = int(3 * height * width * (_SHARE["jpg"] if lossy else _SHARE[config.format])) * pictures
    free = shutil.disk_usage(out).free
    if need > free and not config.confirm:
        raise UserError(
            f"{pictures} pictures of {height}x{width} may take {_bytes(need)}, and {out} has room for {_bytes(free)}: "
            "free some space, choose another out, or set confirm=true"
        )
    return need


def outlook(
    cells: Sequence[Cell], batches: Sequence[Sequence[Job]], model: PipelineModel, need: int, processes: int
) -> str:
    """How long the batches of this process will take, by a trial of the first where that is worth it, and the room.

    Terms of guidance beside the scale are not tried.
    """
    room = f"about {_bytes(need)} on the disk"
    steps = [cells[batch[0].cell].config.steps or 0 for batch in batches]
    first = replace(cells[batches[0][0].cell].config, guidance=None)
    if sum(steps) < WORTH_TRYING or first.search is not None or first.cfg_scale is None:
        return room
    one, three = (_seconds(replace(first, steps=n), model, batches[0]) for n in (1, 3))
    step = max(three - one, 0) / 2
    seconds = len(batches) * max(one - step, 0) + sum(steps) * step
    where = f" on each of {processes} processes" if processes > 1 else ""
    return f"{room}, about {_duration(seconds)}{where} by a trial"


def _seconds(config: SampleConfig, model: PipelineModel, batch: Sequence[Job]) -> float:
    plain(config, model, batch)  # what is done once must not count
    start = time.perf_counter()
    plain(config, model, batch)
    return time.perf_counter() - start


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
