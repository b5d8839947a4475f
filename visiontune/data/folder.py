"""A folder of images, or of pairs of them: ``.txt`` captions beside them, or ``metadata.jsonl``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from visiontune.data.base import Config, Sample, caption_text, captioned, listed
from visiontune.errors import UserError
from visiontune.schema import nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def read_folder(folder: Path, config: Config) -> list[Sample]:
    """Samples in the order of their file names.

    A caption without an image becomes a sample whose file does not exist, for preflight to report.

    Raises:
        UserError: no images, two kinds of captions, or captions that cannot be read.
    """
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    texts = {f.stem: f for f in files if f.suffix.lower() == ".txt"}
    metadata = folder / "metadata.jsonl"
    captions: dict[str, str | None]
    if not images and not texts and not metadata.exists():
        raise UserError(_nothing_in(folder))
    if metadata.exists():
        captions = {name: caption for name, (caption, _) in _metadata(metadata, config.caption_column).items()}
        both = sorted(f.name for f in images if f.stem in texts)
        if both:
            raise UserError(f"{folder} has metadata.jsonl and also .txt captions for {listed(both)}: keep one kind")
    else:
        captions = {f.name: _text(texts[f.stem]) for f in images if f.stem in texts}
    for file in images:
        captions.setdefault(file.name, None)
    samples = [captioned(name, folder / name, caption, config) for name, caption in sorted(captions.items())]
    if not metadata.exists():
        # No image has this stem, so the file named here does not exist.
        alone = sorted(texts.keys() - {f.stem for f in images})
        samples += [captioned(f"{stem}.txt", folder / f"{stem}.png", _text(texts[stem]), config) for stem in alone]
    return samples


def read_pairs(folder: Path, config: Config) -> list[Sample]:
    """Samples with a ``rejected`` image each, in the order of their file names.

    They are the lines of ``metadata.jsonl``, which name both files; or the files of the subfolders ``chosen``, captions
    included, and ``rejected``. An image without its partner is left for preflight to report.

    Raises:
        UserError: neither is there, or captions cannot be read.
    """
    metadata, chosen, rejected = folder / "metadata.jsonl", folder / "chosen", folder / "rejected"
    if metadata.exists():
        rows = _metadata(metadata, config.caption_column, config.rejected_column)
        return [
            replace(captioned(name, folder / name, caption, config), rejected=folder / worse)
            for name, (caption, worse) in sorted(rows.items())
        ]
    if not (chosen.is_dir() and rejected.is_dir()):
        raise UserError(
            f"{folder} has no pairs: write metadata.jsonl with '{config.rejected_column}' beside file_name, or make "
            "subfolders chosen and rejected with files of the same names"
        )
    samples = [replace(s, rejected=rejected / s.id) for s in read_folder(chosen, config)]
    names = {s.id for s in samples}
    alone = sorted(f.name for f in rejected.iterdir() if f.suffix.lower() in SUFFIXES and f.name not in names)
    return samples + [
        replace(captioned(f"rejected/{name}", chosen / name, None, config), rejected=rejected / name) for name in alone
    ]


def _nothing_in(folder: Path) -> str:
    inner = sorted({f.parent for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES})
    hint = f"; there are images in {inner[0]}: set data.root to it" if inner else ""
    return f"no images in {folder} (looked for {', '.join(SUFFIXES)}){hint}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save the caption as UTF-8") from error


def _metadata(file: Path, column: str, rejected: str | None = None) -> dict[str, tuple[str | None, str]]:
    """Captions by file name, ``None`` where the caption is null, and the file of the column ``rejected`` if given."""
    found: dict[str, tuple[str | None, str]] = {}
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{file} line {number} has no file_name: write {{'file_name': 'a.png', '{column}': '...'}}")
        if column not in row:
            raise UserError(f"{file} line {number} has no '{column}'{nearest(column, row)} (data.caption_column)")
        if rejected is not None and not isinstance(row.get(rejected), str):
            near = "" if rejected in row else nearest(rejected, row)
            raise UserError(f"{file} line {number} names no file as '{rejected}'{near} (data.rejected_column)")
        name = Path(row["file_name"]).as_posix()
        if name in found:
            raise UserError(f"{file} line {number} captions {name} a second time: keep one line for it")
        caption = caption_text(row[column], f"{file} line {number}")
        found[name] = caption, row[rejected] if rejected is not None else ""
    return found
