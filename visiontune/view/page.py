"""A page of runs and folders of pictures, in one file."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from visiontune import files, outside
from visiontune.errors import UserError
from visiontune.view import runs, samples

NAME = "index.html"
_MARK = '<meta name="generator" content="visiontune view">'
# Small copies of more pictures take minutes.
_MOST = 10_000


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of runs and folders of samples, and give its path.

    Args:
        out: the file; of a single folder by default `index.html` in it, of several `index.html` here.

    Raises:
        UserError: a folder holds neither, or something damaged; or the file is there and is another one.
    """
    target = out or (folders[0] / NAME if len(folders) == 1 else Path(NAME))
    if target.exists() and _MARK not in outside.read_text(target, "page"):
        raise UserError(f"{target} is there, and is no page of visiontune: name another file with --out")
    read_runs, read_samples = [], []
    for folder in folders:
        if runs.is_run(folder):
            read_runs.append(runs.read(folder))
        elif samples.is_folder_of_samples(folder):
            base = Path(os.path.relpath(folder.absolute(), target.absolute().parent)).as_posix()
            read_samples.append({**samples.read(folder), "base": base})
        elif outside.is_folder(folder):
            raise UserError(f"{folder} holds neither a training run nor pictures of visiontune sample")
        else:
            raise UserError(f"there is no folder {outside.shown(str(folder))}")
    names = ", ".join(one["name"] for one in (*read_runs, *read_samples))
    files.write_text(target, render(names, {"runs": read_runs, "samples": read_samples}))
    return target


def named(folder: Path) -> str:
    """What a command says at its end of the page of its folder, which it writes; why it does not, if it does not."""
    if samples.count(folder) > _MOST:
        return f"visiontune view {shlex.quote(str(folder))} shows them"
    try:
        return f"{write([folder])} shows it"
    except UserError as error:
        return f"no page of it: {error}"


def render(title: str, data: object) -> str:
    """The page's text."""
    parts = resources.files(__package__)
    shown = json.dumps(data, ensure_ascii=False, allow_nan=False, default=str)
    # A file's text must not end the script, nor begin a comment in it.
    safe = shown.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = parts.joinpath("page.html").read_text(encoding="utf-8")
    pieces = {
        "TITLE": html.escape(title),
        "STYLE": parts.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": parts.joinpath("page.js").read_text(encoding="utf-8"),
        "DATA": safe,
    }
    return re.sub("@(TITLE|STYLE|SCRIPT|DATA)@", lambda found: pieces[found[1]], page)
