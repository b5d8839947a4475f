"""List recipes, adapters, objectives, guidance, methods of search, models, rewards and datasets.

visiontune list
visiontune list adapters
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from visiontune import catalogue, plugin

SECTIONS = ("recipes", "adapters", "objectives", "guidance", "search", "models", "rewards", "datasets")
_PACKAGE = Path(plugin.__file__).parent
_FAMILY = re.compile(r"^    family\b.* = ", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", choices=SECTIONS, metavar="SECTION", help=f"one of {', '.join(SECTIONS)}")


def run(args: argparse.Namespace) -> None:
    for section in [args.section] if args.section else SECTIONS:
        rows = entries(section)
        width = max((len(name) for name, _ in rows), default=0)
        print(f"{section}:")
        for name, summary in rows:
            print(f"  {name:<{width}}  {summary}".rstrip())


def entries(section: str) -> list[tuple[str, str]]:
    """The ``(name, summary)`` rows of a section, read from the files without importing any of them."""
    if section == "recipes":
        return _specs("pipelines")
    if section == "datasets":
        return _specs("datasets")
    if section == "models":
        return _models()
    methods = [(name, docstring(_PACKAGE / section / f"{name}.py")) for name in plugin.names(section)]
    return methods + (_specs("rewards") if section == "rewards" else [])


def _specs(kind: str) -> list[tuple[str, str]]:
    return [(name, str(catalogue.load(kind, name).get("description", ""))) for name in catalogue.names(kind)]


def _models() -> list[tuple[str, str]]:
    shipped = sorted((_PACKAGE / "assets").glob("pocket-*/model_index.json"))
    pocket = [(folder.parent.name.replace("-", "/", 1), "shipped with visiontune") for folder in shipped]
    files = [f for f in sorted((_PACKAGE / "models").glob("*.py")) if _FAMILY.search(f.read_text("utf-8"))]
    return pocket + [(f"{f.stem} family", docstring(f)) for f in files]


def docstring(file: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
