"""Copy a recipe from the catalogue to edit it; an existing file is never overwritten.

visiontune copy personalise/oft
visiontune copy personalise/oft my_recipe.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import catalogue
from visiontune.errors import UserError
from visiontune.outside import target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a catalogue name, e.g. personalise/oft")
    parser.add_argument("to", nargs="?", type=Path, default=Path(), help="a file or folder (default: this folder)")


def run(args: argparse.Namespace) -> None:
    source = catalogue.find("pipelines", args.recipe)
    place = target(args.to)
    file = place / source.name if place.is_dir() else place
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("xb") as copy:
            copy.write(source.read_bytes())
    except FileExistsError:
        raise UserError(f"{file} exists already: name another file, or move it away") from None
    print(f"copied to {file}; run it with: visiontune {catalogue.read_recipe(source)['verb']} {file}")
