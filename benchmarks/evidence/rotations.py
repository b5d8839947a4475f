"""What one layer learns of a single new direction, and what that does to its old data: rotations against LoRA.

    python benchmarks/evidence/rotations.py

A frozen weight of d inputs and outputs, old data in half of its dimensions, and one new input of their length whose
output is to become another vector of the length that it has. Adam minimises the error of that output and the change
of the old ones, by their sizes. ``learnt`` is the share of the new output that is there in the end, ``harm`` the change
of the old ones. Writes ``benchmarks/results/rotations.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from visiontune.adapters.base import attach
from visiontune.adapters.lora import Config as LoRA
from visiontune.adapters.oft import Config as OFT
from visiontune.adapters.plane_oft import Config as Planes
from visiontune.files import write_json, write_text

WIDTHS, SEEDS, STEPS = (64, 128, 256), (0, 1), 600
METHODS: dict[str, Callable[[int], tuple[object, float]]] = {
    "lora, rank 8": lambda d: (LoRA(rank=8), 3e-3),
    "plane_oft, rank 8": lambda d: (Planes(rank=8), 3e-3),
    "oft, b = d": lambda d: (OFT(block_size=d), 1e-3),
    "oft, b = 32": lambda d: (OFT(block_size=32), 1e-3),
    "oft, b = 8": lambda d: (OFT(block_size=8), 3e-3),
}
RESULTS = Path(__file__).parents[1] / "results"


def outcome(method: str, d: int, seed: int) -> tuple[float, float]:
    """``learnt`` and ``harm`` of one method on a layer of width ``d``."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(d, d, bias=False, dtype=torch.float64)
    frame = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    old = torch.randn(4 * d, d // 2, dtype=torch.float64) @ frame[: d // 2]
    new = _of_length(torch.randn(d, dtype=torch.float64), (d / 2) ** 0.5)
    with torch.no_grad():
        before, begun = layer(old), layer(new)
        missing = _of_length(torch.randn(d, dtype=torch.float64), float(begun.norm()))
    config, rate = METHODS[method](d)
    adapters = attach(torch.nn.Sequential(layer), config, targets="Linear")
    optimizer = torch.optim.Adam([p for p in adapters.parameters() if p.requires_grad], lr=rate)
    for _ in range(STEPS):
        harm = _relative(layer(old) - before, before)
        lacking = _relative(layer(new) - begun - missing, missing)
        (harm + lacking).backward()
        optimizer.step()
        optimizer.zero_grad()
    return 1 - lacking.item(), harm.item()


def _of_length(vector: Tensor, length: float) -> Tensor:
    return vector * (length / vector.norm())


def _relative(error: Tensor, size: Tensor) -> Tensor:
    return error.square().sum() / size.square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for method in METHODS:
        for d in WIDTHS:
            runs = [outcome(method, d, seed) for seed in SEEDS]
            learnt, harm = (sum(values) / len(runs) for values in zip(*runs, strict=True))
            rows.append({"method": method, "d": d, "learnt": round(learnt, 4), "harm": round(harm, 5)})
            print(rows[-1], flush=True)
    lines = ["| learnt / harm | " + " | ".join(f"d = {d}" for d in WIDTHS) + " |", "|---" * (1 + len(WIDTHS)) + "|"]
    for method in METHODS:
        cells = [f"{row['learnt']:.2f} / {row['harm']:.3f}" for row in rows if row["method"] == method]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    write_json(args.out / "rotations.json", rows)
    write_text(args.out / "rotations.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
