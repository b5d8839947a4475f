"""Put freshly trained pocket models into the package, as fp16 safetensors.

python pipelines/pretrain/ship.py --sd runs/pretrain/sd/model --clip runs/pretrain/clip/model
python pipelines/pretrain/ship.py --flow runs/pretrain/flow/model
python pipelines/pretrain/ship.py --inpaint runs/pretrain/inpaint/model
python pipelines/pretrain/ship.py --control runs/pretrain/control
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import T2IAdapter

import visiontune
from visiontune.models import load

ASSETS = Path(visiontune.__file__).parent / "assets"
MOST_BYTES = 16 * 2**20


def replace(target: Path) -> Path:
    """An empty folder in the place of ``target``."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return target


def forget_paths(folder: Path) -> None:
    """Take out where the weights lay on the machine that made them, and let everybody read the files."""
    for file in folder.rglob("*.*"):
        file.chmod(0o644)
        if file.suffix == ".json":
            content = json.loads(file.read_text())
            if content.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(content, indent=2) + "\n")


def put(trained: Path, folder: Path) -> None:
    """Write a pipeline's folder with half the bits; tokenizers also in the files that older readers know."""
    pipe = load(str(trained), dtype=torch.float16).pipe  # knows of encoders that are not there
    pipe.save_pretrained(folder)
    for name, component in pipe.components.items():
        if hasattr(component, "backend_tokenizer"):
            component.backend_tokenizer.model.save(str(folder / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", type=Path, help="folder of the trained pocket-sd pipeline")
    parser.add_argument("--flow", type=Path, help="folder of the trained pocket-flow pipeline")
    parser.add_argument("--inpaint", type=Path, help="folder of the trained pocket-inpaint pipeline")
    parser.add_argument("--clip", type=Path, help="folder of the trained pocket-clip")
    parser.add_argument("--control", type=Path, help="folder in which the pocket controls were trained")
    args = parser.parse_args()
    for name, trained in (("pocket-sd", args.sd), ("pocket-flow", args.flow), ("pocket-inpaint", args.inpaint)):
        if trained:
            put(trained, replace(ASSETS / name))
    if args.clip:
        shutil.copytree(args.clip, replace(ASSETS / "pocket-clip"), dirs_exist_ok=True)
    for trained in args.control.glob("*/model") if args.control else ():
        control = T2IAdapter.from_pretrained(trained, dtype=torch.float16)
        control.save_pretrained(replace(ASSETS / f"pocket-{trained.parent.name}"))
    forget_paths(ASSETS)
    for file in ASSETS.rglob("*.safetensors"):
        assert file.stat().st_size <= MOST_BYTES, f"{file} is larger than {MOST_BYTES} bytes"


if __name__ == "__main__":
    main()
