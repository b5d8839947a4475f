"""Read a dataset, whatever its layout, into a list of captioned samples.

Layouts: a flat folder of images with ``.txt`` captions beside them; a folder with ``metadata.jsonl`` (``file_name``,
``text``); a ``.parquet`` file, or a folder of them; a catalogue dataset; a dataset of the Hugging Face Hub. Further
columns (``mask``, ``rejected``, ...) are columns of the table, or lie in subfolders of their names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from visiontune import catalogue
from visiontune.data.base import DEFAULT_CLASS, DEFAULT_TRIGGER, Config, Sample, Subject, source
from visiontune.data.folder import ignored, read_folder, refuse_left_out
from visiontune.data.metadata import TABLES, table_in
from visiontune.data.repeats import parts, read_parts
from visiontune.data.table import read_table
from visiontune.errors import UserError
from visiontune.outside import shown
from visiontune.schema import from_mapping, nearest, option


@dataclass(frozen=True, kw_only=True)
class HubSpec:
    """A ``datasets/*.yaml`` file for a dataset of the Hub."""

    RENAMED: ClassVar[dict[str, str]] = Config.RENAMED

    source: str = option(help="id of the dataset, owner/name")
    revision: str | None = option(None, help="commit or tag")
    split: str = option("train", help="split")
    columns: dict[str, str] = option({}, help="what image, rejected, mask ... are called where it is otherwise")
    caption_column: str = option("text", help="column of the captions")
    caption: str | None = option(None, help="caption of images without one")
    class_noun: str | None = option(None, help="what [class] stands for")
    trigger: str = option(DEFAULT_TRIGGER, help="what [trigger] stands for")
    licence: str = option("", help="licence of the images")
    description: str = option("", help="one line for the catalogue's table")


def read(config: Config, columns: Sequence[str] = ("image",), optional: Sequence[str] = ()) -> list[Sample]:
    """Samples of a dataset in a fixed order, with ``[trigger]`` and ``[class]`` put into their captions.

    An image without a caption gets ``config.prompt``, or the empty caption, and a caption without an image becomes a
    sample whose file does not exist: :func:`visiontune.data.preflight.preflight` refuses both with their names.

    Args:
        config: the ``data:`` section of a recipe.
        columns: the columns that every sample must have; the first is the main one, ``image`` for most.
        optional: columns that are read where the dataset has them: all samples have one, or none has.

    Raises:
        UserError: no such dataset, or one that cannot be read, that lacks a column, or that has what nothing reads.
    """
    if config.subjects:
        return [
            replace(sample, id=f"{own.trigger}/{sample.id}")
            for own in config.each()
            for sample in read(own, columns, optional)
        ]
    if config.mix:
        return [
            replace(sample, part=i, id=f"mix[{i - 1}]/{sample.id}" if i else sample.id)
            for i, own in enumerate(config.parts())
            for sample in _filled(read(own, columns, optional), own, f"data.mix[{i - 1}]" if i else "data.root")
        ]
    unclaimed = sorted(config.columns.keys() - {*columns, *optional, *(["set"] if config.set_size > 1 else [])})
    if unclaimed:
        raise UserError(
            f"data.columns.{unclaimed[0]} is of no use: the objective reads {', '.join([*columns, *optional])}; leave "
            "it out, or take an objective that needs it"
        )
    if config.frame_pairs and "source" not in {*columns, *optional}:
        raise UserError("data.frame_pairs makes a column 'source', which the objective does not read: set it to false")
    found = _sets(config, columns, optional) if config.set_size > 1 else _read(config, columns, optional)
    _check_rated(found, config)
    return [_first_and_last(sample) for sample in found] if config.frame_pairs else found


def _check_rated(samples: list[Sample], config: Config) -> None:
    """Refuse a rating that no picture has: a name that is written otherwise, or data without a table."""
    for i, name in enumerate(config.scores):
        if not any(sample.scores and not math.isnan(sample.scores[i]) for sample in samples):
            raise UserError(
                f"no picture of {config.root} has a '{name}': write it into metadata.jsonl, metadata.csv or the table, "
                f"or mend data.scores.{name}"
            )


def _sets(config: Config, columns: Sequence[str], optional: Sequence[str]) -> list[Sample]:
    """The samples of sets: of each subfolder, or of the rows of a table or a catalogue dataset that name one.

    Raises:
        UserError: no set has two pictures that could stand beside one another.
    """
    folders, own = _set_folders(config), replace(config, set_size=1)
    if folders:
        inside = [file for folder in folders for file in folder.rglob("*")]
        refuse_left_out(_place(config.root), inside, config)
        found = [
            replace(sample, id=f"{folder.name}/{sample.id}", set=folder.name)
            for folder in folders
            for sample in _read(replace(own, root=str(folder)), columns, optional)
        ]
    else:
        found = _read(config, columns, optional)
    counts = Counter(sample.set for sample in found)
    if "" in counts or max(counts.values(), default=0) < 2:
        raise UserError(
            f"data.set_size={config.set_size}: {config.root} has no sets: put the pictures of each into a subfolder of "
            "its own, or name their sets as 'set' in metadata.jsonl, or take pocket/sets"
        )
    return found


def _set_folders(config: Config) -> list[Path]:
    """The subfolders that are sets, of a root that has no pictures beside them; none elsewhere."""
    from visiontune.data import pictures

    path = _place(config.root)
    if config.set_size == 1 or not path.is_dir() or pictures.in_folder(path) or table_in(path) is not None:
        return []
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not config.ignores(folder.name)]


def _filled(samples: list[Sample], config: Config, where: str) -> list[Sample]:
    """The samples of one of several sources.

    Raises:
        UserError: it has none, so that its share of the rows, and its range of noise, would be nobody's.
    """
    if not samples:
        raise UserError(f"{where} ({config.root}) has no pictures: put some there, or leave it out")
    return samples


def _read(config: Config, columns: Sequence[str], optional: Sequence[str]) -> list[Sample]:
    path = _place(config.root)
    if path.is_file() and path.suffix == ".parquet":
        return read_table(config, "parquet", columns, optional, data_files=str(path))
    if path.is_dir():
        return _read_path(path, config, columns, optional)
    if path.exists():
        raise UserError(f"data.root {config.root} is neither a folder nor a .parquet file")
    known = catalogue.names("datasets")
    if config.root in known:
        return _catalogue(config, columns, optional)
    owner, slash, name = config.root.partition("/")
    like_ours = any(entry.startswith(f"{owner}/") for entry in known)
    if not slash or "/" in name or owner in ("", ".", "..", "~") or name.endswith(".parquet") or like_ours:
        what = "does not exist, nor is it a catalogue dataset"
        raise UserError(f"data.root {config.root} {what}{nearest(config.root, known)}")
    return read_table(config, config.root, columns, optional, revision=config.revision)


def _first_and_last(sample: Sample) -> Sample:
    """The last frame of a sample's picture, made of the first.

    Raises:
        UserError: its picture is no file, or one of one frame.
    """
    from visiontune.data import pictures

    file = sample.sources["image"].file
    if file is None or (file.is_file() and pictures.count(file) < 2):
        raise UserError(f"{sample.id} has no two frames, of which data.frame_pairs would make a pair: set it to false")
    pair = {name: source(name, partial(pictures.frame, file, i)) for name, i in (("image", -1), ("source", 0))}
    return replace(sample, sources={**sample.sources, **pair}) if file.is_file() else sample


def _place(root: str) -> Path:
    """The path that ``root`` is, where it is one. Raises UserError where no path can be called so."""
    try:
        path = Path(root).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links, a null byte, `~nobody`
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.root '{shown(root)}' cannot be a dataset: {reason}") from error
    return path


def _read_path(path: Path, config: Config, columns: Sequence[str], optional: Sequence[str]) -> list[Sample]:
    if found := parts(path, config):
        return read_parts(path, found, config, columns, optional)
    tables = _tables(path)
    if not tables:
        return read_folder(path, config, columns, optional)
    refuse_left_out(path, tables, config)
    return read_table(config, str(path), columns, optional)


def _tables(folder: Path) -> list[Path]:
    """The parquet files that a folder without pictures of its own holds."""
    from visiontune.data import pictures

    if pictures.in_folder(folder) or any((folder / name).is_file() for name in TABLES):
        return []
    return [file for file in folder.rglob("*.parquet") if not file.name.startswith(".")]


def left_out(config: Config, columns: Sequence[str]) -> list[str]:
    """What lies in the folder ``config.root`` and is not read because of ``config.ignore``; nothing of other roots."""
    if config.subjects:
        return [f"{own.trigger}: {name}" for own in config.each() for name in left_out(own, columns)]
    if config.mix:
        return [f"{own.root}: {name}" for own in config.parts() for name in left_out(own, columns)]
    if folders := _set_folders(config):
        each = [(folder, replace(config, root=str(folder), set_size=1)) for folder in folders]
        return [f"{folder.name}/{name}" for folder, own in each for name in left_out(own, columns)]
    path = _place(config.root)
    if not path.is_dir():
        return []
    columns = ["image", "source"] if config.canvas else columns  # what canvases are made of
    found = [file for part in parts(path, config) for file in part.folder.rglob("*")]
    return ignored(path, config, columns, found or _tables(path) or None)


def resolve(config: Config) -> Config:
    """The config with a catalogue dataset's prompt, trigger and class noun where it has none; elsewhere, a noun.

    Raises:
        UserError: two subjects under one word.
    """
    if config.subjects:
        own, *others = [resolve(one) for one in config.each()]
        triggers = [one.trigger.lower() for one in (own, *others)]
        for i, one in enumerate(others):
            if triggers.count(one.trigger.lower()) > 1:
                raise UserError(
                    f"data.subjects[{i}] goes by '{one.trigger}', as another subject does: give each a word of its own "
                    f"(data.subjects[{i}].trigger)"
                )
        told = [Subject(root=o.root, trigger=o.trigger, class_noun=o.class_noun, prompt=o.prompt) for o in others]
        return replace(own, subjects=told)
    if _place(config.root).exists() or config.root not in catalogue.names("datasets"):
        return replace(config, class_noun=config.class_noun or DEFAULT_CLASS)
    spec = catalogue.load("datasets", config.root)
    trigger = config.trigger if config.trigger != DEFAULT_TRIGGER else spec.get("trigger", DEFAULT_TRIGGER)
    prompt, noun = config.prompt or spec.get("caption"), config.class_noun or spec.get("class_noun")
    return replace(config, trigger=str(trigger), class_noun=noun, prompt=prompt)


# ---------------------------------------------------------------------------------------------------- catalogue


def _catalogue(config: Config, columns: Sequence[str], optional: Sequence[str]) -> list[Sample]:
    spec = catalogue.load("datasets", config.root)
    config = resolve(config)
    if spec.get("source") == "prompts":
        raise UserError(f"data.root {config.root} is a list of prompts without pictures: take a dataset of pictures")
    if spec.get("source") == "procedural":
        if config.weight_column is not None:
            raise UserError(f"pictures of {config.root} have no weights: leave data.weight_column out")
        from visiontune.data import procedural

        typed = from_mapping(procedural.Spec, spec, f"datasets/{config.root}.yaml")
        return procedural.samples(
            typed,
            config.root,
            columns=columns,
            optional=[column for column in optional if not config.ignores(column)],
            prompt=config.prompt,
            trigger=config.trigger,
            class_noun=config.class_noun,
            ranges=config.scores,
        )
    hub = from_mapping(HubSpec, spec, f"datasets/{config.root}.yaml")
    names = {**hub.columns, **config.columns}
    config = replace(config, split=hub.split, columns=names, caption_column=hub.caption_column)
    return read_table(config, hub.source, columns, optional, revision=config.revision or hub.revision)
