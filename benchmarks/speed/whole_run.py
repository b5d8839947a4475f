"""Whole LoRA runs beside diffusers' own script for DreamBooth, from the start of the process to its end.

    python benchmarks/speed/whole_run.py --example diffusers/examples/dreambooth/train_dreambooth_lora.py

Both train LoRA of rank 8 on the attention of the denoiser of pocket/sd for 100 steps, on four pictures in batches of
four, without a prior, previews or a judge. The script encodes its prompt once, by its own option, and the pictures at
every step. Measured is processor time, of one thread, of the process and its children; runs take turns, and a ratio is
the median over rounds. What a step costs is the difference between a long and a short run, so that starting and saving
fall out of it; from the script's the time of the VAE, measured apart, is taken off too. Writes
``benchmarks/results/speed_whole_run.json`` and ``.md``.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from report import parser, row, write

from visiontune.data.base import Config
from visiontune.data.readers import read

ASSETS = Path(__file__).parents[2] / "visiontune" / "assets"
PROMPT = "a photo of a sks circle"
LONG, SHORT, BATCH = 100, 20, 4
PICTURES, CHECKPOINTS = 4, 10
IMPORTS = "from diffusers import StableDiffusionPipeline"  # which nothing that opens the model does without


# ---------------------------------------------------------------------------------------------------- the runs


def prepare(folder: Path) -> None:
    """The model and four pictures as both sides read them."""
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "pocket-sd", torch_dtype=torch.float32)
    pipe.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for i, sample in enumerate(read(Config(root="pocket/bumble"))[:BATCH]):
        sample.sources["image"].open().save(folder / "pictures" / f"{i}.png")


def ours(folder: Path, steps: int, *options: str, out: Path | None = None) -> float:
    """Seconds of a run of ours; ``out`` is a folder with filled caches."""
    out = out or Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "visiontune", "train", "personalise/lora", f"model={folder / 'model'}"]
    command += ["train.threads=1", f"data.root={folder / 'pictures'}", f"data.prompt={PROMPT}", f"out={out}"]
    command += ["adapter.targets=attention", "train.parts=[denoiser]", "objective.prior=none"]
    command += ["preview.prompts=[]", f"train.checkpoint_every={10 * LONG}"]
    return seconds([*command, f"train.steps={steps}", f"train.batch_size={BATCH}", *options], folder)


def theirs(folder: Path, steps: int, example: Path) -> float:
    """Seconds of a run of the script."""
    command = [sys.executable, str(example), f"--pretrained_model_name_or_path={folder / 'model'}"]
    command += [f"--instance_data_dir={folder / 'pictures'}", f"--instance_prompt={PROMPT}", "--resolution=64"]
    command += [f"--train_batch_size={BATCH}", f"--max_train_steps={steps}", "--rank=8", "--learning_rate=1e-4"]
    command += ["--pre_compute_text_embeddings", "--seed=0", f"--output_dir={tempfile.mkdtemp(dir=folder)}"]
    return seconds(command, folder)


def seconds(command: list[str], folder: Path) -> float:
    """Processor time of a command and its children, on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def encoding(folder: Path) -> float:
    """Seconds in which the script encodes the pictures of a step."""
    vae = AutoencoderKL.from_pretrained(folder / "model", subfolder="vae")
    pictures, times = torch.randn(BATCH, 3, 64, 64), []
    for _ in range(20):
        start = time.process_time()
        with torch.no_grad():
            vae.encode(pictures).latent_dist.sample()
        times.append(time.process_time() - start)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------- the table


def measured(folder: Path, example: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every kind of run, one of each a round."""
    often = f"train.checkpoint_every={SHORT // CHECKPOINTS}"
    preview = [f"preview.prompts=[{PROMPT}]", f"preview.seeds={list(range(PICTURES))}"]
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        out = folder / f"caches {number}"
        runs: dict[str, Callable[[], float]] = {
            "ours": lambda: ours(folder, LONG),
            "theirs": lambda: theirs(folder, LONG, example),
            "ours, short": lambda: ours(folder, SHORT),
            "theirs, short": lambda: theirs(folder, SHORT, example),
            "checkpoints": lambda: ours(folder, SHORT, often),
            "one step": lambda out=out: ours(folder, 1, out=out),
            "cached": lambda out=out: ours(folder, 1, "name=cached", out=out),
            "preview": lambda out=out: ours(folder, 1, "name=preview", *preview, out=out),
            "imports": lambda: seconds([sys.executable, "-c", IMPORTS], folder),
            "encoding": lambda: encoding(folder),
        }
        for name, run in runs.items():
            times.setdefault(name, []).append(run())
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def rows(times: dict[str, list[float]]) -> Iterator[dict]:
    """The table of what was measured."""

    def median(value: Callable[..., float], *names: str) -> float:
        return statistics.median(value(*found) for found in zip(*(times[n] for n in names), strict=True))

    def step(long: float, short: float) -> float:
        return (long - short) / (LONG - SHORT)

    whole = median(lambda a, b: a / b, "ours", "theirs")
    yield row(14, f"run of {LONG} steps / the script's, from start to end", whole, 0.6)
    names = "ours", "ours, short", "theirs", "theirs, short", "encoding"
    value = median(lambda a, b, c, d, vae: step(a, b) / (step(c, d) - vae), *names)
    yield row(15, "step / the script's without its VAE", value, 0.8)
    yield row(15, "step / the script's with its VAE", median(lambda a, b, c, d: step(a, b) / step(c, d), *names[:4]))
    yield row(0, "seconds of a run", median(float, "ours"))
    yield row(0, "seconds of a run of the script", median(float, "theirs"))
    yield row(0, "seconds of a step", median(step, "ours", "ours, short"))
    yield row(0, "seconds of a step of the script", median(step, "theirs", "theirs, short"))
    yield row(0, "seconds of a run of one step, from start to end", median(float, "one step"))
    yield row(0, "seconds of importing the model's pipeline, of diffusers, alone", median(float, "imports"))
    yield row(0, "seconds that filling the caches takes of it", median(lambda a, b: a - b, "one step", "cached"))
    each = median(lambda a, b: (a - b) / CHECKPOINTS, "checkpoints", "ours, short")
    yield row(0, "seconds of a checkpoint", each)
    yield row(0, f"seconds of a preview of {PICTURES} pictures", median(lambda a, b: a - b, "preview", "cached"))


def main() -> None:
    """Measure and write the table."""
    options = parser(__doc__, rounds=2)
    options.add_argument("--example", type=Path, required=True, help="diffusers' train_dreambooth_lora.py")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        write("speed_whole_run", args, rows(measured(folder, args.example.resolve(), args.rounds)))


if __name__ == "__main__":
    main()
