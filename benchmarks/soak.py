"""Sampling and training under kills at random moments, against runs that were left alone.

    python benchmarks/soak.py                                      # 5,000 pictures, 20 kills of a training run
    python benchmarks/soak.py --pictures 60 --kills 3 --steps 30   # a look

Sampling: pictures of pocket/sd on several processes, killed by SIGKILL (one process or all of them, at a moment drawn
from the seed) and started again, each time on another number of processes, until the folder is finished. Afterwards
every file, the manifest among them, has to be that of an undisturbed run on one process, byte for byte. Training: LoRA
on the pictures of a subject, killed and gone on with by `train.resume=true`; then the adapter's tensors have to be
those of an undisturbed run, bit for bit. Everything computes with one thread: another number rounds otherwise.
Writes ``benchmarks/results/soak.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from visiontune.files import write_json, write_text
from visiontune.sampling.manifest import is_sheet

RESULTS = Path(__file__).parent / "results"
PROMPTS = [
    f"a {color} {shape}" for color in ("red", "blue", "green", "yellow") for shape in ("circle", "star", "square")
]
WAIT = 120.0  # seconds in which the processes of a run that lost one have to end


def environment() -> dict[str, str]:
    """One thread, and the package of this checkout."""
    root = str(Path(__file__).parents[1])
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }


def launch(words: Sequence[str], processes: int = 1) -> subprocess.Popen[bytes]:
    """A command of visiontune, in a session of its own, so that all its processes can be killed at once."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, "-m", "visiontune", *words], env=environment(), start_new_session=True, **quiet)


def alone(words: Sequence[str]) -> None:
    """Run a command to its end."""
    run = launch(words)
    _, said = run.communicate()
    if run.returncode:
        raise SystemExit(f"{' '.join(words)}: {said.decode()[-2000:]}")


def kill(run: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Kill all processes of a run, or one of several; its launcher then ends the others. Says which."""
    workers = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    one = bool(workers) and chance.random() < 0.5
    if one:
        chance.choice(workers).kill()
        try:
            run.wait(WAIT)
        except subprocess.TimeoutExpired:
            one = False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    return "one" if one else "all"


def moment(run: subprocess.Popen[bytes], works: Callable[[], int], chance: random.Random, most: float) -> None:
    """Wait for a moment to kill a run: in one of five cases while it starts, else after it has done something."""
    before = works()
    if chance.random() > 0.2:
        while run.poll() is None and works() == before:
            time.sleep(0.05)
    end = time.monotonic() + chance.uniform(0, most)
    while run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def soak_sampling(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(args.seed)
    seeds = -(-args.pictures // len(PROMPTS))
    words = ["sample", "device=cpu", f"prompts={PROMPTS}", f"seeds={seeds}", f"steps={args.sampling_steps}"]
    words += ["score=[oracle]", f"format={args.format}"]
    alone([*words, f"out={folder / 'undisturbed'}"])
    out = folder / "killed"
    killed: list[str] = []
    done: list[int] = []
    for processes in itertools.cycle([args.processes, *range(1, args.processes)]):
        run = launch([*words, f"out={out}"], processes)
        if len(killed) < args.most_kills:
            moment(run, lambda: pictures(out), chance, args.seconds)
        else:
            run.wait()
        if run.poll() == 0:
            run.communicate()
            break
        killed.append(kill(run, chance))
        done.append(pictures(out))
        print(f"killed {killed[-1]} of {processes} after {done[-1]} pictures", flush=True)
    left, held = ({f.name: f.read_bytes() for f in at.iterdir() if f.is_file()} for at in (folder / "undisturbed", out))
    left, held = ({name: data for name, data in one.items() if name != "index.html"} for one in (left, held))
    other = sorted(name for name in {*left, *held} if left.get(name) != held.get(name))
    return {
        "pictures": seeds * len(PROMPTS),
        "processes": args.processes,
        "format": args.format,
        "kills": len(killed),
        "of one process": killed.count("one"),
        "pictures at each kill": done,
        "files": len(left),
        "files that differ": other,
    }


def pictures(out: Path) -> int:
    """How many pictures, loose ones or shards, lie in a folder."""
    kinds = (".png", ".webp", ".jpg", ".tar")
    return sum(path.suffix in kinds and not is_sheet(path.name) for path in out.glob("*"))


def soak_training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance = random.Random(args.seed + 1)
    words = ["train", "personalise/lora", "data.root=pocket/bumble", "model=pocket/sd", "objective.prior=none"]
    words += ["preview.prompts=[]", "judge=none", f"train.steps={args.steps}", f"out={folder / 'runs'}"]
    words += [f"train.checkpoint_every={args.checkpoint_every}", "train.threads=1"]
    alone([*words, "name=undisturbed"])
    kills = 0
    home = folder / "runs" / "killed"
    while True:
        run = launch([*words, "name=killed", "train.resume=true"])
        if kills < args.kills:
            moment(run, lambda: logged(home), chance, args.seconds)
        else:
            run.wait()
        if run.poll() == 0:
            run.communicate()
            break
        if run.poll() is not None:
            raise SystemExit(run.communicate()[1].decode()[-2000:])
        kill(run, chance)
        kills += 1
        print(f"killed after {logged(home)} lines of the log", flush=True)
    a, b = (load_file(folder / "runs" / name / "adapter.safetensors") for name in ("undisturbed", "killed"))
    other = sorted(key for key in {*a, *b} if key not in a or key not in b or not torch.equal(a[key], b[key]))
    return {"steps": args.steps, "kills": kills, "tensors": len(a), "tensors that differ": other}


def logged(home: Path) -> int:
    """Lines that a training run has logged."""
    file = home / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def table(found: dict[str, dict[str, Any]]) -> str:
    """Both parts as Markdown."""
    lines = ["| what | size | kills | differs |", "|---|---|---|---|"]
    if sampling := found.get("sampling"):
        size = f"{sampling['pictures']} pictures ({sampling['format']}) on up to {sampling['processes']} processes"
        kills = f"{sampling['kills']}, {sampling['of one process']} of them of one process"
        differs = f"{len(sampling['files that differ'])} of {sampling['files']} files"
        lines.append(f"| sampling | {size} | {kills} | {differs} |")
    if training := found.get("training"):
        differs = f"{len(training['tensors that differ'])} of {training['tensors']} tensors"
        lines.append(f"| training | {training['steps']} steps | {training['kills']} | {differs} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000, help="about as many are drawn; 0 leaves sampling out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sampling-steps", type=int, default=10)
    parser.add_argument("--format", default="png", choices=["png", "webp", "jpg", "tar"])
    parser.add_argument(
        "--most-kills", type=int, default=1000, help="of the sampling run, after which it is left alone"
    )
    parser.add_argument("--kills", type=int, default=20, help="of the training run; 0 leaves training out")
    parser.add_argument("--steps", type=int, default=200, help="of the training run")
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="longest time between first work and a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            found["sampling"] = soak_sampling(args, Path(folder))
        if args.kills:
            found["training"] = soak_training(args, Path(folder))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "soak.json", found)
    write_text(args.out / "soak.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
