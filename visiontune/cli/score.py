"""Score a folder of images with rewards.

  visiontune score runs/samples pocket-oracle pocket-clip
  visiontune score runs/samples oracle oracle.subject=bumble --out scores.json
  visiontune score my_images my_reward.py my_reward.gain=2

The folder holds a manifest.jsonl (as `visiontune sample` writes it) or a .txt file with its prompt beside each image. A
reward is an entry of the catalogue, a reward module, a .py file or a spec's .yaml file; REWARD.OPTION=VALUE changes its
options. Images that a reward cannot score are named at the end, and the other scores are printed and written all the
same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files, outside
from visiontune.errors import UserError
from visiontune.ranges import argument

if TYPE_CHECKING:
    from visiontune.rewards.base import Reward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the images")
    parser.add_argument("words", nargs="*", metavar="REWARD | REWARD.OPTION=VALUE", help="what to score with")
    parser.add_argument("--out", type=Path, help="write every score to this .json or .csv file too")
    images = argument(int, least=1, greatest=65536)
    parser.add_argument("--batch-size", type=images, default=32, help="images a batch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the rewards run (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    if args.out and args.out.suffix not in (".json", ".csv"):
        raise UserError(f"scores are written to a .json or .csv file, not {args.out.name}")
    if args.out:
        files.check_target(args.out)
    if not outside.is_folder(args.folder):
        raise UserError(f"there is no folder {outside.shown(str(args.folder))}")
    from visiontune.ops.devices import check_device

    check_device(args.device, "--device")
    rewards = build(args.words)
    from visiontune.evaluation.score import score

    scores = score(args.folder, rewards, batch_size=args.batch_size, device=args.device, progress=True)
    print(scores.table())
    if args.out:
        print(f"written: {scores.write(args.out)}")
    if scores.failures:
        raise UserError("; ".join(scores.complaints()))


def build(words: Sequence[str]) -> dict[str, Reward]:
    """The rewards that ``words`` name, by name, each with its overridden options.

    Raises:
        UserError: no reward, one that is unknown, or an option that does not fit.
    """
    from visiontune import config

    names = {_label(word): word for word in words if "=" not in word}
    if not names:
        raise UserError("name at least one reward; `visiontune list rewards` prints them all")
    options: dict[str, Any] = {label: {} for label in names}
    overrides = [word for word in words if "=" in word]
    for label, own in config.apply(options, overrides).items():
        if label not in options:
            raise UserError(f"an option is given for '{label}', which is not among the rewards {', '.join(names)}")
        options[label] = own
    from visiontune.rewards.loading import load

    return {label: load({**own, "name": names[label]}, label, label) for label, own in options.items()}


def _label(word: str) -> str:
    """What a reward is called: a file goes by its stem, since dots lead to options."""
    return Path(word).stem if Path(word).suffix in (".py", ".yaml", ".yml") else word
