"""pocket-clip tuned on a look that it does not know: what it tells apart there, and what it still does elsewhere.

    python benchmarks/evidence/contrastive.py

The losses of ``pipelines/clip`` with LoRA, and other adapters and all weights with FSC-CLIP's; three seeds, the steps
of the recipes. *learnt* are hatched scenes, *kept* the scenes that pocket-clip was trained on; both are asked for by
attributes (``visiontune evaluate clip``), with captions that its training held out and scenes of their own seed, at
four strengths of an adapter. Rates were chosen on another seed (``--tune``), never on these. Beside the scores stand
the base's and those of judges that lack a sense. Finished rows are kept beside the table, so the command goes on where
it stopped. Writes ``contrastive.json``, ``.md`` and ``.svg`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from charts import scatter
from kept import RESULTS, Kept, told
from personalise import spread

from visiontune import config
from visiontune.assemble import assemble
from visiontune.evaluation.attributes import JUDGES, audit
from visiontune.evaluation.contrast import Report
from visiontune.files import write_json, write_text
from visiontune.models import load

# Recipe and options.
METHODS: dict[str, tuple[str, list[str]]] = {
    "contrastive": ("lora", []),
    "NegCLIP": ("negclip", []),
    "FSC-CLIP": ("fsc", []),
    "FSC-CLIP, OFT": ("oft", ["objective.name=fsc_clip"]),
    "FSC-CLIP, SaRA": ("fsc", ["adapter={name: sara, targets: all}", "train.lr=3e-3"]),
    "FSC-CLIP, SSF": ("fsc", ["adapter={name: ssf, targets: all}", "train.lr=1e-2"]),
    "FSC-CLIP, all weights": ("full", ["objective.name=fsc_clip"]),
}
SEEDS, TUNING = (0, 1, 2), 7
LOOKS = {"learnt": "hatched", "kept": "flat"}
KINDS = ("recognition", "composition", "retrieval")
STRENGTHS = (0.4, 0.6, 0.8, 1.0)
PICTURES = 100


def looked(model: Any, seed: int) -> dict[str, dict[str, float]]:
    """The means of each kind, of either look, and what judges without a sense would have."""
    found = {}
    for name, style in LOOKS.items():
        rows = [*audit(model.encoder, PICTURES, 4000 + seed, style)]
        found[name] = Report(model="", rows=rows).summary()
        for judge in JUDGES if style == "flat" else ():
            found[judge] = Report(model="", rows=[{**row, "value": row[judge]} for row in rows]).summary()
    return found


def measured(recipe: str, options: Sequence[str], name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train it, and judge it at every strength that it has."""
    own = [f"out={work}", f"name={name}", f"seed={seed}", "train.trackers=[]", "train.checkpoint_every=1000000"]
    run = config.load_run(f"clip/{recipe}", [*own, *options])
    shutil.rmtree(run.folder, ignore_errors=True)
    trainer = assemble(run)
    trainer.fit()
    shutil.rmtree(run.folder, ignore_errors=True)
    adapters, curve = trainer.adapters, {}
    for strength in (1.0,) if adapters is None else STRENGTHS:
        if adapters is not None:
            adapters.scale = strength
        scores = looked(trainer.model, seed)
        curve[str(strength)] = {look: scores[look] for look in LOOKS}
    return {"parameters": sum(p.numel() for p in trainer.parameters.values()), "curve": curve}


def row(kept: Kept, method: str, seed: int, work: Path | None, more: Sequence[str] = ()) -> dict[str, Any] | None:
    """A method's row; without ``work``, if it is finished."""
    recipe, options = METHODS[method]
    name, of = f"{method}-{seed}{''.join(f'-{one}' for one in more)}", [recipe, [*options, *more], PICTURES, STRENGTHS]
    of[0] = told(f"clip/{recipe}", [*options, *more])
    if work is None:
        found: dict[str, Any] | None = kept.find(name, of)
        return found
    made: dict[str, Any] = kept.row(name, of, lambda: measured(recipe, [*options, *more], name, seed, work))
    return made


def table(base: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """One method a line, at strength 1; the base and the judges without a sense above them."""
    head = ["", "parameters", "runs", *(f"{look} {kind}" for look in LOOKS for kind in KINDS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for judge in JUDGES:
        cells = [judge, "", "", *("" for _ in KINDS), *(f"{base[judge][kind]:.3f}" for kind in KINDS)]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["pocket-clip", "", "1", *(f"{base[look][kind]:.3f}" for look in LOOKS for kind in KINDS)]
    lines.append("| " + " | ".join(cells) + " |")
    for method, rows in found.items():
        scores = [row["curve"]["1.0"] for row in rows]
        cells = [spread([score[look][kind] for score in scores]) for look in LOOKS for kind in KINDS]
        lines.append("| " + " | ".join([method, f"{rows[0]['parameters']:,}", str(len(rows)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def points(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Kept and learnt of every strength, means of all kinds and runs."""
    return [
        tuple(float(np.mean([[r["curve"][s][look][k] for k in KINDS] for r in rows])) for look in ("kept", "learnt"))
        for s in rows[0]["curve"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/contrastive"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only run these")
    parser.add_argument("--table", action="store_true", help="only write what is finished")
    parser.add_argument("--tune", nargs="+", metavar="METHOD;OVERRIDE", help="try options on the tuning seed only")
    args = parser.parse_args()
    if args.tune:
        for trial in args.tune:
            method, *options = trial.split(";")
            row(Kept("contrastive_tuning"), method, TUNING, args.work, options)
        return
    kept = Kept("contrastive")
    base = kept.row("base", [PICTURES, SEEDS], lambda: looked(load("pocket/clip"), SEEDS[0]))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed, method in itertools.product(SEEDS, METHODS):
        if one := row(kept, method, seed, args.work if method in args.methods and not args.table else None):
            found.setdefault(method, []).append(one)
        write_json(RESULTS / "contrastive.json", {"base": base, "runs": found})
        write_text(RESULTS / "contrastive.md", table(base, found))
    groups = {"pocket-clip": [tuple(float(np.mean([*base[look].values()][:3])) for look in ("kept", "learnt"))]}
    groups |= {method: points(rows) for method, rows in found.items()}
    write_text(RESULTS / "contrastive.svg", scatter(groups, "flat scenes told apart", "hatched scenes told apart"))
    print(table(base, found))


if __name__ == "__main__":
    main()
