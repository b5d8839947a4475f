"""A stock pipeline from a folder or the Hub: what its files say is checked before anything large is made of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn

from visiontune import outside
from visiontune.errors import UserError
from visiontune.models import _variants
from visiontune.models.sources import pretrained

_MOST_TIMESTEPS = 100_000


def opened(
    name: str,
    place: str,
    source: str,
    dtype: torch.dtype,
    index: Mapping[str, Any],
    given: Mapping[str, Any],
    **fetching: Any,
) -> Any:
    """The pipeline of the class ``name`` at ``place``, a folder or a Hub id.

    Args:
        source: as the user named it. index: what its `model_index.json` says. given: arguments for `from_pretrained`.
        fetching: as diffusers has it.

    Raises:
        UserError: the index, the noise schedule or a tokenizer is no model's.
    """
    import diffusers

    kind = getattr(diffusers, name)
    _check_index(source, index, kind)
    # A part that the model was saved without has to be named again, unless its pipeline calls it optional.
    absent = dict.fromkeys(part for part, value in index.items() if value == [None, None])
    options = {"use_safetensors": True, **absent, **given}
    networks = {part: network for part, network in _network_classes(index).items() if part not in options}
    wanted = fetching.pop("variant", None)
    if not Path(place).is_dir():
        if not fetching["local_files_only"]:
            wanted = _offered(place, source, networks, wanted, fetching.get("revision"))
        place = kind.download(place, variant=wanted, **options, **fetching)
    _check_scheduler(source, Path(place))
    files = {part: [file.name for file in Path(place, part).glob("*")] for part in networks}
    loading: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    for part, variant in _variants.of_parts(files, wanted, source).items():
        options[part] = pretrained(networks[part], place, subfolder=part, variant=variant, **loading)
    pipe = kind.from_pretrained(place, **{**loading, **options})
    _check_tokenizers(source, pipe)
    return pipe


def _offered(
    place: str, source: str, networks: Mapping[str, Any], wanted: str | None, revision: str | None
) -> str | None:
    """The variant of the weights on the Hub that some network is to be had in, the wanted one at best."""
    listed = HfApi().list_repo_files(place, revision=revision)
    files = {p: [f.removeprefix(f"{p}/") for f in listed if f.startswith(f"{p}/")] for p in networks}
    return next(filter(None, _variants.of_parts(files, wanted, source).values()), None)


def _network_classes(index: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of the networks that an index names, by their parts."""
    import diffusers
    import transformers

    found = {}
    for part, value in index.items():
        library, name = value if isinstance(value, list) and len(value) == 2 else (None, None)
        home = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
        kind = getattr(home, str(name), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained"):
            found[part] = kind
    return found


def _check_index(source: str, index: Mapping[str, Any], kind: Any) -> None:
    """Refuse an index whose parts are no pairs of names, or that has diffusers import others than transformers."""
    from diffusers import pipelines

    own = {"diffusers", "transformers", *(module.name for module in pkgutil.iter_modules(pipelines.__path__))}
    parts = {*kind._get_signature_keys(kind)[0]} - {"self"}
    for part, value in index.items():
        pair = isinstance(value, list) and len(value) == 2
        if part in parts and not (pair and (value == [None, None] or all(isinstance(name, str) for name in value))):
            raise UserError(
                f"model '{source}' does not say of what class its {part} is: correct its model_index.json, or download "
                "it again"
            )
        if pair and value[0] is not None and str(value[0]) not in own:
            raise UserError(
                f"model '{source}' wants its {part} from '{value[0]}', which is neither diffusers nor transformers: "
                "correct its model_index.json, or take another model"
            )


def _check_scheduler(source: str, folder: Path) -> None:
    """Refuse a noise schedule without a length, or of one that no model has, before tables of it are made."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return
    config = outside.read_json(file, "scheduler's config")
    steps = config.get("num_train_timesteps", 1000) if isinstance(config, dict) else None
    if not isinstance(steps, int) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise UserError(
            f"model '{source}' has a noise schedule of num_train_timesteps={outside.shown(repr(steps))}: set it in "
            f"{file} to what the model was trained with, 1000 for most"
        )


def _check_tokenizers(source: str, pipe: Any) -> None:
    """Refuse an empty tokenizer, as transformers makes where the files of one are missing: all prompts read alike."""
    for part, value in pipe.components.items():
        if part.startswith("tokenizer") and value is not None and len(value) <= len(value.all_special_ids) + 1:
            raise UserError(f"model '{source}' has no vocabulary in its {part} folder: download it again")
