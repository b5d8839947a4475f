"""Personalise the shipped pocket model and show the effect; offline, on a CPU.

visiontune demo
visiontune demo --out runs/my_demo adapter.block_size=8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune.errors import UserError
from visiontune.outside import target

_OWN = ("out", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("words", nargs="*", metavar="OPTION=VALUE", help="options of the demo's recipe to change")


def run(args: argparse.Namespace) -> None:
    for word in args.words:
        if "=" not in word:
            raise UserError(f"'{word}' is not an option=value pair")
        if word.partition("=")[0] in _OWN:
            raise UserError(f"{word}: the demo names its runs itself; its folder is --out")
    from visiontune import demo

    demo.run(target(args.out, "the folder (--out)"), args.words)
