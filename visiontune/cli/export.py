"""Write trained adapters in the format of another tool.

  visiontune export runs/oft exported.safetensors
  visiontune export runs/oft exported.safetensors --format kohya --rank 32
  visiontune export runs/dog runs/ink both.safetensors --scale .7 --scale -.4
  visiontune export runs/oft merged_model --format merged

diffusers and kohya (also ComfyUI, A1111) take LoRA and DoRA as they are; any other method becomes the best LoRA of the
given rank, whose error is printed. diff (ComfyUI) holds the whole change. merged is a plain model. peft is a
folder with LoRA, OFT or BOFT of one component, as they are. Several adapters become one, each on top of those before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files
from visiontune.errors import UserError
from visiontune.ranges import argument
from visiontune.weights import formats

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", nargs="+", help="an adapter.safetensors, or the folder of a finished run; several are added up"
    )
    parser.add_argument("out", type=Path, help="the file (.safetensors) to write; for merged and peft a folder")
    parser.add_argument("--format", choices=formats.names(), default="diffusers", help="default: %(default)s")
    parser.add_argument(
        "--rank",
        type=argument(int, least=1, greatest=16384),
        help="of the approximation of what is no plain LoRA; default: in full",
    )
    parser.add_argument(
        "--scale",
        type=argument(float, least=-100, greatest=100),
        action="append",
        metavar="STRENGTH",
        help="strength that is written (default: 1); given again for each further adapter, or once for all",
    )
    parser.add_argument("--component", help="the one that a PEFT folder is for, where the adapter has several")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the written tensors (default: %(default)s)")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="METHOD", help="method from outside that the file may name"
    )
    parser.add_argument("--model", help="the base, where it has moved; default: what the adapter was trained on")


def run(args: argparse.Namespace) -> None:
    _check(args)
    scales = _scales(args)
    import torch

    from visiontune import adapters, models
    from visiontune.sampling.sources import adapter_file, skips_of, trained_on
    from visiontune.weights import metadata
    from visiontune.weights.export import export
    from visiontune.weights.keys import keys_of

    weights = [adapter_file(name) for name in args.adapter]
    headers = [adapters.read_header(file) for file in weights]
    base = args.model or trained_on(weights[0], "--model")
    model = models.load(base, fetch=args.model is not None, skips=skips_of(weights))
    networks = model.networks()
    sets = []
    for i, (file, scale) in enumerate(zip(weights, scales, strict=True)):
        model.accept(headers[i])
        sets.append(adapters.load(networks, file, name=f"export{i}", trust=args.trust))
        sets[-1].scale = scale
    done = export(
        sets,
        args.out,
        args.format,
        dtype=getattr(torch, DTYPES[args.dtype]),
        rank=args.rank,
        keys=keys_of(model.family, networks),
        model=model,
        component=args.component,
        metadata=metadata.of_adapters(headers, scales),
    )
    print(f"written: {done.text()}")
    for note in done.notes:
        print(note)


def _check(args: argparse.Namespace) -> None:
    files.check_new(args.out)
    if args.rank is not None and args.format in ("diff", "merged"):
        raise UserError(f"{args.format} holds the whole change, of whatever rank: leave --rank out")
    if args.component is not None and args.format != "peft":
        raise UserError(f"{args.format} holds all components: leave --component out, or --format peft")
    if not formats.load(args.format).FOLDER and args.out.suffix != ".safetensors":
        raise UserError(f"{args.format} is written to a .safetensors file, not {args.out.name}")


def _scales(args: argparse.Namespace) -> list[float]:
    """A strength for each adapter."""
    given, count = args.scale or [1.0], len(args.adapter)
    if len(given) not in (1, count):
        raise UserError(f"{len(given)} --scale for {count} adapters: give one for all, or one for each")
    return given * count if len(given) == 1 else given
