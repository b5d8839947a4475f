"""Remove what a mask covers, harmonise a pasted object, or redraw a picture in its layout, by FreeCompose.

    python pipelines/compose/freecompose.py remove --picture scene.png --mask mask.png --out empty.png
    python pipelines/compose/freecompose.py redraw --picture cat.png --origin "a cat" --target "a dog" --out dog.png

Options that are left out are those of `visiontune.composition.freecompose`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from visiontune.composition import as_mask, as_picture, as_pillow
from visiontune.composition.freecompose import Composed, Optimisation, harmonise, redraw, remove
from visiontune.errors import UserError
from visiontune.models import load

ITERATIONS = {"remove": 150, "harmonise": 200, "redraw": 500}


def composed(args: argparse.Namespace, model: Any) -> Composed:
    """What the arguments ask for."""
    how = replace(Optimisation(seed=args.seed), iterations=args.iterations or ITERATIONS[args.task])
    if args.cfg_scale is not None:
        how = replace(how, cfg_scale=args.cfg_scale)
    prompts = {name: getattr(args, name) for name in ("origin", "target") if getattr(args, name) is not None}
    picture = as_picture(Image.open(args.picture))
    if args.task == "redraw":
        if args.mask or len(prompts) < 2:
            raise UserError("redraw takes --origin and --target, and no --mask")
        return redraw(model, picture, how=how, **prompts)
    if not args.mask:
        raise UserError(f"{args.task} needs a --mask, white where the object is")
    task = {"remove": remove, "harmonise": harmonise}[args.task]
    return task(model, picture, as_mask(Image.open(args.mask)), how=how, **prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=ITERATIONS)
    parser.add_argument("--model", default="pocket/sd")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--origin")
    parser.add_argument("--target")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        as_pillow(composed(args, load(args.model)).picture).save(args.out)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
