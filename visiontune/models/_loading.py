"""From what the user named to a model of its family."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from visiontune import models, outside
from visiontune.errors import UserError
from visiontune.models import pocket
from visiontune.models._quantise import Kind, quantise
from visiontune.models._skips import set_skips
from visiontune.models.base import Model
from visiontune.models.sources import without_bars
from visiontune.schema import nearest

# What says how a folder is to be read, in order: a pipeline has a file of the second name in every part.
INDEX, CONFIG, OPEN_CLIP = "model_index.json", "config.json", "open_clip_config.json"
LAYOUTS = {INDEX: "diffusers", CONFIG: "transformers", OPEN_CLIP: "open_clip"}
DEFAULT_DTYPE = torch.float32
# The base of HfHubHTTPError is the error class of whichever HTTP client the Hub's library uses.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, EntryNotFoundError, *HfHubHTTPError.__bases__)
_BROKEN: tuple[type[Exception], ...] = (
    *(*_HUB_ERRORS, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError),
    SafetensorError,
)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def families(naming: str | None = None) -> dict[str, type[Model]]:
    """See `visiontune.models.families`."""
    found = {}
    for info in pkgutil.iter_modules(models.__path__):
        if info.name.startswith("_") or not _names(info.name, naming):
            continue
        module = importlib.import_module(f"{models.__name__}.{info.name}")
        for value in vars(module).values():
            ours = isinstance(value, type) and issubclass(value, Model) and value.__module__ == module.__name__
            if ours and "family" in vars(value):
                found[value.family] = value
    return found


def _names(module: str, naming: str | None) -> bool:
    """Whether the file of a family names a class; what it then imports of diffusers is not needed for any other."""
    return naming is None or f'"{naming}"' in (Path(models.__path__[0]) / f"{module}.py").read_text(encoding="utf-8")


def load(
    source: str,
    dtype: torch.dtype,
    revision: str | None,
    device: str,
    quantized: tuple[Kind, int] | None = None,
    fetch: bool = True,
    variant: str | None = None,
    skips: float | None = None,
) -> Model:
    """See `visiontune.models.load`."""
    _check_device(device)
    folder, fetching = _locate(source, revision, fetch)
    layout, index = _read_index(source, folder, fetching)
    name, family = _family(source, layout, index)
    if variant:
        fetching["variant"] = variant
    try:
        with without_bars(fetching.get("local_files_only", False)):
            model = family.open(name, str(folder or source), source, dtype, index, **fetching)
    except _BROKEN as error:
        mend = f"give a complete {LAYOUTS[layout]} folder with safetensors weights"
        raise UserError(f"model '{source}' cannot be read ({_first_line(error)}): {mend}") from error
    set_skips(model, skips)
    if quantized:
        for network in model.of(*model.names()).values():
            quantise(network, *quantized)
    return model.to(device)


def _family(source: str, layout: str, index: dict[str, Any]) -> tuple[str, Any]:
    """The class that an index names, and the family that understands it."""
    pipeline = layout == INDEX
    kind, attribute = ("pipeline class", "pipeline_classes") if pipeline else ("architecture", "architectures")
    name = str(index.get("_class_name"))
    if not pipeline:
        name = "open_clip" if layout == OPEN_CLIP else ", ".join(index.get("architectures") or ["None"])
    known = _by_class(attribute, name)
    if name not in known:
        known = _by_class(attribute)
        near = "".join(f", of which {match} is nearest" for match in difflib.get_close_matches(name, known, n=1))
        raise UserError(f"model '{source}' has the {kind} {name}; supported: {', '.join(sorted(known))}{near}")
    return name, known[name]


def _by_class(attribute: str, naming: str | None = None) -> dict[str, Any]:
    """Families by what they understand; with `naming` at least those that understand it."""
    return {name: cls for cls in families(naming).values() for name in getattr(cls, attribute, ())}


def _check_device(device: str) -> None:
    """Refuse what is no device, and a CUDA device that is not there, before anything is read."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"'{device}' is not a device: take cpu, cuda, cuda:1 or mps") from error
    if wanted.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError(f"device '{device}' is not available: PyTorch sees no CUDA device; use device=cpu")
    count = torch.cuda.device_count()
    if (wanted.index or 0) >= count:
        raise UserError(f"device '{device}' is not available: PyTorch sees cuda:0 to cuda:{count - 1}")


def _locate(source: str, revision: str | None, fetch: bool) -> tuple[Path | None, dict[str, Any]]:
    """The local folder of `source`, or None for a Hub id; and how to fetch what lies there."""
    if source.startswith(pocket.PREFIX):
        return pocket.folder(source, INDEX, CONFIG), {"local_files_only": True}
    path = outside.expanded(source, "model")
    if source and outside.is_folder(path):
        trained = path / "model"  # where a run that trains every weight leaves its model
        found = any((trained / layout).is_file() for layout in LAYOUTS)
        return trained if found else path, {"local_files_only": True}
    named = False
    with suppress(OSError):
        named = path.is_file()
    if named:
        raise UserError(f"model '{source}' is a file: give a folder in the layout of diffusers or transformers")
    if not _HUB_ID.fullmatch(source):
        near = nearest(source, pocket.names(INDEX, CONFIG))
        raise UserError(f"model '{source}' is neither a folder nor a Hub id (owner/name){near}")
    if not fetch and not _cached(source, revision):
        raise UserError(
            f"model '{source}' is not on this machine: to fetch it from the Hub, name it yourself as the model"
        )
    return None, {"local_files_only": not fetch or not _reachable(source, revision), "revision": revision}


def _cached(source: str, revision: str | None) -> bool:
    return any(isinstance(try_to_load_from_cache(source, name, revision=revision), str) for name in LAYOUTS)


def _reachable(source: str, revision: str | None) -> bool:
    """Whether the Hub has `source`; False where it does not answer but the cache has a copy."""
    try:
        # One request with a timeout. A download would first repeat itself for half a minute.
        HfApi().model_info(source, revision=revision, timeout=10)
        return True
    except _HUB_ERRORS as error:
        if _cached(source, revision):
            return False
        raise _refused(source, revision, error) from error


def _read_index(source: str, folder: Path | None, fetching: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the file that says how a model is to be read, and what it says."""
    for layout in LAYOUTS:
        try:
            path = folder / layout if folder else Path(hf_hub_download(source, layout, **fetching))
            if not path.exists():
                continue
            index = outside.read_json(path, "index")
        except EntryNotFoundError:
            continue
        except UserError as error:
            raise UserError(f"model '{source}' has a broken {layout} ({error}): download it again") from error
        except _HUB_ERRORS as error:
            if folder:
                raise UserError(f"model '{source}' cannot be read ({_first_line(error)})") from error
            raise _refused(source, fetching["revision"], error) from error
        return layout, index if isinstance(index, dict) else {}
    raise UserError(
        f"model '{source}' has no {INDEX} and no {CONFIG}: give a model in the layout of diffusers or transformers"
    )


def _refused(source: str, revision: str | None, error: Exception) -> UserError:
    mend = f"run `hf download {source}` where there is a network and give the folder that it prints"
    if isinstance(error, GatedRepoError):
        mend = "accept its terms on its page of the Hub and run `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        mend = "correct the name, or run `hf auth login` if it is private"
    elif isinstance(error, RevisionNotFoundError):
        mend = "correct the revision"
    at = f" at revision '{revision}'" if revision else ""
    return UserError(
        f"model '{source}'{at} is not a folder and cannot be fetched from the Hub ({_first_line(error)}): {mend}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
