"""Rewards from their names: a spec of the catalogue, a module, or a user's own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontune import catalogue, plugin
from visiontune.errors import UserError
from visiontune.rewards.base import Reward, as_reward
from visiontune.yaml_text import read_yaml


def load(spec: str | Mapping[str, Any], path: str = "reward", name: str | None = None) -> Reward:
    """Build a reward; its weights are loaded.

    Args:
        spec: an entry of the catalogue (``pocket-clip``), a module (``clip_score``), a dotted path, a ``.py`` file or
            a spec's ``.yaml`` file, or a mapping ``{"name": one of these, **options}``; options win over the spec's.
        path: where the spec stands in a recipe, for error messages.
        name: what the reward is called in messages and tables; the spec's name unless given.

    Raises:
        UserError: it is unknown, an option does not fit, or its weights are not there.
    """
    module, config = plugin.configure("rewards", resolve(spec), path)
    called = spec if isinstance(spec, str) else str(spec["name"])
    return as_reward(plugin.build(module, config, path), name or called)


def resolve(spec: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """``spec`` with an entry of the catalogue, or a ``.yaml`` file like one, replaced by its module and options."""
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec) if spec else {}
    name = options.get("name")
    if not isinstance(name, str):
        return options
    if Path(name).suffix in (".yaml", ".yml"):
        entry = read_yaml(name)
    elif name in catalogue.names("rewards"):
        entry = catalogue.load("rewards", name)
    else:
        return options
    if not isinstance(entry.get("name"), str) or not isinstance(entry.get("options", {}), Mapping):
        raise UserError(f"{name} is not a reward spec: it needs the name of a module, and options")
    own = dict(entry.get("options", {}))
    # The spec's commits are those of its own models.
    for source, commit in (("model", "revision"), ("base", "base_revision")):
        if options.get(source, own.get(source)) != own.get(source):
            own.pop(commit, None)
    return {**own, **options, "name": entry["name"]}
