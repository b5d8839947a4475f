"""A folder of pictures beside the plain loop of diffusers, one by one and in its best batch.

    python benchmarks/speed/sampling.py

Both draw the same pictures of pocket/sd, which is made sure of first, in the same steps with the same guidance, and
save them as PNG: ours as `generate` does, with manifest, hashes and sheet, the loop by calling the stock pipeline and
saving what it gives. The loop's best batch is found by trial of several. Without an accelerator it is processor time,
of which threads that work ahead take as much as others: what they save on the clock is not measured there. What
guidance inside the weights saves is what a call a step saves, whatever the weights. Writing is measured alone as well:
WebP without loss beside PNG. Writes ``benchmarks/results/speed_sampling.json`` and ``.md``.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from measure import ratios
from PIL import Image
from report import parser, row, write

from visiontune import load_model
from visiontune.core import Request
from visiontune.models.pipeline import own_generator
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.writer import write_image

ASSETS = Path(__file__).parents[2] / "visiontune" / "assets"
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "star")]
CFG = 4.0
BATCHES = (1, 2, 4, 8, 16)


def loop(pipe: Any, folder: Path, batch: int, seeds: int, steps: int) -> None:
    """Every prompt with every seed by the stock pipeline, in batches, saved as PNG."""
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in range(seeds)]
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        noise = [own_generator(Request(prompt=prompt, seed=seed)) for prompt, seed in some]
        drawn = pipe([p for p, _ in some], num_inference_steps=steps, guidance_scale=CFG, generator=noise).images
        for (prompt, seed), picture in zip(some, drawn, strict=True):
            picture.save(folder / f"{PROMPTS.index(prompt):05d}_seed{seed}.png")


def ours(model: Any, folder: Path, batch: int, seeds: int, steps: int, **options: Any) -> None:
    """The same by :func:`generate`, into a folder of its own each time."""
    out = Path(tempfile.mkdtemp(dir=folder))
    options = {"prompts": PROMPTS, "seeds": seeds, "steps": steps, "cfg_scale": CFG, "batch_size": batch, **options}
    generate(SampleConfig(out=str(out), device=str(model.device), **options), model)


def same(one: Path, other: Path) -> None:
    """Refuse a comparison of other pictures, but for rounding."""
    for file in sorted(one.glob("0*.png")):
        a, b = (np.asarray(Image.open(path), np.int64) for path in (file, other / file.name))
        if np.abs(a - b).max() > 2:
            raise SystemExit(f"{file.name} is another picture in the loop")


def measure(args: Any, folder: Path) -> Iterator[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model("pocket/sd", device=device)
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "pocket-sd", torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    plain = folder / "loop"
    plain.mkdir()
    seeds, steps = args.seeds, args.steps
    loops: dict[str, Callable[[], None]] = {
        f"loop, batch {batch}": lambda batch=batch: loop(pipe, plain, batch, seeds, steps) for batch in BATCHES
    }
    best = min((times := ratios(loops, "loop, batch 1", max(args.rounds // 3, 1))), key=lambda name: times[name])
    batch = int(best.rpartition(" ")[2])
    check = folder / "check"
    generate(
        SampleConfig(out=str(check), prompts=PROMPTS, seeds=seeds, steps=steps, cfg_scale=CFG, device=device), model
    )
    same(check, plain)
    taken = {
        "loop, batch 1": loops["loop, batch 1"],
        best: loops[best],
        "ours, batch 8": lambda: ours(model, folder, 8, seeds, steps),
        "ours, best batch": lambda: ours(model, folder, batch, seeds, steps),
        "ours, batch 8, one call": lambda: ours(model, folder, 8, seeds, steps, cfg_scale=1.0),
        "ours, batch 8, no threads": lambda: ours(model, folder, 8, seeds, steps, workers=0),
    }
    by_one = ratios(taken, "loop, batch 1", args.rounds)
    one_call = by_one["ours, batch 8, one call"] / by_one["ours, batch 8"]
    yield row(11, "sampling without guidance, as what has it inside is drawn / with it", one_call, 0.56)
    yield row(12, "sampling, batch 8 / loop of one by one", by_one["ours, batch 8"], 1 / 1.35)
    yield row(0, f"the loop's best batch ({batch}) / one by one", by_one[best])
    yield row(0, f"sampling, batch {batch} / the loop's best", by_one["ours, best batch"] / by_one[best])
    yield row(0, "sampling, batch 8, no threads / one by one", by_one["ours, batch 8, no threads"])
    yield from writing(folder, args.rounds)


def writing(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """PNG and lossless WebP of one busy picture of 512x512: smooth surfaces with edges and grain."""
    y, x = np.mgrid[:512, :512] / 512
    grain = np.random.default_rng(0).normal(0, 4, (512, 512, 3))
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(7 * x * y), np.sign(np.sin(20 * x) * np.cos(15 * y))], -1)
    picture = np.clip(128 + 80 * waves + grain, 0, 255).astype(np.uint8)
    files = {suffix: folder / f"a.{suffix}" for suffix in ("png", "webp")}
    taken = ratios({s: lambda f=f: write_image(f, picture) for s, f in files.items()}, "png", rounds)
    yield row(13, "time to write: lossless webp / png", taken["webp"], 0.2)
    yield row(13, "bytes: lossless webp / png", files["webp"].stat().st_size / files["png"].stat().st_size, 0.92)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=8, help=f"of each of {len(PROMPTS)} prompts")
    made.add_argument("--steps", type=int, default=12)
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        write("speed_sampling", args, measure(args, Path(folder)))


if __name__ == "__main__":
    main()
