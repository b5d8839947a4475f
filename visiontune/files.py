"""Files that are either whole or absent, whatever happens while they are being written, and folders with one writer."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from visiontune.errors import UserError
from visiontune.outside import shown, target

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_PERMISSION = "change its permissions, or choose another place"
_OCCUPIED = "move away what lies there, or choose another name"
# What stands against writing somewhere, and the mend.
_MENDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "allow larger files (ulimit -f), or choose another place",
    errno.EIO: "look after the disk, or choose another place",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: _OCCUPIED,
    errno.ENOTDIR: _OCCUPIED,
    errno.EEXIST: _OCCUPIED,
    errno.ENOTEMPTY: _OCCUPIED,
    errno.ELOOP: "choose another place than a link to itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "choose another place",
    errno.EINVAL: "choose another name",
}
_PARTIAL = re.compile(r"\.(?P<stem>.+)\.\d+\.tmp(?P<suffix>\.[^.]*)?")
# How libraries in Rust report an error of the operating system.
_NUMBERED = re.compile(r"\(os error (\d+)\)")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """In the block something is written at ``path`` or in it, by whatever library.

    Raises:
        UserError: it cannot be: no space, no permission, something else in its place, a name that nothing can have.
    """
    try:
        yield
    except Exception as error:
        number, name = _disk_error(error, Path(path)), shown(str(path))
        if number is not None:
            reason = getattr(error, "strerror", None) or os.strerror(number)
            raise UserError(f"{name} cannot be written: {reason}: {_MENDS[number]}") from error
        if isinstance(error, UnicodeEncodeError):
            raise UserError(f"{name} cannot be written: a text or a name holds half of a character") from error
        if isinstance(error, ValueError) and "null byte" in str(error):
            raise UserError(f"{name} cannot be written: {error}: choose another name") from error
        raise


def _disk_error(error: Exception, path: Path) -> int | None:
    """The number of an error in writing at ``path``; None for any other."""
    found = _NUMBERED.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number not in _MENDS or isinstance(error, UserError):
        return None
    # What the block reads may be missing too.
    elsewhere = isinstance(error, FileNotFoundError) and error.filename and not _near(Path(error.filename), path)
    return None if elsewhere else number


def _near(other: Path, path: Path) -> bool:
    temporary = other.parent == path.parent and other.name.startswith(f".{path.stem}.")
    return temporary or other in (path, *path.parents)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path near ``path`` that takes its place when the block ends without an error.

    It has the name of ``path`` in a folder ``.<stem>.<process>.tmp<suffix>`` beside it, so that writers that choose a
    format by suffix work, and whatever they leave when they are killed lies there; see :func:`clear_partial`. It may be
    made a file or a folder (a folder cannot replace a folder that has content). Missing parent folders are made. After
    an error nothing is left behind and whatever stood at ``path`` before still stands. Whoever may read other new files
    may read it.

    Raises:
        UserError: see :func:`writing`.
    """
    path = Path(path)
    holder = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove(holder)  # of an earlier process of the same number
            holder.mkdir()
            yield holder / path.name
            _share(holder / path.name)
            os.replace(holder / path.name, path)
        finally:
            remove(holder)


def clear_partial(folder: Path, ours: Callable[[str], object]) -> None:
    """Remove what processes that are no more left half-written; to be called by who holds the folder's lock.

    Args:
        ours: whether a name in the folder is one that is written there; what would have become another file stays.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _PARTIAL.fullmatch(path.name)
        if found and ours(found["stem"] + (found["suffix"] or "")):
            remove(path)


def clear_abandoned(folder: Path, seconds: float = 3600) -> None:
    """Remove what has lain half-written for so long anywhere below a folder that runs share, and that no lock guards.

    Args:
        seconds: many times as long as one write takes.
    """
    for path in folder.rglob(".*.tmp*"):
        with suppress(FileNotFoundError):  # another run may clear it too
            if _PARTIAL.fullmatch(path.name) and time.time() - path.stat().st_mtime > seconds:
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder as far as that can be done, without a word where it cannot."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError, ValueError):
            path.unlink(missing_ok=True)


def _share(path: Path) -> None:
    """Give files the permissions of new ones: safetensors makes its own for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def check_target(path: Path) -> None:
    """Refuse a place where no file can be written, before anything is computed for it.

    Raises:
        UserError: a folder lies there, or its parent is none or cannot be written to.
    """
    path = target(path)
    with writing(path):
        parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # Permissions alone do not tell: the superuser has them in /proc too.
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from error


def check_new(path: Path) -> None:
    """:func:`check_target` for what must not be there yet.

    Raises:
        UserError: something lies there, or nothing can be written there.
    """
    with writing(path):
        if os.path.lexists(path):
            raise UserError(f"{path} exists: name another output, or remove it")
    check_target(path)


def refuse_folders(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which something else lies where files are to be written, before anything is computed for them.

    Raises:
        UserError: it is none, or one of the names in it is no file.
    """
    with writing(folder):
        others = {entry.name for entry in os.scandir(folder) if not entry.is_file()}
    if taken := others.intersection(names):
        raise UserError(f"{folder / min(taken)} lies where a file goes: move it away, or choose another out")


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
    with writing(path):
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
            UserError: another has it; the message names the process. Or see :func:`writing`.
        """
        if self._file is not None or fcntl is None:
            return
        folder = self.path.parent
        with writing(folder):
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
