"""Generate images for a list of prompts, resumably.

visiontune sample adapter=runs/oft/adapter.safetensors prompts=prompts.txt seeds=4
visiontune sample my_sampling.yaml steps=50
"""

from __future__ import annotations

import argparse

from visiontune.cli.words import add_words, go_on, is_main, split
from visiontune.signals import Interrupted

DEFAULT = "sample/prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, DEFAULT)


def run(args: argparse.Namespace) -> None:
    from visiontune.config import load_sample
    from visiontune.sampling.generate import generate
    from visiontune.view.page import named

    try:
        manifest = generate(load_sample(*split(args.words, DEFAULT)), say=print)
    except Interrupted as error:
        raise Interrupted(f"{error}: {go_on('sample', *args.words)}", error.number) from error
    print(f"finished: {manifest}")
    if is_main():
        print(named(manifest.parent))
