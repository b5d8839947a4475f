"""Judge a run: how well it learnt its subject and kept its base; or what models put together, or tell apart.

  visiontune evaluate runs/oft
  visiontune evaluate runs/oft --scales 0.4,0.6,0.8,1 --checkpoints --out curve.json
  visiontune evaluate runs/my_dog --clip openai/clip-vit-large-patch14
  visiontune evaluate compose pocket/sd runs/tokencompose --out compose.json
  visiontune evaluate compose stabilityai/stable-diffusion-2-1 --judge vqa_score
  visiontune evaluate clip pocket/clip runs/fsc_clip --data pocket/hatched
  visiontune evaluate clip openai/clip-vit-base-patch32 runs/mine --data my_pictures

Subjects of the pocket world are judged by an oracle that knows what is in a picture, any other by a CLIP: how alike its
pictures are to yours, and how alike pictures of everyday prompts are to those of the base.

`compose` draws prompts that ask for colours, shapes, textures, places, numbers and all of these at once, of each model,
adapter or run that is named, and prints a table for each; those after the first are compared with it. Pocket models are
judged by the oracle, others by a reward (--judge).

`clip` has models of pictures and texts choose: in the pocket world among captions that differ in one attribute, and for
your own pictures (--data) among their captions and false ones made of these.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files
from visiontune.cli import _clip, _compose
from visiontune.errors import UserError

if TYPE_CHECKING:
    from visiontune.config import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER | compose | clip",
        help="folder of a finished run that trained an adapter (./compose for one of that name)",
    )
    parser.add_argument("words", nargs="*", metavar="MODEL | RUN", help="of compose and clip: who is judged")
    parser.add_argument("--scales", default="1", metavar="S,S,...", help="strengths (default: %(default)s)")
    parser.add_argument(
        "--checkpoints", action="store_true", help="every checkpoint that is there, not the result alone"
    )
    parser.add_argument("--clip", help="judge by this CLIP")
    parser.add_argument("--out", type=Path, help="write everything to this .json file too")
    parser.add_argument(
        "--data", help="of clip: captioned pictures, as data.root of a recipe (the pocket world's scenes)"
    )
    _compose.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.out:
        if args.out.suffix != ".json":
            raise UserError(f"points are written to a .json file, not {args.out.name}")
        files.check_target(args.out)
    if args.folder == _clip.NAME:
        _clip.run(args)
        return
    if args.data is not None:
        raise UserError("--data is for 'visiontune evaluate clip'; leave it out")
    if args.folder == _compose.NAME:
        _compose.run(args)
        return
    _compose.refuse(args)
    scales = _scales(args.scales)
    folder = Path(args.folder)
    recipe, weights = folder / "recipe.yaml", folder / "adapter.safetensors"
    if not recipe.is_file() or not weights.is_file():
        raise UserError(f"{args.folder} holds no finished run with an adapter: name the folder of one")

    from visiontune import adapters
    from visiontune.assemble.parts import open_model
    from visiontune.evaluation import kept

    told = _told(recipe)
    if args.checkpoints:
        _check_checkpoints(told)
    judge = kept.judge_of(told, args.clip)
    if judge is None:
        raise UserError(
            "only the pocket world has a judge of its own: name a CLIP for this subject, for instance "
            "--clip openai/clip-vit-large-patch14"
        )
    model: Any = open_model(told, fetch=False)
    model.accept(adapters.read_header(weights))
    attached = adapters.load(model.networks(), weights)
    result = {name: tensor.clone() for name, tensor in attached.state_dict().items()}
    states = kept.saved(folder) if args.checkpoints else [(told.train.steps, result)]
    if not states:
        raise UserError(f"{folder} has no checkpoints: leave out --checkpoints")
    found = []
    for point in kept.points(model, attached, [(step, state, scales) for step, state in states], judge):
        print(point, flush=True)
        found.append(point)
    print(kept.table(found))
    if args.out:
        files.write_json(args.out, {"best": vars(kept.best(found)), "points": [vars(point) for point in found]})
        print(f"written: {args.out}")


def _told(recipe: Path) -> Run:
    """What a run's recipe says of its model, data and training. The methods that it names are not imported.

    The folder may be somebody else's, and a file has no code run.
    """
    from visiontune import config
    from visiontune.yaml_text import read_yaml

    content = {
        key: value for key, value in read_yaml(recipe).items() if key not in ("verb", "reward", "guards", "judge")
    }
    return config.parse_run({**content, "adapter": "lora", "objective": "denoising"})


def _check_checkpoints(told: Run) -> None:
    """Refuse checkpoints whose weights may not be those that the run would have left there."""
    from visiontune.evaluation import kept

    if not kept.comparable(told.train):
        raise UserError(
            "checkpoints hold the weights that a run trains, of which its result may be an average (train.ema, "
            f"train.optimizer={told.train.optimizer}): leave out --checkpoints"
        )


def _scales(text: str) -> list[float]:
    """Strengths of a list such as ``0.4,1``."""
    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--scales is a list of numbers such as 0.4,0.8,1, not '{text}'") from error
    if not all(-4 <= scale <= 4 for scale in scales):
        raise UserError(f"--scales must lie between -4 and 4, not {text}")
    return scales
