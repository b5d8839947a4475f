"""Turn an adapter of another tool into one of visiontune's.

  visiontune import downloaded.safetensors runs/lora.safetensors --model stable-diffusion-v1-5/stable-diffusion-v1-5
  visiontune import peft_folder runs/oft.safetensors --model pocket/sd

Files are LoRA, DoRA, LoHa, LoKr, OFT or differences of weights as diffusers, PEFT, kohya's scripts, LyCORIS or
visiontune write them; folders are those of PEFT, with LoRA, OFT or BOFT. What cannot be read exactly is refused by
name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files
from visiontune.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a .safetensors file with an adapter, or a folder that PEFT saved")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--model", required=True, help="the base it was trained on: pocket/sd, a folder, or a Hub id")
    parser.add_argument("--component", default="unet", help="what a folder belongs to (default: %(default)s)")
    parser.add_argument("--trigger", help="the word that stands for what was learnt, for [trigger] in prompts")


def run(args: argparse.Namespace) -> None:
    files.check_new(args.out)
    if args.out.suffix != ".safetensors":
        raise UserError(f"an adapter is a .safetensors file, not {args.out.name}")
    if not args.source.exists():
        raise UserError(f"there is no {args.source}: give a .safetensors file or a folder that PEFT saved")
    from visiontune import models
    from visiontune.weights.reading import read_foreign

    model = models.load(args.model)
    attached = read_foreign(args.source, model.networks(), model.family, args.component)
    metadata = {"base_model": args.model} | ({"trigger": args.trigger} if args.trigger else {})
    attached.save(args.out, metadata)
    print(f"written: {args.out}, {attached.method} on {len(attached.layers)} layers")
