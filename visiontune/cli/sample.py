"""Generate images for a list of prompts, resumably.

visiontune sample adapter=runs/oft/adapter.safetensors prompts=prompts.txt seeds=4
visiontune sample my_sampling.yaml steps=50
"""

from __future__ import annotations

import argparse

from visiontune.cli.words import add_words, split

DEFAULT = "sample/prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, DEFAULT)


def run(args: argparse.Namespace) -> None:
    from visiontune.config import load_sample
    from visiontune.sampling.generate import generate

    manifest = generate(load_sample(*split(args.words, DEFAULT)))
    print(f"finished: {manifest}")
