"""The header of an adapter file. Reading it needs neither torch nor the tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune import outside
from visiontune.errors import UserError

FORMAT = 1
_JSON = ("config", "targets", "layers", "words", "whole", "base_sample", "base_error", "skips", "scores")
# More than safetensors itself reads.
_LONGEST = 100_000_000
_HASH = re.compile("[0-9a-f]{64}")
_GREATEST = 3.4e38  # that float32 holds


def sort_header(path: Path) -> None:
    """Put what a safetensors file says of itself in the order of its names, in place.

    safetensors writes it in another order in every process, and equal adapters should be equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        sorted_ = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(sorted_.ljust(length))


def called(method: str, config: Any) -> str:
    """A method's name, or that of the variant that an option of its ``config`` makes of it.

    ``dora`` of ``lora``, ``coft`` of ``oft``.
    """
    for variant in ("dora", "coft"):
        if config.get(variant) if isinstance(config, Mapping) else getattr(config, variant, False):
            return variant
    return method


def is_own(path: str | Path) -> bool:
    """Whether a file says of itself that visiontune wrote it.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    return _says_so(_metadata(path))


def _says_so(metadata: Any) -> bool:
    return isinstance(metadata, dict) and "visiontune_format" in metadata


def read_header(path: str | Path) -> dict[str, Any]:
    """What an adapter file says of itself; all of it is of the types below, whoever wrote the file.

    Returns:
        ``visiontune_format`` (int), ``method``, ``config`` (mapping), ``targets`` and ``layers`` (lists of text, the
        second empty where words alone were trained), ``base_hash`` (64 hexadecimal digits), ``base_sample`` (layer ->
        numbers, for every layer), ``base_error`` (layer -> number), ``words`` (embedding -> word -> rows), ``whole``
        (layers that are changed as a whole, whatever the method), ``skips`` (see ``AdapterSet``), ``scores`` (rating ->
        its worst and its best value), ``tells_guidance`` (whether layers that are changed as a whole tell the denoiser
        its guidance, and not its ratings alone), and whatever else the writer put in (``trigger``, ``prompt``, ...), as
        text.

    Raises:
        UserError: no such file, not a visiontune adapter, one of a newer format, or one whose header is incomplete.
    """
    metadata = _metadata(path)
    if not _says_so(metadata):
        raise UserError(f"'{path}' is not a visiontune adapter: name the adapter.safetensors of a run")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _damaged(path, f"'{key}' is not text")
    version = metadata["visiontune_format"]
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise _damaged(path, "'visiontune_format' is no number")
    if int(version) > FORMAT:
        raise UserError(f"'{path}' was written by a newer visiontune: upgrade visiontune to read it")
    texts = {"base_error": "{}", "words": "{}", "whole": "[]", "skips": "1", "scores": "{}", **metadata}
    parsed = {key: outside.parse_json(texts[key], f"'{key}' of '{path}'") for key in _JSON if key in texts}
    header = {**metadata, **parsed, "visiontune_format": int(version)}
    for key, (holds, what) in _CHECKS.items():
        if key not in header:
            raise _damaged(path, f"it has no '{key}'")
        if not holds(header[key]):
            raise _damaged(path, f"'{key}' is not {what}")
    if not header["layers"] and not header["words"]:
        raise _damaged(path, "'layers' and 'words' name nothing that was trained")
    header["tells_guidance"] = any(".scores." not in name for name in header["whole"])
    named = (*header["layers"], *header["words"], *header["whole"])
    if lacking := [name for name in named if not header["base_sample"].get(name)]:
        raise _damaged(path, f"'base_sample' has nothing of the layer '{outside.shown(lacking[0])}'")
    return header


def _metadata(path: str | Path) -> Any:
    """What a safetensors file says of itself; None where it is another kind of file."""
    file = outside.regular(path, "adapter file")
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # A file of another kind claims an absurd length here.
            content = stream.read(length) if length <= min(_LONGEST, file.stat().st_size) else b""
    except OSError as error:
        raise UserError(f"adapter file '{path}' cannot be read: {error.strerror or error}") from error
    if not content.startswith(b"{"):
        return None
    header = outside.parse_json(content, f"the header of '{path}'")
    return header.get("__metadata__")


def _damaged(path: str | Path, why: str) -> UserError:
    return UserError(f"the header of '{path}' is damaged ({why}): copy or train it again")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _GREATEST


def _sample(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, list) and all(map(_number, v)) for v in value.values())


def _errors(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(error) and error >= 0 for error in value.values())


def _words(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(words, dict) and words and all(map(_rows, words.values())) for words in value.values()
    )


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _ranges(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair)) and pair[0] != pair[1]
        for pair in value.values()
    )


# What each entry must be; the rest is text.
_CHECKS: Mapping[str, tuple[Any, str]] = {
    "method": (lambda value: isinstance(value, str), "text"),
    "config": (lambda value: isinstance(value, dict), "a mapping"),
    "targets": (_texts, "a list of text"),
    "layers": (lambda value: _texts(value) and len({*value}) == len(value), "a list of layers, each once"),
    "base_hash": (_HASH.fullmatch, "a hash"),
    "base_sample": (_sample, "a mapping of lists of numbers"),
    "base_error": (_errors, "a mapping of numbers"),
    "whole": (_texts, "a list of layers"),
    "words": (_words, "a mapping of words and their rows"),
    "scores": (_ranges, "a mapping of ratings and their worst and best values"),
    "skips": (lambda value: isinstance(value, (int, float)) and 0 < value <= 1, "a number above 0, at most 1"),
}
