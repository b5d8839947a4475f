"""Where weights come from, and one clear line where they do not."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models import _variants

_OPEN_CLIP_HUB = "hf-hub:"  # before a Hub id, in open_clip's names of models


@contextmanager
def weights_of(
    what: str, library: str, source: str, *, file: str = "", option: str = "model", revision: str | None = None
) -> Iterator[None]:
    """Turn a library's failure to load ``source`` into a :class:`UserError` that says what to fetch.

    ``file`` is the one file that is needed, ``option`` the option that takes the folder.
    """
    try:
        if library != "open_clip" or source.startswith(_OPEN_CLIP_HUB):
            _ask(source.removeprefix(_OPEN_CLIP_HUB), file or "config.json", revision)
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        mend = "" if Path(source).expanduser().exists() else f": {_fetch(source, file, option, revision)}"
        raise UserError(f"{what} cannot be loaded by {library} ({reason}){mend}") from error


def _ask(source: str, file: str, revision: str | None) -> None:
    """Ask the Hub once for what is not on this machine: a download would first repeat itself for half a minute.

    Raises:
        OSError: it does not answer. What it answers, the library says better.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(source).expanduser().exists():
        return
    unanswered: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__,)
    try:
        if not isinstance(try_to_load_from_cache(source, file, revision=revision), str):
            HfApi().model_info(source, revision=revision, timeout=10)
    except (HfHubHTTPError, ValueError):
        return
    except unanswered as error:
        raise OSError(str(error)) from error


def _fetch(source: str, file: str, option: str, revision: str | None) -> str:
    command = f"hf download {source.removeprefix(_OPEN_CLIP_HUB)} {file}".rstrip()
    command += f" --revision {revision}" if revision else ""
    return f"give a local folder, or fetch it with `{command} --local-dir FOLDER` and set {option}: FOLDER"


@contextmanager
def without_bars(local: bool) -> Iterator[None]:
    """No bars of components and weights where all lies on the disk; a download keeps its own."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [kind for kind in (of_diffusers, of_transformers) if local and kind.is_progress_bar_enabled()]
    for kind in shown:
        kind.disable_progress_bar()
    try:
        yield
    finally:
        for kind in shown:
            kind.enable_progress_bar()


def pretrained(
    kind: Any, place: str, *, unread: tuple[str, ...] = (), variant: str | None = None, **options: Any
) -> Any:
    """``kind.from_pretrained(place, **options)``, of which every tensor comes from the files.

    transformers and diffusers give tensors that the files lack new random values, with a warning.

    Args:
        kind: a class of models, or one of transformers' Auto classes.
        place: a folder or a Hub id.
        unread: beginnings of names of tensors that nothing is computed with.
        variant: of the files; None takes the plain ones, or in a folder without them the only variant.

    Raises:
        UserError: a tensor is missing, or has another shape; the message names them.
    """
    folder = Path(place, options.get("subfolder") or "")
    if folder.is_dir():
        variant = _variants.choose([file.name for file in folder.iterdir()], variant, f"{kind.__name__} of {folder}")
    with without_bars(folder.is_dir()):
        model, report = kind.from_pretrained(place, output_loading_info=True, variant=variant, **options)
    other = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    lacking = sorted(key for key in {*report["missing_keys"], *other} if not key.startswith(unread))
    if lacking:
        where = "/".join(filter(None, (str(place), options.get("subfolder"))))
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(
            f"{where} has no weights for {', '.join(lacking[:3])}{more} of {type(model).__name__}, which would be "
            "random: download it again, whole"
        )
    return model


def find_file(source: str, file: str, revision: str | None = None) -> Path:
    """``source`` itself if it is a file, ``file`` in the folder ``source``, or ``file`` of the Hub id ``source``.

    Raises:
        UserError: it is not there, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise UserError(f"there is no {file} in {path}")
        return path / file
    from huggingface_hub import hf_hub_download

    with weights_of(f"{file} of '{source}'", "huggingface_hub", source, file=file, revision=revision):
        return Path(hf_hub_download(source, file, revision=revision))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch file (read without running code), on the CPU.

    A PyTorch file may keep them under ``state_dict``, as training scripts write it.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is not a file of weights that can be read safely: fetch it again") from error
    content = content.get("state_dict", content)
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def load_exactly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put all ``tensors`` into ``module``, which must want just them."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold these weights: {_first_difference(module, tensors)}") from error


def _first_difference(module: torch.nn.Module, tensors: dict[str, Tensor]) -> str:
    wanted = module.state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        if key not in tensors:
            return f"{key} is missing"
        if key not in wanted:
            return f"{key} is not part of the model"
        if wanted[key].shape != tensors[key].shape:
            return f"{key} has shape {list(tensors[key].shape)}, not {list(wanted[key].shape)}"
    return "they differ"
