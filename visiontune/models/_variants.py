"""Which of several files of weights is read: `model.safetensors` is plain, `model.fp16.safetensors` a variant of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

from visiontune.errors import UserError

_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors")


def choose(names: Iterable[str], wanted: str | None, where: str) -> str | None:
    """The variant to read of a network; None for the plain files, which are taken where nothing is asked for.

    Args:
        names: of the network's files, without folders. wanted: what the user asks for.
        where: the network, for messages.

    Raises:
        UserError: there is no such variant, or there are several and none is asked for.
    """
    found = _found(names)
    if wanted in found or not (found or wanted):
        return wanted
    variants = sorted(variant for variant in found if variant)
    if wanted is not None or len(variants) > 1:
        said = f"no variant '{wanted}'" if wanted else "no plain weights"
        known = f", one of {', '.join(variants)}" if variants else " to null"
        raise UserError(f"{where} has {said}: set variant{known}")
    warnings.warn(f"{where} has no plain weights: its variant {variants[0]} is read", stacklevel=2)
    return variants[0]


def of_parts(names: Mapping[str, Iterable[str]], wanted: str | None, source: str) -> dict[str, str | None]:
    """The variant of each part of a pipeline; where a part lacks what is asked for, its plain files are read.

    Raises:
        UserError: see :func:`choose`; or no part has the variant that is asked for.
    """
    if wanted is not None:
        choose([name for own in names.values() for name in own], wanted, f"model '{source}'")
    return {
        part: choose(own, wanted if wanted in _found(own) else None, f"{part} of model '{source}'")
        for part, own in names.items()
    }


def _found(names: Iterable[str]) -> set[str | None]:
    return {match["variant"] for match in map(_WEIGHTS.fullmatch, names) if match}
