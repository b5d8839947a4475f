"""Tune a UNet of few bits to draw as it did in full precision (QuEST).

    python pipelines/distil/quest.py --out runs/quest.safetensors
    python pipelines/distil/quest.py --model MODEL --prompts prompts.txt --steps 2000 --out runs/quest.safetensors
    visiontune sample low_bits=runs/quest.safetensors prompts='["a red circle"]'

States come from the model's own sampler with guidance, so give prompts as the model will get them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune import files
from visiontune.data.base import Config
from visiontune.data.prompt_files import read_prompts
from visiontune.data.readers import read
from visiontune.models import load
from visiontune.models.low_bits import Bits
from visiontune.training.quest import Tuning, gap, quantised, trajectories, tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket/sd", help="of Stable Diffusion or SDXL")
    parser.add_argument("--prompts", help="a file of prompts; by default captions of pocket/scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=int, default=4, help="bits of weights")
    parser.add_argument("--inputs", type=int, default=8, help="bits of what layers are given")
    parser.add_argument("--levels", type=int, default=12, help="sampling steps, each with steps of inputs of its own")
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--count", type=int, default=32, help="prompts whose states are tuned on")
    parser.add_argument("--time-steps", type=int, default=Tuning.time_steps)
    parser.add_argument("--steps", type=int, default=Tuning.steps)
    parser.add_argument("--lr", type=float, default=Tuning.lr, help="of weights")
    parser.add_argument("--step-lr", type=float, default=Tuning.step_lr, help="of the steps of inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tuning = Tuning(time_steps=args.time_steps, steps=args.steps, lr=args.lr, step_lr=args.step_lr)
    files.check_target(args.out)
    words = read_prompts(args.prompts) if args.prompts else [s.caption for s in read(Config(root="pocket/scenes"))]
    teacher, model = (load(args.model).to(args.device) for _ in range(2))
    seen = trajectories(teacher, words[: args.count], args.levels, args.cfg_scale, args.seed)
    low = quantised(model, Bits(weights=args.weights, inputs=args.inputs), seen)
    print(f"squared difference from full precision: {gap(model, teacher, seen):.3e}", flush=True)

    def told(stage: str, step: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"{stage}, step {step}: loss {loss:.3e}", flush=True)

    tuned = tune(low, teacher, seen, tuning, args.seed, told)
    print(f"squared difference from full precision: {gap(model, teacher, seen):.3e}")
    print(low.save(args.out, tuned))


if __name__ == "__main__":
    main()
