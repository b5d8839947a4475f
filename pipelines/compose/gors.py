"""Draw what compose/gors is trained on: a model's own pictures that are as their prompts say, weighted by how much.

    python pipelines/compose/gors.py --out runs/gors_data
    visiontune train compose/gors data='{root: runs/gors_data, weight_column: weight}'
    visiontune evaluate compose pocket/sd runs/gors

Pocket models are judged by the oracle, on prompts that `visiontune evaluate compose` never draws; others by a reward
(--judge vqa_score), on everyday prompts that it does not draw either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from visiontune.evaluation import compose_pocket, compose_words, gors
from visiontune.models import load
from visiontune.rewards.loading import load as load_reward

MOST = 200  # prompts of a category that `visiontune evaluate compose` draws at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket/sd")
    parser.add_argument("--judge", help="a reward; without one the oracle")
    parser.add_argument("--count", type=int, default=40, help="prompts a category")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the score")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.judge is None:
        judge, tasks = compose_pocket.Oracle(), compose_pocket.tasks(args.count, holdout=False)
    else:
        judge = compose_words.ByReward(load_reward(args.judge), args.device)
        known = {task.prompt for task in compose_words.tasks(MOST)}
        tasks = compose_words.tasks(args.count, seed=1, without=known)
    options = {"threshold": args.threshold, "steps": args.steps, "cfg_scale": args.cfg_scale, "progress": True}
    kept = gors.draw(load(args.model).to(args.device), tasks, judge, args.out, **options)
    print(f"written: {args.out}, {kept} of {len(tasks)} pictures")


if __name__ == "__main__":
    main()
