"""Fit a law of scaling to finished runs, and say what it expects of somewhat larger ones.

  visiontune scaling runs.jsonl --x flops_per_step*steps --y held_out_loss
  visiontune scaling runs.jsonl --x images --y right --form saturating --at 2 5

Each line of a file is a run: a mapping with numbers such as {"steps": 400, "images": 3200, "loss": 0.21}. `--x` may be
a product of several. Losses of models with other latents or predictions, or on other pictures, make no law.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from visiontune.errors import UserError
from visiontune.ranges import argument

_TIMES = [2.0, 10.0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="file", help="JSON lines, one run each")
    parser.add_argument("--x", required=True, help="key of the size, or keys with * between them")
    parser.add_argument("--y", required=True, help="key of the metric")
    parser.add_argument("--form", choices=("power", "saturating"), default="power", help="default: %(default)s")
    parser.add_argument(
        "--at",
        type=argument(float, above=0, greatest=1e6),
        nargs="+",
        default=_TIMES,
        metavar="TIMES",
        help="multiples of the largest size to look at, 10 at most (default: 2 10)",
    )


def run(args: argparse.Namespace) -> None:
    rows = [row for file in args.files for row in _rows(file)]
    x = [math.prod(_number(row, key.strip(), where) for key in args.x.split("*")) for where, row in rows]
    y = [_number(row, args.y, where) for where, row in rows]
    from visiontune.evaluation.scaling import fit

    law = fit(x, y, args.form)
    largest = max(x)
    ahead = [(times, *law.at(times * largest)) for times in args.at]
    shape = "a X^b" if args.form == "power" else "limit + c X^-b"
    print(f"{args.y} = {shape}, X = {args.x}, {len(x)} runs; intervals hold nine tenths")
    for name, value in law.values.items():
        low, high = law.interval(name)
        print(f"  {name:>5} {value:.5g}  [{low:.5g}, {high:.5g}]")
    here = law.at(largest)[0]
    for times, value, low, high in ahead:
        print(f"  at {times:g} times the largest: {value:.5g}  [{low:.5g}, {high:.5g}], {value - here:+.3g} from there")


def _rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file, each with where it stands.

    Raises:
        UserError: no such file, or a line that is no mapping.
    """
    from visiontune import outside

    found = []
    for number, line in enumerate(outside.regular(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = outside.parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f'{where} is no run: write a mapping, {{"steps": 400, "loss": 0.21}}')
        found.append((where, row))
    return found


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        known = ", ".join(sorted(name for name, own in row.items() if isinstance(own, (int, float))))
        raise UserError(f"{where} has no number '{key}': take one that all runs have; here: {known or 'none'}")
    return float(value)
