"""Which adapter, objective and family go together: each cell is trained, resumed, exported and sampled.

    python benchmarks/matrix.py            # every two of an adapter, an objective and a family in some cell
    python benchmarks/matrix.py --all      # every cell, for a night
    python benchmarks/matrix.py --only oft grpo flux

Two steps on tiny random pipelines of the real classes (`tests/cells.py`): a resumed run must end in the bits of one
that was not stopped, a merged export must draw what the adapter draws, and so must `visiontune sample`. Finished cells
are kept in ``--work``, so the command goes on where it stopped. Writes ``benchmarks/results/matrix.json`` and
``docs/matrix.md`` of whatever is finished.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cells import ACTIONS, FAMILIES, YES, Cell, covering, run  # noqa: E402
from contracts.declared import declared  # noqa: E402
from tiny import tiny_model  # noqa: E402
from workshop import Workshop  # noqa: E402

from visiontune import plugin  # noqa: E402
from visiontune.adapters import attach  # noqa: E402
from visiontune.errors import UserError  # noqa: E402
from visiontune.files import write_json, write_text  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "matrix.json", ROOT / "docs" / "matrix.md"
SIDES = {"adapter": plugin.names("adapters"), "objective": plugin.names("objectives"), "family": FAMILIES}
TABLES = (("adapter", "family"), ("objective", "family"), ("adapter", "objective"))
HEAD = """# What goes together

Written by `python benchmarks/matrix.py`: no entry is written by hand. A cell is an adapter, an objective and a family;
it is trained for two steps on a tiny model of the real classes, stopped and resumed to the same bits, exported, and
sampled. A merged export has to draw what the adapter draws. A CLIP draws nothing: its features are compared, and it is
evaluated in the place of being sampled. {run} of {all} cells were run, chosen so that every two of an adapter, an
objective and a family that go together meet in one.

An entry is of all cells that were run of its row and column: **yes** if every action came out in each of them; the
actions that were refused, with a note that has the line; **failed**; and **not run**. The last table is of
single layers: what each adapter can be put on.
"""
# What transformers and UNets are made of: an example of each kind.
LAYERS = {
    "attention": ("sd3", "transformer_blocks.0.attn.to_q"),
    "fused q, k, v, feed-forward": ("flux2", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
    "adaLN modulation": ("sd3", "transformer_blocks.0.norm1.linear"),
    "patches, 2x2 convolution": ("sd3", "pos_embed.proj"),
    "3x3 convolution": ("sd", "conv_in"),
    "LayerNorm": ("sd", "down_blocks.0.attentions.0.transformer_blocks.0.norm1"),
    "RMSNorm of q": ("sd3", "transformer_blocks.0.attn.norm_q"),
}


def outcome(cell: Cell, shops: dict[str, Workshop]) -> dict[str, str]:
    """What comes of a cell; whatever goes wrong without a line for the user is a failure."""
    shop = shops.setdefault(cell.family, Workshop(cell.family, Path(tempfile.mkdtemp())))
    try:
        return run(cell, shop)
    except Exception as error:  # the page has to say it, whatever it is
        return dict.fromkeys(ACTIONS, f"failed: {type(error).__name__} {error}".splitlines()[0][:200])


def entry(found: list[dict[str, str]], notes: list[str]) -> str:
    """One entry of a table; lines that refuse are put into the notes."""
    if not found:
        return "not run"
    if any(line.startswith("failed") for result in found for line in result.values()):
        return "**failed**"
    refused = {a: line for result in found for a, line in result.items() if not line.startswith(YES)}
    if not refused:
        return "yes"
    lines = {re.sub("'[^']*'", "'...'", line): None for line in refused.values()}
    notes += [line for line in lines if line not in notes]
    marks = ", ".join(f"[{notes.index(line) + 1}](#notes)" for line in lines)
    what = "" if not {*refused} < {*ACTIONS} else f"no {', '.join(a for a in ACTIONS if a in refused)} "
    return f"{what}{marks}"


def page(results: dict[Cell, dict[str, str]]) -> str:
    """The whole of ``docs/matrix.md``."""
    every = len(list(itertools.product(*SIDES.values())))
    text, notes = [HEAD.format(run=len(results), all=every)], list[str]()
    for side, other in TABLES:
        lines = [
            f"\n## {side.capitalize()} and {other}\n",
            f"| | {' | '.join(SIDES[other])} |",
            "|---" * (len(SIDES[other]) + 1) + "|",
        ]
        for name in SIDES[side]:
            row = [
                entry([r for c, r in results.items() if getattr(c, side) == name and getattr(c, other) == to], notes)
                for to in SIDES[other]
            ]
            lines.append(f"| {name} | {' | '.join(row)} |")
        text.append("\n".join(lines) + "\n")
    lines = [f"| | {' | '.join(LAYERS)} |", "|---" * (len(LAYERS) + 1) + "|"]
    for name in SIDES["adapter"]:
        found = [entry([{"attach": served(name, *layer)}], notes) for layer in LAYERS.values()]
        lines.append(f"| {name} | {' | '.join(found)} |")
    text.append("\n## Adapter and layer\n\n" + "\n".join(lines) + "\n")
    text.append("\n## Notes\n\n" + "".join(f"{i}. {line}\n" for i, line in enumerate(notes, 1)))
    return "".join(text)


@torch.no_grad()
def served(adapter: str, family: str, name: str) -> str:
    """Whether an adapter on one layer, moved from its start, changes what the layer gives; or the line that refuses."""
    root = tiny_model(family).main
    layer = root.get_submodule(name)
    deep = layer.weight.shape[1] if layer.weight.ndim > 1 else len(layer.weight)
    x = torch.ones(2, deep, *(8,) * (layer.weight.ndim - 2))
    before = layer(x)
    try:
        attached = attach(root, adapter, targets=[name], **declared()[adapter].options)
    except UserError as error:
        return str(error)
    torch.manual_seed(0)
    for parameter in attached.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    attached.refresh()
    return YES if (layer(x) - before).abs().max() > 1e-3 else "failed: it changes nothing"


def chosen(only: Iterable[str], every: bool) -> list[Cell]:
    """The cells that have all of some names."""
    cells = [Cell(*names) for names in itertools.product(*SIDES.values())] if every else list(covering())
    return [cell for cell in cells if {*only} <= {cell.adapter, cell.objective, cell.family}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--all", action="store_true", help="every cell")
    parser.add_argument("--only", nargs="+", default=[], help="names that a cell must have")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    shops: dict[str, Workshop] = {}
    for cell in chosen(args.only, args.all or bool(args.only)):
        file = args.work / f"{cell}.json"
        if not file.exists():
            write_json(file, outcome(cell, shops))
            print(cell, json.loads(file.read_text()), flush=True)
    results = {Cell(*f.stem.split("-")): json.loads(f.read_text()) for f in sorted(args.work.glob("*-*-*.json"))}
    write_json(RESULTS, {str(cell): result for cell, result in results.items()})
    write_text(PAGE, page(results))


if __name__ == "__main__":
    main()
