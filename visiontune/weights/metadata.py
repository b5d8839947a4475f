"""What the header of an exported file says of itself, in the words of ModelSpec and of kohya's scripts.

ModelSpec is Stability AI's convention of ``modelspec.*``; ``ss_*`` are the keys that kohya's scripts write and user
interfaces show. Nothing here depends on the time or the machine, so equal exports are equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visiontune.adapters._header import called
from visiontune.files import public_name

if TYPE_CHECKING:
    from visiontune.weights.export import Exported, Job

_PREDICTIONS = {"eps": "epsilon", "v": "v"}


def of_adapters(headers: Sequence[Mapping[str, Any]], scales: Sequence[float]) -> dict[str, str]:
    """What the headers of adapters say of them that others may want to know.

    Args:
        headers: as :func:`visiontune.adapters.read_header` gives them. scales: strength of each.
    """
    sources = [
        {"method": called(header["method"], header["config"]), "scale": scale, **_named(header)}
        for header, scale in zip(headers, scales, strict=True)
    ]
    facts = {
        "visiontune.adapters": json.dumps(sources, sort_keys=True),
        "modelspec.title": " + ".join(_each(headers, "modelspec.title")),
        "modelspec.trigger_phrase": ", ".join(_each(headers, "trigger")),
        "ss_sd_model_name": ", ".join(public_name(name) for name in _each(headers, "base_model")),
        "modelspec.resolution": ", ".join(f"{side}x{side}" for side in _each(headers, "resolution")),
    }
    return {key: value for key, value in facts.items() if value}


def of_file(done: Exported, job: Job, kind: str) -> dict[str, str]:
    """The whole header of a file that was written as ``kind``, with what its adapters say in ``job.metadata``."""
    given, model = job.metadata, job.model
    title = given.get("modelspec.title") or done.path.stem
    prediction = getattr(getattr(model, "schedule", None), "prediction", None)
    architecture, version = job.keys.described(prediction)
    facts: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{'lora' if done.ranks else 'diff'}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "ss_base_model_version": version,
        "ss_output_name": done.path.stem,
    }
    side = getattr(model, "resolution", None)
    if side and "modelspec.resolution" not in given:
        facts["modelspec.resolution"] = f"{side}x{side}"
    if prediction in _PREDICTIONS:
        facts["modelspec.prediction_type"] = _PREDICTIONS[prediction]
    if done.ranks:
        ranks = set(done.ranks.values())
        rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        facts["ss_network_module"] = "lycoris.kohya" if done.dora else job.keys.NETWORK
        facts["ss_network_dim"] = rank
        facts["ss_network_alpha"] = (job.keys.ALPHA if kind == "kohya" else None) or rank
    facts |= given
    if "x" in (size := facts.get("modelspec.resolution", "")):
        facts["ss_resolution"] = f"({size.partition(',')[0].replace('x', ', ')})"
    return {key: str(value) for key, value in facts.items() if value}


def _named(header: Mapping[str, Any]) -> dict[str, str]:
    return {"title": header["modelspec.title"]} if "modelspec.title" in header else {}


def _each(headers: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """The different values of a key, in the order of the headers."""
    return list(dict.fromkeys(str(header[key]) for header in headers if header.get(key)))
