"""Files that are either whole or absent, whatever happens while they are being written, and folders with one writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from visiontune.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The temporary name keeps the suffix, so writers that choose a format by suffix work; it may be made a file or a
    folder (a folder cannot replace a folder that has content). Missing parent folders are made. After an error nothing
    is left behind and whatever stood at ``path`` before still stands. Whoever may read other new files may read it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _share(temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _share(path: Path) -> None:
    """Give files the permissions of new ones: safetensors makes its own for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def inside(folder: Path, name: str, where: str) -> Path:
    """The file that a list in ``folder`` names, which must lie in that folder; a link in it may lead elsewhere.

    Raises:
        UserError: it lies elsewhere, or no file can have its name; the message starts with ``where``.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where} names '{name}', which is outside of {folder}: put it there, and name it from there")
    try:
        os.stat(folder / path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is not there is for others to report
    except (OSError, ValueError) as error:  # too long for a name, a null byte, half of a character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} names '{ascii(name[:100])[1:-1]}', which no file can be called: {reason}") from error
    return folder / path


def public_name(source: str) -> str:
    """What a model or folder may be called in files that others get: a folder's own name, without its place."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.exists() else source


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON atomically."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Append ``obj`` as one JSON line; a killed process leaves at most one broken last line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(obj, ensure_ascii=False) + "\n")


class Lock:
    """That nobody else writes to a folder.

    It is a lock of the kernel on the file ``.lock`` in the folder, which goes with the process that held it, however
    that ended. NFS passes such locks on to its server; a file system without them gives a warning and no lock.

    Args:
        folder: made where it is missing, and removed again where nothing was written to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def hold(self) -> None:
        """Take the lock, unless this object has it.

        Raises:
            UserError: another has it; the message names the process.
        """
        if self._file is not None or fcntl is None:
            return
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = self._locked()
        # One that ends takes its file with it: what was locked must still be what others would lock.
        while file is not None and not _is_at(file, self.path):
            file.close()
            file = self._locked()
        if file is not None:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        self._file = file

    def _locked(self) -> IO[str] | None:
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            if error.errno in _NO_LOCKS:
                warnings.warn(f"{self.path.parent} cannot be locked here: start no second run in it", stacklevel=3)
                return None
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{self.path.parent} is being written to by {holder}: wait for its end, or choose another folder"
            ) from error
        return file

    def release(self) -> None:
        """Give the lock up, if this object has it."""
        if self._file is None:
            return
        self.path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        for folder in self._made:
            if not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
