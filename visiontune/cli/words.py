"""The words after a verb: a recipe, then overrides, as every verb that runs a recipe takes them."""

from __future__ import annotations

import argparse
import shlex

from visiontune.errors import UserError


def add_words(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Accept ``[RECIPE] [OPTION=VALUE ...]``."""
    fallback = f" (default: {default})" if default else ""
    help = f"a recipe, by catalogue name or path{fallback}, then any of its options, e.g. train.steps=200"
    parser.add_argument("words", nargs="*", metavar="RECIPE | OPTION=VALUE", help=help)


def split(words: list[str], default: str | None = None) -> tuple[str, list[str]]:
    """The recipe and the overrides among ``words``.

    Raises:
        UserError: no recipe or more than one.
    """
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {' and '.join(recipes)}; options are written option=value")
    if not recipes and default is None:
        raise UserError("name a recipe, e.g. personalise/oft; `visiontune list recipes` prints them all")
    return recipes[0] if recipes else str(default), [word for word in words if "=" in word]


def go_on(*words: str) -> str:
    """The end of a message about work that was interrupted: the command that goes on with it."""
    return f"go on with `{shlex.join(['visiontune', *words])}`"


def is_main() -> bool:
    """Whether this is the first of the processes that a verb has run on."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)
