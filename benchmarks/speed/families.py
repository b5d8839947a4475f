"""Training steps and whole runs on flow transformers, beside diffusers' DreamBooth examples.

    python benchmarks/speed/families.py

Both sides train the same layers of the same model, with random weights since only sizes matter, on the same pictures.
The other side's step is in ``dreambooth.py``; for OFT it has PEFT's exact OFT in the place of LoRA. Steps take turns,
and a ratio is the median over rounds; on a CPU time is processor time, and peaks are the allocator's. A whole run is a
process of its own, from its start to its end: loading, encoding, 100 steps, saving. Writes
``benchmarks/results/speed_families.json`` and ``.md``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dreambooth
import numpy as np
import torch
from adapters import oft_config
from measure import peak, ratios
from PIL import Image
from report import parser, row, write
from whole_run import seconds

from visiontune import config
from visiontune.assemble import assemble

# The tiny pipelines, whose folder has the name of this file, take the place of this folder.
sys.path[0] = str(Path(__file__).parents[2] / "tests")

from tiny import remade, tiny_pipe  # noqa: E402

SIDE, STEPS = 64, 100
# Of the transformers: wide enough for the matrix products to take most of the time.
WIDE: dict[str, dict[str, Any]] = {
    "sd3": {
        "num_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "caption_projection_dim": 512,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (),
    },
    "flux": {
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "axes_dims_rope": (16, 24, 24),
    },
    "qwen_image": {
        "num_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "axes_dims_rope": (16, 24, 24),
    },
}
ADAPTERS = {
    "LoRA": f"adapter={{name: lora, targets: attention, rank: {dreambooth.RANK}}}",
    "OFT": "adapter={name: oft, targets: attention, block_size: 32}",
}


def prepare(family: str, folder: Path) -> None:
    """A model and four pictures as both sides read them."""
    pipe = tiny_pipe(family)
    pipe.transformer = remade(pipe.transformer, **WIDE[family])
    pipe.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")


def options(folder: Path, adapter: str, out: Path, steps: int) -> list[str]:
    """Our run, in the terms of a recipe."""
    return [
        f"model={folder / 'model'}",
        f"data.root={folder / 'pictures'}",
        f"data.prompt={dreambooth.PROMPT}",
        f"data.resolution={SIDE}",
        "data.class_noun=circle",
        f"out={out}",
        ADAPTERS[adapter],
        "train.parts=[denoiser]",
        "train.trigger_lr=null",
        "objective.prior=none",
        "objective.timesteps={density: logit_normal}",
        "preview.prompts=[]",
        "train.trackers=[]",
        "train.threads=1",
        "train.device=cpu",
        f"train.lr={dreambooth.RATE}",
        f"train.batch_size={dreambooth.BATCH}",
        f"train.steps={steps}",
        f"train.checkpoint_every={10 * STEPS}",
    ]


def numbered(step: Callable[[int], Any]) -> Callable[[], Any]:
    """Step 0, 1, 2 ... of one call after another."""
    count = iter(range(10**9))
    return lambda: step(next(count))


def step_rows(family: str, folder: Path, rounds: int) -> Iterator[dict]:
    """A step's time and peak in units of the other side's."""
    for adapter in ADAPTERS:
        out = folder / f"steps {adapter}"
        trainer = assemble(config.load_run("personalise/lora", options(folder, adapter, out, 10 * STEPS)))
        layers = trainer.adapters.base_layers()
        (folder / "layers.json").write_text(json.dumps([name.partition(".")[2] for name in layers]))
        names = json.loads((folder / "layers.json").read_text())
        made = dreambooth.lora(names) if adapter == "LoRA" else oft_config(32)
        made.target_modules = set(names)
        pipe = tiny_pipe(family)
        pipe = type(pipe).from_pretrained(folder / "model")
        theirs = numbered(dreambooth.stepper(family, pipe, folder / "pictures", made))
        steps = {"ours": numbered(trainer.optimise), "theirs": theirs}
        label = "LoRA step" if adapter == "LoRA" else "OFT step, PEFT's exact OFT there"
        yield row(1, f"{family}: {label}, time", ratios(steps, "theirs", rounds)["ours"], 0.95)
        yield row(2, f"{family}: {label}, peak", peak(steps["ours"]) / peak(steps["theirs"]), 0.90)


def run_row(family: str, folder: Path, rounds: int) -> dict:
    """Processor time of whole LoRA runs."""
    peer = Path(dreambooth.__file__)
    found = []
    for number in range(rounds):
        out = [str(folder / f"{side} {number}") for side in ("ours", "theirs")]
        ours = [sys.executable, "-m", "visiontune", "train", "personalise/lora"]
        ours += options(folder, "LoRA", Path(out[0]), STEPS)
        given = [str(folder / name) for name in ("model", "pictures")]
        theirs = [sys.executable, str(peer), family, *given, out[1], str(STEPS), str(folder / "layers.json")]
        found.append(seconds(ours, folder) / seconds(theirs, folder))
    return row(3, f"{family}: LoRA run of {STEPS} steps, from start to end", statistics.median(found), 0.75)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--families", nargs="+", choices=WIDE, default=list(WIDE))
    made.add_argument("--runs", type=int, default=3, help="rounds of whole runs")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    rows = []
    for family in args.families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(family, folder)
            rows += [*step_rows(family, folder, args.rounds), run_row(family, folder, args.runs)]
    write("speed_families", args, rows)


if __name__ == "__main__":
    main()
