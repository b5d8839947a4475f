"""Put freshly trained pocket models into the package, as fp16 safetensors.

python pipelines/pretrain/ship.py --sd runs/pretrain/sd/model --clip runs/pretrain/clip/model
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import visiontune

ASSETS = Path(visiontune.__file__).parent / "assets"
MOST_BYTES = 16 * 2**20


def replace(target: Path) -> Path:
    """An empty folder in the place of ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", type=Path, help="folder of the trained pocket-sd pipeline")
    parser.add_argument("--clip", type=Path, help="folder of the trained pocket-clip")
    args = parser.parse_args()
    if args.sd:
        folder = replace(ASSETS / "pocket-sd")
        pipe = StableDiffusionPipeline.from_pretrained(args.sd, torch_dtype=torch.float16)
        pipe.save_pretrained(folder)
        pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    if args.clip:
        shutil.copytree(args.clip, replace(ASSETS / "pocket-clip"), dirs_exist_ok=True)
    for file in ASSETS.rglob("*.safetensors"):
        assert file.stat().st_size <= MOST_BYTES, f"{file} is larger than {MOST_BYTES} bytes"


if __name__ == "__main__":
    main()
