"""Pictures of which many are spoilt: told their ratings and asked for the best, against a run that is told none.

    python benchmarks/evidence/ratings.py

The recipe `compose/rated` on pocket/rated, and the same without `data.scores`, with two seeds each that no option was
chosen on. `right`: the oracle finds just what the prompt asks, with what it finds in the picture of another prompt as
chance; `grain`: mean distance of a pixel to the median of its neighbours, which noise raises, of 1. Held-out prompts.

Runs go on where they were ended, and finished rows are kept. Writes ``ratings.json`` and ``ratings.md`` into
``benchmarks/results``, and beside the runs ``sheet.png``: what the first seed draws, one way of asking a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, Kept, told
from PIL import Image
from scipy.ndimage import median_filter

from visiontune import adapters, config
from visiontune.assemble import assemble
from visiontune.data.procedural import Spec, samples
from visiontune.data.scores import asked
from visiontune.evaluation.metrics import prompt_accuracy
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.pocket.spoilt import RATINGS
from visiontune.sampling.pipeline import images

RECIPE, SEEDS, STEPS, CFG_SCALE, SHOWN = "compose/rated", (1, 2), 12, 4.0, 8
QUIET = ["preview.prompts=[]", "train.resume=true"]
RATED: list[str] = []
PLAIN = ["data.scores={}"]
# What is trained, and what it is asked for; None is a model that was not trained.
WAYS: dict[str, tuple[list[str] | None, dict[str, float | None]]] = {
    "told ratings, asked for the best": (RATED, {}),
    "the same, asked for faithful 0": (RATED, {"faithful": 0}),
    "the same, asked for clean 0": (RATED, {"clean": 0}),
    "the same, told nothing": (RATED, {"faithful": None, "clean": None}),
    "told no ratings": (PLAIN, {}),
    "pocket-sd": (None, {}),
}

Scores = dict[str, float]


def prompts(count: int) -> list[str]:
    """Held-out prompts of scenes."""
    spec = Spec(world="scenes", holdout=True, count=count, seed=907)
    return [one.caption for one in samples(spec, "asked", trigger="sks", class_noun="object")]


def grain(pictures: np.ndarray) -> float:
    """Mean distance of a pixel to the median of the nine about it, of 1."""
    return float(np.mean([np.abs(p - median_filter(p, (3, 3, 1))) for p in pictures.astype(float) / 255]))


def trained(options: Sequence[str], seed: int, folder: Path) -> Path:
    """The adapter that the recipe makes."""
    name = f"{'plain' if options else 'rated'}-{seed}"
    run = config.load_run(RECIPE, [f"out={folder}", f"name={name}", f"seed={seed}", *QUIET, *options])
    file = run.folder / "adapter.safetensors"
    if not file.is_file():
        assemble(run).fit()
    return file


def row(way: str, seed: int, args: argparse.Namespace) -> Scores:
    """Scores of one way; its first pictures are written for the sheet."""
    options, wanted = WAYS[way]
    model: Any = load("pocket/sd")
    if options is not None:
        file = trained(options, seed, args.work)
        header = adapters.read_header(file)
        model.accept(header)
        adapters.load(model.networks(), file)
        if model.rated:
            model.ask(asked(wanted, RATINGS))
    words = prompts(args.prompts)
    drawn = images(model, words, [1000 * seed + i for i in range(len(words))], steps=STEPS, cfg_scale=CFG_SCALE)
    Image.fromarray(np.concatenate(drawn[:SHOWN], 1)).save(args.work / f"{way}-{seed}.png")
    right, chance = prompt_accuracy(drawn, words), prompt_accuracy(np.roll(drawn, 1, 0), words)
    return {"right": round(right, 3), "chance": round(chance, 3), "grain": round(grain(drawn), 4)}


def table(rows: dict[str, list[Scores]]) -> str:
    """Each seed and the means."""
    lines = ["| | right (each seed) | chance | grain |", "|---|---|---|---|"]
    for name, found in rows.items():
        right, chance, rough = (np.mean([one[key] for one in found]) for key in ("right", "chance", "grain"))
        each = ", ".join(f"{one['right']:.2f}" for one in found)
        lines.append(f"| {name} | {right:.2f} ({each}) | {chance:.2f} | {rough:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/ratings"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only run these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept, rows = Kept("ratings"), dict[str, list[Scores]]()
    for seed in SEEDS:
        for way, (options, wanted) in WAYS.items():
            of = [told(RECIPE, options) if options is not None else None, wanted, args.prompts, STEPS, CFG_SCALE]
            name, runs = f"{way}-{seed}", way in args.ways and seed in args.seeds
            found = kept.row(name, of, partial(row, way, seed, args)) if runs else kept.find(name, of)
            rows[way] = [*rows.get(way, []), *([found] if found else [])]
    rows = {way: found for way, found in rows.items() if found}
    how = {"prompts": args.prompts, "steps": STEPS, "cfg_scale": CFG_SCALE}
    write_json(RESULTS / "ratings.json", {**how, "rows": rows})
    write_text(
        RESULTS / "ratings.md",
        f"# Told ratings\n\n{args.prompts} held-out prompts, {STEPS} steps, cfg_scale {CFG_SCALE:g}; see "
        f"`benchmarks/evidence/ratings.py`.\n\n{table(rows)}\n",
    )
    files = [args.work / f"{way}-{SEEDS[0]}.png" for way in WAYS]
    shown = np.concatenate([np.asarray(Image.open(file)) for file in files if file.is_file()])
    Image.fromarray(shown).resize((2 * shown.shape[1], 2 * shown.shape[0]), Image.Resampling.NEAREST).save(
        args.work / "sheet.png"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
