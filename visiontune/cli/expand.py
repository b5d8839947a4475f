"""Make a model that paints into pictures, or edits them, of one that draws them from words.

  visiontune expand pocket/sd models/painting
  visiontune expand pocket/sd models/editing --for edit

Training it needs all weights, or an adapter on its first layer too, 'adapter.targets=[attention, conv_in]', and
pictures: where to paint is a column `region`, or chance; what is edited is a column `source`.

Its UNet gets further input channels with weights of zero: until it is trained, what it is shown changes nothing. The
folder opens as the stock inpainting pipeline, or as that of InstructPix2Pix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a text-to-image model of sd or sdxl: pocket/sd, a folder, or a Hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("paint", "edit"),
        default="paint",
        help="paint: into a picture, where a mask is white; edit: a picture, by an instruction",
    )


def run(args: argparse.Namespace) -> None:
    files.check_new(args.out)
    from visiontune import models
    from visiontune.models.expand import expand_input

    made = expand_input(models.load(args.model), args.purpose)
    with files.atomic_write(args.out) as partial:
        made.save(partial)
    print(f"written: {args.out}, {type(made.pipe).__name__} with {made.pipe.unet.config.in_channels} input channels")
