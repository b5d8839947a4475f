"""Copy a recipe from the catalogue to edit it; an existing file is never overwritten.

visiontune copy personalise/oft
visiontune copy personalise/oft my_recipe.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import catalogue, files, outside
from visiontune.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a catalogue name, e.g. personalise/oft")
    parser.add_argument("to", nargs="?", type=Path, default=Path(), help="a file or folder (default: this folder)")


def run(args: argparse.Namespace) -> None:
    source = catalogue.find("pipelines", args.recipe)
    to = outside.target(args.to)
    target = to / source.name if outside.is_folder(to) else to
    with files.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            raise UserError(f"{target} exists already: name another file, or move it away") from None
    print(f"copied to {target}; run it with: visiontune {catalogue.read_recipe(source)['verb']} {target}")
