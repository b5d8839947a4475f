"""Edits of the pocket world, judged by the oracle, beside what a model would score that understood nothing.

    visiontune train edit/instruct
    python benchmarks/evidence/edits.py runs/instruct/model --note "as the recipe has it"

The edits are held out: their instructions are in no training set. `changed` is the share of pictures that show what was
asked for, `kept` that in which all else is as it was (`visiontune.pocket.edits.judge`), `both` the two together. Rows
beside the model's say what these numbers are worth:

- `truth`, and `truth through the VAE`: the most that the judge and the VAE allow;
- `the source`: nothing is edited; `another edit`: the answer to another question;
- `told another instruction`, `shown another source`: the model, deaf to one of the two, with the first seed.

Writes ``edits.json`` and ``edits.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visiontune.core import Request
from visiontune.diffusion.guidance import EditCFG
from visiontune.diffusion.trajectory import Start, rollout
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.ops.pixels import shown, to_tensor, to_uint8
from visiontune.pocket.edits import KINDS, Edit, judge, stream
from visiontune.pocket.world import render

OUT = Path(__file__).parents[1] / "results"
SEED, BATCH = 71, 20


def before(edits: Sequence[Edit]) -> list[np.ndarray]:
    """The pictures that are edited."""
    return [render(edit.before) for edit in edits]


def after(edits: Sequence[Edit]) -> list[np.ndarray]:
    """What is made of them."""
    return [render(edit.after) for edit in edits]


def others(edits: Sequence[Edit]) -> list[Edit]:
    """For each edit another one of its kind."""
    return [*edits[len(KINDS) :], *edits[: len(KINDS)]]


@torch.no_grad()
def coded(model: Any, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures as the VAE gives them back."""
    pixels = to_tensor(np.stack(pictures)) * 2 - 1
    return list(to_uint8(shown(model.decode(model.encode(pixels, sample=False)))))


@torch.no_grad()
def drawn(
    model: Any, words: Sequence[Edit], sources: Sequence[Edit], seed: int, args: argparse.Namespace
) -> list[np.ndarray]:
    """The edits of `sources` by the instructions of `words`, on the chain of the stock pipeline."""
    found: list[np.ndarray] = []
    for start in range(0, len(words), BATCH):
        asked = [
            Request(prompt=told.instruction, pictures=(Image.fromarray(render(seen.before)),))
            for told, seen in zip(words[start : start + BATCH], sources[start : start + BATCH], strict=True)
        ]
        generators = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(asked))]
        final = rollout(
            model,
            model.read(asked),
            uncond=model.read(asked, negative=True),
            guidance=EditCFG(scale=args.cfg_scale, image_scale=args.image_cfg_scale),
            chain=args.steps,
            start=Start(generator=generators),
        ).final
        found += list(to_uint8(shown(model.decode(final))))
    return found


def scores(pictures: Sequence[np.ndarray], edits: Sequence[Edit]) -> dict[str, dict[str, float]]:
    """Shares of right pictures, of all and of each kind."""
    verdicts = [judge(picture, edit) for picture, edit in zip(pictures, edits, strict=True)]
    rows = np.array([[one.changed, one.kept, one.changed and one.kept] for one in verdicts], float)
    kinds = np.array([edit.kind for edit in edits])
    groups = {"all": np.ones(len(edits), bool), **{kind: kinds == kind for kind in KINDS}}
    return {
        name: dict(zip(("changed", "kept", "both"), rows[group].mean(0).round(3).tolist(), strict=True))
        for name, group in groups.items()
    }


def mean_of(found: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean over seeds."""
    return {
        group: {name: round(float(np.mean([one[group][name] for one in found])), 3) for name in found[0][group]}
        for group in found[0]
    }


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """The shares of all edits, and what is right in both ways of each kind."""
    lines = [f"| | changed | kept | both | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 4) + "|"]
    for name, found in rows.items():
        whole = " | ".join(f"{found['all'][key]:.2f}" for key in ("changed", "kept", "both"))
        each = " | ".join(f"{found[kind]['both']:.2f}" for kind in KINDS)
        lines.append(f"| {name} | {whole} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model that edits")
    parser.add_argument("--each", type=int, default=20, help="edits of each kind")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--image-cfg-scale", type=float, default=1.5)
    parser.add_argument("--note", default="", help="how the model was trained")
    args = parser.parse_args()
    model: Any = load(args.model)
    edits = list(islice(stream(SEED, holdout=True), args.each * len(KINDS)))
    away = others(edits)
    by_seed: dict[str, list[dict[str, float]]] = {}
    rows = {
        "truth": scores(after(edits), edits),
        "truth through the VAE": scores(coded(model, after(edits)), edits),
        "the source": scores(before(edits), edits),
        "another edit": scores(after(away), edits),
    }
    ways = {
        "**the model**": (edits, edits, args.seeds),
        "told another instruction": (away, edits, args.seeds[:1]),
        "shown another source": (edits, away, args.seeds[:1]),
    }
    for name, (words, sources, seeds) in ways.items():
        each = [scores(drawn(model, words, sources, seed, args), edits) for seed in seeds]
        rows[name] = mean_of(each)
        by_seed[name] = [one["all"] for one in each]
        print(name, by_seed[name], flush=True)
    how = {key: value for key, value in vars(args).items() if key not in ("model", "note")}
    write_json(OUT / "edits.json", {"note": args.note, **how, "rows": rows, "by_seed": by_seed})
    text = (
        f"# Edits\n\n{args.each * len(KINDS)} held-out edits, {len(args.seeds)} seeds of noise, {args.steps} steps, "
        f"cfg_scale {args.cfg_scale:g}, image_cfg_scale {args.image_cfg_scale:g}; the last columns are `both` of each "
        f"kind. {args.note}\n\n{table(rows)}\n"
    )
    write_text(OUT / "edits.md", text)
    print(text)


if __name__ == "__main__":
    main()
