"""Pictures in tar files as webdataset reads them: `<key>.png` beside `<key>.json`, in shards of a number of pictures.

Pictures are drawn as files. When all of them are there they move into shards, each of which is whole or absent: until a
shard stands, its pictures lie beside it.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontune import files
from visiontune.errors import UserError

NAMED = re.compile(r"shard-(\d{6})\.tar")


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where the bytes of a picture stand in a shard."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def members(out: Path) -> dict[str, Member]:
    """The pictures in the shards of a folder by name, in their order.

    Raises:
        UserError: a shard is damaged.
    """
    return {name: member for shard in _shards(out) for name, member in _of(shard).items()}


def opened(out: Path, name: str, packed: Mapping[str, Member]) -> Path | io.BytesIO:
    """What a picture can be read from, wherever it lies."""
    return io.BytesIO(packed[name].read()) if name in packed else out / name


def check(out: Path, wanted: Sequence[str], size: int) -> None:
    """Refuse shards that hold other pictures than the first ones of those that are wanted of them.

    Raises:
        UserError: naming the first such shard.
    """
    for shard in _shards(out):
        number = int(shard.stem.partition("-")[2])
        held = list(_of(shard))
        if held != list(wanted[number * size : (number + 1) * size])[: len(held)]:
            raise UserError(
                f"{shard} holds other pictures than now belong there: in shards, prompts can be added at the end "
                "alone; choose another out"
            )


def pack(out: Path, rows: Sequence[Mapping[str, Any]], size: int) -> None:
    """Move pictures into shards of `size`, in the order of their rows of the manifest; what is packed stays as it is.

    Raises:
        UserError: as of `check`, or a shard cannot be written.
    """
    check(out, [row["file"] for row in rows], size)
    packed = members(out)
    for number, start in enumerate(range(0, len(rows), size)):
        group = rows[start : start + size]
        if any(row["file"] not in packed for row in group):
            _write(out / f"shard-{number:06d}.tar", out, group, packed)
        for row in group:
            (out / row["file"]).unlink(missing_ok=True)


def _write(shard: Path, out: Path, rows: Sequence[Mapping[str, Any]], packed: Mapping[str, Member]) -> None:
    with files.atomic_write(shard) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            name = row["file"]
            picture = packed[name].read() if name in packed else (out / name).read_bytes()
            told = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            for key, content in ((name, picture), (f"{Path(name).stem}.json", told)):
                # Nothing of when or by whom: the same pictures make the same shard.
                info = tarfile.TarInfo(key)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _shards(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if NAMED.fullmatch(path.name)) if out.is_dir() else []


def _of(shard: Path) -> dict[str, Member]:
    try:
        with tarfile.open(shard, "r:") as tar:
            return {
                info.name: Member(shard=shard, offset=info.offset_data, size=info.size)
                for info in tar
                if not info.name.endswith(".json")
            }
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{shard} is no readable shard ({error}): delete it, and its pictures are drawn again"
        ) from error
