"""Folders as kohya's scripts take them: pictures in subfolders ``<repeats>_<words>``, ``10_sks dog`` for instance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visiontune.data.base import DEFAULT_PROMPT, Config, Sample
from visiontune.data.folder import read_folder, refuse_left_out
from visiontune.data.metadata import TABLES

_NAME = re.compile(r"([1-9]\d{0,3})_(.*\S)")


@dataclass(frozen=True)
class Part:
    """A subfolder: how often each of its pictures comes in a pass, and the caption of those without one."""

    folder: Path
    repeats: int
    words: str


def parts(folder: Path, config: Config) -> list[Part]:
    """The subfolders of a folder that has pictures in such alone; none of any other."""
    from visiontune.data import pictures

    if pictures.in_folder(folder) or any((folder / name).is_file() for name in TABLES):
        return []
    named = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [Part(path, int(match[1]), match[2]) for path, match in named if match and pictures.in_folder(path)]
    return [part for part in found if not config.ignores(part.folder.name)]


def read_parts(
    folder: Path, found: Sequence[Part], config: Config, columns: Sequence[str], optional: Sequence[str]
) -> list[Sample]:
    """Samples of all parts, each as often as its folder says.

    Raises:
        UserError: something else lies in the folder, or a part cannot be read.
    """
    refuse_left_out(folder, [file for part in found for file in part.folder.rglob("*")], config)
    samples = []
    for part in found:
        own = read_folder(part.folder, replace(config, prompt=config.prompt or part.words), columns, optional)
        samples += [_of(part, sample, config) for sample in own] * part.repeats
    return samples


def _of(part: Part, sample: Sample, config: Config) -> Sample:
    named = config.prompt is None and sample.caption_from.startswith(DEFAULT_PROMPT)
    origin = f"the name of {part.folder.name}" if named else sample.caption_from
    return replace(sample, id=f"{part.folder.name}/{sample.id}", caption_from=origin)
