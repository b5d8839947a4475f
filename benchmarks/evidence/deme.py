"""Two experts merged, beside the base and one run of as many steps in all (DeMe).

    python benchmarks/evidence/deme.py --steps 100          # of each expert; the one run has twice as many

LoRA on pocket-sd, scenes of the pocket world. Weights are searched on 32 scenes, losses are of 64 others that no run
and no search has seen: the mean error of the lower and of the upper half of the noise. `right` is the share of held-out
prompts that are drawn right, by the oracle. Writes ``deme.json`` and ``deme.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import RESULTS
from PIL import Image

from visiontune import adapters, config
from visiontune.assemble import assemble
from visiontune.data.base import Config, Sample, Source
from visiontune.data.rows import Rows
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.pocket import oracle
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import render
from visiontune.sampling.pipeline import images
from visiontune.training.held import Held
from visiontune.weights.mixing import mixed
from visiontune.weights.shares import Shares, search

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
QUIET = ["preview.prompts=[]", "judge=none", "train.trackers=[]"]
TIMES = {"low": "{low: 0, high: 0.5, global_share: 0.3}", "high": "{low: 0.5, high: 1, global_share: 0.3}"}


def trained(name: str, timesteps: str, steps: int, seed: int, work: Path) -> Path:
    """The adapter of a run, made unless it is there."""
    options = [f"out={work}", f"name={name}-{steps}-{seed}", f"seed={seed}", f"train.steps={steps}", *QUIET]
    objective = (
        "{name: denoising}" if name == "one" else f"{{name: denoising, reference_weight: 1, timesteps: {timesteps}}}"
    )
    run = config.load_run("compose/deme", [*options, f"objective={objective}"])
    file = run.folder / "adapter.safetensors"
    if not file.exists():
        shutil.rmtree(run.folder, ignore_errors=True)
        assemble(run).fit()
    return file


def held(model: Any, seed: int, count: int, work: Path) -> Held:
    """Scenes of a stream of their own."""
    samples = [
        Sample(id=f"{seed}-{i}", sources={"image": Source(lambda s=scene: Image.fromarray(render(s)))}, caption=words)
        for i, (scene, words) in enumerate(islice(stream(seed), count))
    ]
    return Held(Rows(model, samples, Config(root="held"), work / ".cache"), count)


def together(model: Any, sets: Sequence[adapters.AdapterSet], judge: Held, shares: Shares) -> float:
    """The loss of the merged sets."""
    made = mixed(model.networks(), sets, shares, "trial")
    found = float(judge.losses(model).mean())
    made.detach()
    return found


def measured(model: Any, judge: Held, prompts: list[str]) -> dict[str, float]:
    low, high = judge.losses(model).view(2, -1).mean(1).tolist()
    drawn = images(model, prompts, list(range(len(prompts))), steps=15, cfg_scale=4.0)
    right = np.mean([oracle.matches(picture, words) for picture, words in zip(drawn, prompts, strict=True)])
    return {"low": round(low, 6), "high": round(high, 6), "mean": round((low + high) / 2, 6), "right": float(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each expert")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/deme"))
    args = parser.parse_args()
    prompts = [words for _, words in islice(stream(83, holdout=True), args.prompts)]
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        files = {name: trained(name, times, args.steps, seed, args.work) for name, times in TIMES.items()}
        files["one"] = trained("one", "", 2 * args.steps, seed, args.work)
        model: Any = load("pocket/sd")
        networks = model.networks()
        chosen, judge = held(model, 81, 32, args.work), held(model, 82, 64, args.work)
        sets = [adapters.load(networks, files[name], name=name).eval() for name in TIMES]
        for one in sets:
            one.enabled = False

        best, _ = search(partial(together, model, sets, chosen), len(sets), GRID)
        rows.append({"model": "the base", "seed": seed, **measured(model, judge, prompts)})
        for name, shares in {"low alone": (1.0, 0.0), "high alone": (0.0, 1.0), "merged": best}.items():
            made = mixed(networks, sets, shares, "merged")
            rows.append({"model": name, "seed": seed, "weights": shares, **measured(model, judge, prompts)})
            made.detach()
        for one in sets:
            one.detach()
        made = adapters.load(networks, files["one"], name="one").eval()
        rows.append({"model": f"one run of {2 * args.steps} steps", "seed": seed, **measured(model, judge, prompts)})
        made.detach()
    lines = ["| | seed | low noise | high noise | mean | right |", "|---|---|---|---|---|---|"]
    for row in rows:
        name = row["model"] + (f" ({row['weights'][0]:g}, {row['weights'][1]:g})" if row["model"] == "merged" else "")
        numbers = " | ".join(f"{row[key]:.5f}" for key in ("low", "high", "mean"))
        lines.append(f"| {name} | {row['seed']} | {numbers} | {row['right']:.2f} |")
    head = f"# DeMe\n\nTwo experts of {args.steps} steps; losses of 64 held-out scenes, {args.prompts} prompts.\n\n"
    write_json(RESULTS / "deme.json", {"steps": args.steps, "rows": rows})
    write_text(RESULTS / "deme.md", head + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
