"""Fit a character for the term `oneactor`: what a word of a prompt is in the picture of a seed.

    python pipelines/guidance/oneactor.py --prompt 'a circle' --word circle --seed 3 --out circle.safetensors

Look at the pictures of some seeds first (`visiontune sample`), and take the seed of the one whose character is to come
again. It draws the siblings, trains a small network and throws it away; the model stays as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from visiontune.guidance.actor import Fitting, fit
from visiontune.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket/sd")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--word", required=True, help="of the prompt, what the character is")
    parser.add_argument("--seed", type=int, default=0, help="of the picture; its siblings have the next ones")
    parser.add_argument("--out", type=Path, required=True)
    for one in fields(Fitting):
        if isinstance(one.default, int | float):
            parser.add_argument(
                f"--{one.name.replace('_', '-')}",
                type=type(one.default),
                default=one.default,
                help=f"{one.metadata['help']} ({one.default})".replace("%", "%%"),
            )
    args = vars(parser.parse_args())
    out, prompt, word, seed = (args.pop(name) for name in ("out", "prompt", "word", "seed"))
    model = load(args.pop("model")).to(args.pop("device"))

    def told(step: int, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    print(fit(model, prompt, word, seed, Fitting(**args), told).save(out))


if __name__ == "__main__":
    main()
