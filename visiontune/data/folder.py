"""A folder of images: ``.txt`` captions beside them, or ``metadata.jsonl``."""

from __future__ import annotations

import json
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
        captions = _metadata(metadata, config.caption_column)
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


def _nothing_in(folder: Path) -> str:
    inner = sorted({f.parent for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES})
    hint = f"; there are images in {inner[0]}: set data.root to it" if inner else ""
    return f"no images in {folder} (looked for {', '.join(SUFFIXES)}){hint}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save the caption as UTF-8") from error


def _metadata(file: Path, column: str) -> dict[str, str | None]:
    """Captions by file name; ``None`` where the caption is null."""
    captions: dict[str, str | None] = {}
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
        name = Path(row["file_name"]).as_posix()
        if name in captions:
            raise UserError(f"{file} line {number} captions {name} a second time: keep one line for it")
        captions[name] = caption_text(row[column], f"{file} line {number}")
    return captions
