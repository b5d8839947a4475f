"""Write a trained adapter in the format of another tool.

  visiontune export runs/oft exported.safetensors
  visiontune export runs/oft exported.safetensors --format kohya --rank 32
  visiontune export runs/oft merged_model --format merged

diffusers and kohya (also ComfyUI, A1111) take LoRA and DoRA as they are; any other method becomes the best LoRA of the
given rank, whose error is printed. diff (ComfyUI) holds the whole change. merged is a plain model. peft is a
folder with LoRA, OFT or BOFT of one component, as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files
from visiontune.errors import UserError
from visiontune.weights import formats

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="an adapter.safetensors, or the folder of a finished run")
    parser.add_argument("out", type=Path, help="the file (.safetensors) to write; for merged and peft a folder")
    parser.add_argument("--format", choices=formats.names(), default="diffusers", help="default: %(default)s")
    parser.add_argument("--rank", type=int, help="of the approximation of what is no plain LoRA; default: in full")
    parser.add_argument("--scale", type=float, default=1.0, help="strength that is written (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the written tensors (default: %(default)s)")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="METHOD", help="method from outside that the file may name"
    )
    parser.add_argument("--model", help="the base, where it has moved; default: what the adapter was trained on")


def run(args: argparse.Namespace) -> None:
    files.check_new(args.out)
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank must be at least 1, not {args.rank}")
    if not formats.load(args.format).FOLDER and args.out.suffix != ".safetensors":
        raise UserError(f"{args.format} is written to a .safetensors file, not {args.out.name}")
    import torch

    from visiontune import adapters, models
    from visiontune.sampling.sources import adapter_file, trained_on
    from visiontune.weights.export import export
    from visiontune.weights.keys import keys_of

    file, dtype = adapter_file(args.adapter), getattr(torch, DTYPES[args.dtype])
    model = models.load(args.model or trained_on(file, "--model"), fetch=args.model is not None)
    components = model.networks()
    attached = adapters.load(components, file, trust=args.trust)
    attached.scale = args.scale
    keys = keys_of(model.family, components)
    done = export(attached, args.out, args.format, dtype=dtype, rank=args.rank, keys=keys, model=model)
    print(f"written: {done.text()}")
    if done.note:
        print(done.note)
