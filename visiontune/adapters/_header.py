"""The header of an adapter file. Reading it needs neither torch nor the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune.errors import UserError

FORMAT = 1
_JSON = ("config", "targets", "layers", "base_sample")


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


def read_header(path: str | Path) -> dict[str, Any]:
    """What an adapter file says of itself.

    Returns:
        ``visiontune_format`` (int), ``method``, ``config`` (mapping), ``targets`` and ``layers`` (lists),
        ``base_hash``, ``base_sample``, ``base_error``, and whatever else the writer put in (``trigger``, ``prompt``,
        ...), as text.

    Raises:
        UserError: no such file, not a visiontune adapter, or one of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no adapter file '{path}'")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            # A file of another kind claims an absurd length here.
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
        except ValueError:
            header = {}
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if "visiontune_format" not in metadata:
        raise UserError(f"'{path}' is not a visiontune adapter: name the adapter.safetensors of a run")
    if int(metadata["visiontune_format"]) > FORMAT:
        raise UserError(f"'{path}' was written by a newer visiontune: upgrade visiontune to read it")
    parsed = {key: json.loads(metadata[key]) for key in _JSON}
    parsed["base_error"] = json.loads(metadata.get("base_error", "{}"))
    return {**metadata, **parsed, "visiontune_format": int(metadata["visiontune_format"])}
