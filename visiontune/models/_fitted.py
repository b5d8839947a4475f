"""The files of what is fitted for a model: tensors of told names, under a mark that says what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visiontune import files, outside
from visiontune.errors import UserError

_FORMAT = "1"


def save(path: str | Path, mark: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Path:
    """Write a safetensors file, whole or not at all.

    Args:
        mark: key of the header that says what it is. about: the header's further strings.
    """
    kept = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    with files.atomic_write(path) as temporary:
        save_file(kept, temporary, {**about, mark: _FORMAT})
    return Path(path)


def load(
    path: str | Path, mark: str, what: str, maker: str, names: Collection[str] | None, told: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and the header of a file that :func:`save` wrote.

    Args:
        what: the user's word for it. maker: by what one is fitted. names: of its tensors; None for any. told: keys of
            its header.

    Raises:
        UserError: there is none, it is none of these, or it is damaged.
    """
    file = outside.regular(path, what)
    try:
        with safe_open(file, framework="pt") as content:
            about, held = content.metadata() or {}, {*content.keys()}
            wanted = held if names is None else {*names}
            if about.get(mark) != _FORMAT or held != wanted or not {*told} <= {*about}:
                raise UserError(f"'{path}' is no {what}: fit one by {maker}")
            return {name: content.get_tensor(name).float() for name in wanted}, about
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: str | Path, why: str) -> UserError:
    """What cannot be read, as the user's line."""
    return UserError(f"'{path}' is damaged ({why}): copy or fit it again")
