"""Show training runs and folders of pictures in a browser, as one file.

  visiontune view runs/oft
  visiontune view runs/lora runs/oft --out compare.html
  visiontune view runs/samples

Of a training run: previews over its steps, curves, alarms, recipe and card; of several, their curves in one another and
their previews side by side. Of a folder of visiontune sample: its pictures, to filter, sort and enlarge, each with the
command that draws it. The page needs no server and no network, and is written into the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_OR_FOLDER", help="what is to be shown")
    parser.add_argument("--out", type=Path, help="the file (default: index.html in the folder, or here for several)")


def run(args: argparse.Namespace) -> None:
    from visiontune.files import check_target
    from visiontune.view.page import write

    if args.out:
        check_target(args.out)
    print(f"written: {write(args.folders, args.out)}")
