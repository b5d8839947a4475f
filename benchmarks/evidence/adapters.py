"""Subject learnt against knowledge lost for every adapter of the catalogue, at equal steps and about equal parameters.

    python benchmarks/evidence/adapters.py

One subject, three seeds, the recipes of ``pipelines/personalise`` with ranks of about as many trained values as OFT's
with blocks of 8. Their learning rates were chosen on another subject and seed (``personalise.py --tune``). Finished
runs are kept in ``--work``, so the command goes on where it stopped. Writes ``adapters.json``, ``.md`` and ``.svg``
into ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from personalise import RESULTS, SCORES, SEEDS, table, train_and_measure

from visiontune import catalogue
from visiontune.files import write_json, write_text

SUBJECT = "ember"
SIZES = {name: ["adapter.rank=2"] for name in ("lora", "dora", "mosa")}
METHODS = [
    name.removeprefix("personalise/") for name in catalogue.names("pipelines") if name.startswith("personalise/")
]
COLUMNS = (*SCORES, "memorised", "energy_change")
X, Y = "prompt_accuracy", "subject_known"


def scatter(rows: list[dict]) -> str:
    """An SVG of knowledge kept against the subject learnt, a cross of standard deviations for each method."""
    side, left = 560, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side + 180}" height="{side + 70}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left + side / 2}" y="{side + 60}" text-anchor="middle">ordinary prompts right</text>',
        f'<text transform="translate(16 {side / 2}) rotate(-90)" text-anchor="middle">subject recognised</text>',
    ]
    for i in range(6):
        at = 10 + side * i / 5
        parts.append(f'<path d="M{left} {at}h{side}M{left + at - 10} 10v{side}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4}" text-anchor="end" font-size="11">{1 - i / 5:.1f}</text>')
        parts.append(
            f'<text x="{left + at - 10}" y="{side + 28}" text-anchor="middle" font-size="11">{i / 5:.1f}</text>'
        )
    for i, method in enumerate(["base", *METHODS]):
        own = [row for row in rows if row["method"] == method]
        if own:
            (x, dx), (y, dy) = ((np.mean(v), np.std(v)) for v in ([r[c] for r in own] for c in (X, Y)))
            cx, cy, wx, wy = left + side * x, 10 + side * (1 - y), side * dx, side * dy
            colour = f"hsl({i * 137 % 360} 70% 40%)"
            parts.append(f'<path d="M{cx - wx} {cy}h{2 * wx}M{cx} {cy - wy}v{2 * wy}" stroke="{colour}" opacity=".3"/>')
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{cx + 6}" y="{cy - 5}" font-size="12" fill="{colour}">{method}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/adapters"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [train_and_measure(None, SUBJECT, 0, args.work, [])]
    for seed in SEEDS:
        rows += [train_and_measure(m, SUBJECT, seed, args.work, SIZES.get(m, [])) for m in args.methods]
        write_json(args.out / "adapters.json", rows)
        write_text(args.out / "adapters.md", table(rows, METHODS, COLUMNS))
        write_text(args.out / "adapters.svg", scatter(rows))
    print(table(rows, METHODS, COLUMNS))


if __name__ == "__main__":
    main()
