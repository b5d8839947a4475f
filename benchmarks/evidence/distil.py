"""Guidance distilled into an adapter of pocket-sd: the student in one call a step beside its teacher in two.

    python benchmarks/evidence/distil.py
    python benchmarks/evidence/distil.py --front QUALITY DIVERSITY

The recipe ``distil/cfg`` as it is, three training seeds, and the same with the student's own states. Held-out prompts
of one, two and three objects, 25 DDIM steps; the oracle says how many come right. KID is the unbiased squared distance
of pocket-clip's features, with the usual cubic kernel, to as many pictures that the world itself draws of the same
prompts; diversity is that of four seeds of a prompt. Beside the student: the base without guidance, the teacher in as
many steps, and in as many calls. Adapters are kept in ``--work`` and finished rows beside the table, so the command
goes on where it stopped. Writes ``distil.json`` and ``distil.md`` into ``benchmarks/results/``.

``--front`` takes two finished adapters, one distilled alone (``distil/diverse`` with ``objective.beta=0``) and one for
pictures that differ, and measures mixtures of their changes; it writes ``distil_front.json`` and ``distil_front.md``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, Kept, told
from personalise import spread

from visiontune import adapters, config
from visiontune.assemble import assemble
from visiontune.evaluation.metrics import image_features, prompt_accuracy
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.models.clip import load_clip
from visiontune.ops.mmd import squared_mmd
from visiontune.pocket.scenes import stream
from visiontune.pocket.world import render
from visiontune.sampling.pipeline import images
from visiontune.training.measures import diversity
from visiontune.weights.mixing import mixed

STEPS, SEEDS = 25, (0, 1, 2)
PROMPTS = {"one": 60, "two": 100, "three": 60}
STUDENTS: dict[str, list[str]] = {"student": [], "student, own states": ["objective.states=student"]}
# Calls of the network for a picture: scale, steps.
TEACHERS = {
    "base without guidance": (1.0, STEPS),
    "teacher, as many steps": (4.0, STEPS),
    "teacher, as many calls": (4.0, STEPS // 2),
}
SCORES = (*PROMPTS, "kid", "diversity")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@functools.cache
def held_out(kind: str) -> tuple[list[str], np.ndarray]:
    """Prompts, and pictures that the world draws of them."""
    found = list(itertools.islice(stream(80, kind, holdout=True), PROMPTS[kind]))
    return [text for _, text in found], np.stack([render(scene) for scene, _ in found])


def measure(model: Any, scale: float, steps: int, seed: int) -> dict[str, float]:
    """Scores of a way to draw."""
    row: dict[str, float] = {"calls": steps * (1 if scale == 1 else 2)}
    drawing: dict[str, Any] = {"steps": steps, "cfg_scale": scale, "batch_size": 60}
    drawn, true = [], []
    for kind in PROMPTS:
        prompts, real = held_out(kind)
        pictures = images(model, prompts, [1000 * seed + i for i in range(len(prompts))], **drawing)
        row[kind] = prompt_accuracy(pictures, prompts)
        drawn.append(pictures)
        true.append(real)
    clip = load_clip("pocket/clip")
    row["kid"] = float(squared_mmd(*(image_features(np.concatenate(part), clip) for part in (drawn, true))))
    few = [(prompt, 1000 * seed + i) for kind in PROMPTS for prompt in held_out(kind)[0][:4] for i in range(4)]
    seen = images(model, *map(list, zip(*few, strict=True)), **drawing)
    row["diversity"] = diversity(seen.reshape(-1, 4, *seen.shape[1:]))
    return row


def front(quality: Path, diverse: Path, shares: Sequence[float] = SHARES) -> dict[str, list[dict[str, float]]]:
    """Scores of the mixtures of two adapters, by the share of the second; one call a step."""
    model = load("pocket/sd")
    networks = model.networks()
    sets = [adapters.load(networks, file, name=file.parent.name + str(i)) for i, file in enumerate((quality, diverse))]
    found = {}
    for share in shares:
        made = mixed(networks, sets, [1 - share, share])
        for one in sets:
            one.enabled = False
        found[f"{share:g} of the second"] = [measure(model, 1.0, STEPS, 0)]
        made.detach()
        for one in sets:
            one.enabled = True
    return found


def trained(name: str, seed: int, work: Path) -> Path:
    """The adapter of a run of the recipe."""
    own = [f"out={work}", f"name={name.replace(' ', '_')}-{seed}", f"seed={seed}", "preview.prompts=[]"]
    run = config.load_run("distil/cfg", [*own, *STUDENTS[name]])
    file = run.folder / "adapter.safetensors"
    if not file.exists():
        assemble(config.load_run("distil/cfg", [*own, *STUDENTS[name], "train.resume=auto"])).fit()
    return file


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One way to draw a line."""
    head = ["drawn by", "calls", "runs", *(f"{kind} right" for kind in PROMPTS), "KID to the world", "diversity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, rows in found.items():
        cells = [name, f"{rows[0]['calls']:.0f}", str(len(rows))]
        lines.append("| " + " | ".join(cells + [spread([row[s] for row in rows]) for s in SCORES]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/distil"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--front", nargs=2, type=Path, metavar=("QUALITY", "DIVERSITY"), help="adapter files")
    args = parser.parse_args()
    if args.front:
        points = front(*args.front)
        write_json(args.out / "distil_front.json", points)
        write_text(args.out / "distil_front.md", table(points))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    model, found, kept = load("pocket/sd"), dict[str, list[dict[str, float]]](), Kept("distil")

    def drawn(name: str, seed: int) -> dict[str, float]:
        if name in TEACHERS:
            return measure(model, *TEACHERS[name], seed)
        student = adapters.load(model.networks(), trained(name, seed, args.work))
        row = measure(model, 1.0, STEPS, seed)
        student.detach()
        return row

    for seed, name in itertools.product(SEEDS, (*TEACHERS, *STUDENTS)):
        of = TEACHERS[name] if name in TEACHERS else told("distil/cfg", STUDENTS[name])
        row = kept.row(f"{name}, {seed}", [of, PROMPTS], functools.partial(drawn, name, seed))
        found.setdefault(name, []).append(row)
        write_json(args.out / "distil.json", found)
        write_text(args.out / "distil.md", table(found))


if __name__ == "__main__":
    main()
