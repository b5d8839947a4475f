"""What a recipe asks of a search: `{best_of: 8, reward: pickscore, held_out: image_reward}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visiontune import plugin
from visiontune.errors import UserError
from visiontune.rewards.base import Reward
from visiontune.rewards.loading import load, resolve
from visiontune.schema import nearest, shown, spelt
from visiontune.search.base import Search

_REWARDS = ("reward", "held_out")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A search and the rewards that it needs, which are not loaded yet.

    Attributes:
        method: the search. reward: spec of what it goes by. held_out: of what it is judged by, or None.
    """

    method: Search
    reward: str | Mapping[str, Any]
    held_out: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.held_out is not None and configured(self.reward, "reward") == configured(self.held_out, "held_out"):
            raise UserError("held_out is the reward that is searched by, which rises anyway: take another one")

    @staticmethod
    def of(spec: Any, path: str = "search") -> Asked:
        """The search that a recipe describes.

        Args:
            spec: a method with its options, or with its `n` alone, beside `reward` and, optionally, `held_out`.
            path: where it stands, for messages.

        Raises:
            UserError: naming what is wrong and where.
        """
        spec = settings(spec)
        if not isinstance(spec, Mapping):
            raise UserError(f"{path} must be a mapping such as {{best_of: 8, reward: pocket-clip}}, not {shown(spec)}")
        names = [name for name in spec if name not in _REWARDS]
        if len(names) != 1:
            known = nearest("", plugin.names("search"))
            raise UserError(f"{path} needs one method beside reward and held_out, not {len(names)}{known}")
        if spec.get("reward") is None:
            raise UserError(f"{path}.reward is missing: what is chosen by, as `visiontune list rewards` names them")
        for name in _REWARDS:
            if spec.get(name) is not None:
                configured(spec[name], f"{path}.{name}")
        method = _method(names[0], spec[names[0]], f"{path}.{names[0]}")
        try:
            return Asked(method=method, reward=spec["reward"], held_out=spec.get("held_out"))
        except UserError as error:
            raise UserError(f"{path}.{error}") from error

    def rewards(self, path: str = "search") -> tuple[Reward, Reward | None]:
        """The reward that is searched by, and the held-out one; their weights are loaded.

        Raises:
            UserError: their weights are not there, or one compares pictures with each other.
        """
        reward = single(self.reward, f"{path}.reward")
        if self.held_out is None:
            _log.warning(
                "%s by '%s' alone: what it cannot see may get worse, which a reward as %s.held_out would show",
                path,
                reward.name,
                path,
            )
            return reward, None
        return reward, single(self.held_out, f"{path}.held_out")


def settings(spec: Any) -> Any:
    """What a recipe or a command says of a search, a number being one however it was written."""
    spec = spelt(spec)
    if isinstance(spec, Mapping):
        return {key: settings(value) for key, value in spec.items()}
    return [settings(value) for value in spec] if isinstance(spec, list) else spec


def _method(name: str, options: Any, path: str) -> Search:
    given = options if isinstance(options, Mapping) else {Search.SHORTHAND: options}
    if "name" in given:
        raise UserError(f"{path} is called '{name}' already: take name out of its options")
    module, config = plugin.configure("search", {**given, "name": name}, path)
    method = plugin.build(module, config, path)
    if not isinstance(method, Search):
        raise UserError(f"{path}: build of '{name}' gives no Search")
    return method


def configured(spec: Any, path: str) -> tuple[str, Any]:
    """The module of a reward and its options, by which two specs are the same; nothing is loaded."""
    module, config = plugin.configure("rewards", resolve(spec), path)
    return module.__name__, config


def single(spec: str | Mapping[str, Any], path: str) -> Reward:
    """A reward that judges pictures one by one.

    Raises:
        UserError: its weights are not there, or it compares pictures with each other.
    """
    reward = load(spec, path)
    if reward.groupwise:
        raise UserError(
            f"{path} '{reward.name}' compares the pictures of a prompt with each other, and here each needs a score of "
            "its own: take another one"
        )
    return reward
