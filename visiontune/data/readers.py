"""Read a dataset, whatever its layout, into a list of captioned samples.

Layouts: a flat folder of images with ``.txt`` captions beside them; a folder with ``metadata.jsonl`` (``file_name``,
``text``); a ``.parquet`` file, or a folder of them; a catalogue dataset; a dataset of the Hugging Face Hub. Pairs of
images have a second column, or lie in the subfolders ``chosen`` and ``rejected``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from visiontune import catalogue
from visiontune.data.base import DEFAULT_CLASS, DEFAULT_TRIGGER, Config, Sample
from visiontune.data.folder import SUFFIXES, read_folder, read_pairs
from visiontune.data.table import read_table
from visiontune.errors import UserError
from visiontune.schema import from_mapping, nearest, option


@dataclass(frozen=True, kw_only=True)
class HubSpec:
    """A ``datasets/*.yaml`` file for a dataset of the Hub."""

    source: str = option(help="id of the dataset, owner/name")
    revision: str | None = option(None, help="commit or tag")
    split: str = option("train", help="split")
    image_column: str = option("image", help="column of the images")
    caption_column: str = option("text", help="column of the captions")
    rejected_column: str = option("rejected", help="column of the worse images of pairs")
    caption: str | None = option(None, help="caption of images without one")
    class_noun: str | None = option(None, help="what [class] stands for")
    trigger: str = option(DEFAULT_TRIGGER, help="what [trigger] stands for")
    licence: str = option("", help="licence of the images")
    description: str = option("", help="one line for the catalogue's table")


def read(config: Config, pairs: bool = False) -> list[Sample]:
    """Samples of a dataset in a fixed order, with ``[trigger]`` and ``[class]`` put into their captions.

    An image without a caption gets ``config.prompt``, or the empty caption, and a caption without an image becomes a
    sample whose file does not exist: :func:`visiontune.data.preflight.preflight` refuses both with their names.

    Args:
        config: the ``data:`` section of a recipe.
        pairs: whether each sample is to have a ``rejected`` image.

    Raises:
        UserError: no such dataset, or one that cannot be read, or that has no pairs where they are wanted.
    """
    path = Path(config.root).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        return read_table(config, "parquet", pairs=pairs, data_files=str(path))
    if path.is_dir():
        flat = any(f.suffix.lower() in SUFFIXES or f.name == "metadata.jsonl" for f in path.iterdir())
        if not flat and any(path.rglob("*.parquet")):
            return read_table(config, str(path), pairs=pairs)
        return read_pairs(path, config) if pairs else read_folder(path, config)
    if path.exists():
        raise UserError(f"data.root {config.root} is neither a folder nor a .parquet file")
    known = catalogue.names("datasets")
    if config.root in known:
        return _catalogue(config, pairs)
    owner, slash, name = config.root.partition("/")
    like_ours = any(entry.startswith(f"{owner}/") for entry in known)
    if not slash or "/" in name or owner in ("", ".", "..", "~") or name.endswith(".parquet") or like_ours:
        what = "does not exist, nor is it a catalogue dataset"
        raise UserError(f"data.root {config.root} {what}{nearest(config.root, known)}")
    return read_table(config, config.root, pairs=pairs, revision=config.revision)


def resolve(config: Config) -> Config:
    """The config with a catalogue dataset's prompt, trigger and class noun where it has none; elsewhere, a noun."""
    if Path(config.root).expanduser().exists() or config.root not in catalogue.names("datasets"):
        return replace(config, class_noun=config.class_noun or DEFAULT_CLASS)
    spec = catalogue.load("datasets", config.root)
    trigger = config.trigger if config.trigger != DEFAULT_TRIGGER else spec.get("trigger", DEFAULT_TRIGGER)
    prompt, noun = config.prompt or spec.get("caption"), config.class_noun or spec.get("class_noun")
    return replace(config, trigger=str(trigger), class_noun=noun, prompt=prompt)


# ---------------------------------------------------------------------------------------------------- catalogue


def _catalogue(config: Config, pairs: bool) -> list[Sample]:
    spec = catalogue.load("datasets", config.root)
    config = resolve(config)
    if spec.get("source") == "procedural":
        from visiontune.data import procedural

        typed = from_mapping(procedural.Spec, spec, f"datasets/{config.root}.yaml")
        if pairs and typed.rejected_style is None:
            raise UserError(f"dataset {config.root} has no pairs of images: take pocket/pairs, or your own")
        return procedural.samples(
            typed, config.root, prompt=config.prompt, trigger=config.trigger, class_noun=config.class_noun
        )
    hub = from_mapping(HubSpec, spec, f"datasets/{config.root}.yaml")
    config = replace(
        config,
        split=hub.split,
        image_column=hub.image_column,
        caption_column=hub.caption_column,
        rejected_column=hub.rejected_column,
    )
    return read_table(config, hub.source, pairs=pairs, revision=config.revision or hub.revision)
