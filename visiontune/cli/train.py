"""Train what a recipe describes.

visiontune train personalise/oft data.root=my_photos name=my_dog train.steps=200
visiontune train my_recipe.yaml train.resume=true
"""

from __future__ import annotations

import argparse

from visiontune.cli.words import add_words, go_on, is_main, split
from visiontune.signals import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def run(args: argparse.Namespace) -> None:
    from visiontune.assemble import train
    from visiontune.config import load_run
    from visiontune.training.preview import BEFORE_AFTER
    from visiontune.view.page import named

    try:
        out = train(load_run(*split(args.words)), print)
    except Interrupted as error:
        words = [word for word in args.words if not word.startswith("train.resume=")]
        raise Interrupted(f"{error}: {go_on('train', *words, 'train.resume=true')}", error.number) from error
    pictures = out.parent / BEFORE_AFTER
    print(f"finished: {out}" + (f" ({pictures} shows before and after)" if pictures.is_file() else ""))
    if is_main():
        print(named(out.parent))
