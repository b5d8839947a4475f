"""Show a recipe or spec, or the options of a method or of a section of a recipe.

visiontune show personalise/oft
visiontune show oft
visiontune show train
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from pathlib import Path

from visiontune import catalogue, plugin
from visiontune.errors import UserError
from visiontune.outside import read_text, shown
from visiontune.schema import describe, nearest

METHODS = ("adapters", "objectives", "guidance", "search", "rewards")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        help="a recipe, spec, adapter, objective, term of guidance, search or reward, or a section: model, train, ...",
    )


def run(args: argparse.Namespace) -> None:
    print("\n\n".join(pages(args.name)))


def pages(name: str) -> list[str]:
    """Everything that goes by ``name``: catalogue files as they are, methods and sections as option tables.

    Raises:
        UserError: nothing goes by that name.
    """
    found = [
        catalogue.find(kind, name).read_text(encoding="utf-8").rstrip()
        for kind in catalogue.KINDS
        if name in catalogue.names(kind)
    ]
    found += [_method(kind, name) for kind in METHODS if name in plugin.names(kind)]
    if Path(name).suffix in (".yaml", ".yml"):
        found.append(read_text(name, "recipe or spec").rstrip())
    if not found:
        from visiontune.config import sections

        if name in sections():
            return [_options(name, sections()[name])]
        known = [n for kind in catalogue.KINDS for n in catalogue.names(kind)]
        known += [n for kind in METHODS for n in plugin.names(kind)]
        raise UserError(f"there is no '{shown(name)}' to show{nearest(name, [*known, *sections()])}")
    return found


def _method(kind: str, name: str) -> str:
    module = plugin.load(kind, name)
    return _options(f"{name} ({kind})", module.Config, inspect.getdoc(module) or "")


def _options(title: str, cls: type, doc: str = "") -> str:
    lines = [title, "=" * len(title), doc or inspect.getdoc(cls) or "", "", "options:"]
    for option, kind, default, help in describe(cls):
        lines.append(f"  {option}: {kind}; default {default}" if default != "required" else f"  {option}: {kind}")
        lines += textwrap.wrap(help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
