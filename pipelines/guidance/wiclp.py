"""Fit a projection for the term `wiclp`: words by which attributes find their objects.

    python pipelines/guidance/wiclp.py --out runs/wiclp.safetensors
    python pipelines/guidance/wiclp.py --model MODEL --data my_pictures --steps 20000 --lr 1e-5 --out colour.safetensors

The pictures should be as their captions say: take those of a stronger model, or draw many and keep the best
(`visiontune sample score=... keep=1`). The model stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files
from visiontune.data.base import Config
from visiontune.data.loader import BatchSampler
from visiontune.data.preflight import preflight
from visiontune.data.readers import read, resolve
from visiontune.data.rows import Rows
from visiontune.guidance.projector import Fitting, fit
from visiontune.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket/sd", help="of Stable Diffusion or SDXL")
    parser.add_argument("--data", default="pocket/scenes", help="pictures with captions, as data.root of a recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=5, help="tokens that a token is made of; 1 is CLP")
    parser.add_argument("--steps", type=int, default=300, help="for pocket/sd; the authors take 20000")
    parser.add_argument("--lr", type=float, default=1e-3, help="for pocket/sd; the authors take 1e-5")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    fitting = Fitting(window=args.window, steps=args.steps, lr=args.lr)
    files.check_target(args.out)
    data = resolve(Config(root=args.data))
    samples = read(data)
    preflight(samples)
    model = load(args.model).to(args.device)
    rows = BatchSampler(Rows(model, samples, data), args.batch_size, args.seed)
    rows.rows.fill()

    def told(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    print(fit(model, rows.batch, fitting, args.seed, told).save(args.out))


if __name__ == "__main__":
    main()
