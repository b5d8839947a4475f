"""Subjects that a run of sets never saw, drawn from the pictures that are shown: JeDi, judged by the oracle.

    python benchmarks/evidence/jedi.py RUN --sheet sheet.png

RUN is the folder of a finished run of ``compose/jedi``. Each subject of the pocket world, none of which is in
``pocket/sets``, is drawn on a ground that the prompt names beside its shape: with two pictures of it as references,
with none, and with two of another subject. `known`: the oracle recognises the subject. `likeness`: how much the object
that is most like it is, in [0, 1]. `ground`: the ground is as asked. `error`: of a new picture's x_0, as predicted at
one timestep of its noisy latents, as a share of that without references.

Writes ``jedi.json`` and ``jedi.md`` into ``benchmarks/results``, and a sheet if asked: for each subject references,
and then what is drawn in each way.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import RESULTS
from PIL import Image

from visiontune import adapters
from visiontune.core import Request
from visiontune.files import write_json, write_text
from visiontune.models import load
from visiontune.ops.pixels import to_tensor, to_uint8
from visiontune.pocket.oracle import ground_of, recognise, subject_fidelity
from visiontune.pocket.scenes import article, subject_scene
from visiontune.pocket.world import SUBJECTS, TEXTURES, TONES, render
from visiontune.sampling.sources import adapter_file

WAYS = ("its own references", "no references", "references of another subject")
SEED, REFERENCES, STEPS, CFG_SCALE = 91, 2, 12, 3.0
LEVELS = (500, 600, 700, 800)

Pictures = tuple[Image.Image, ...]


def shown(way: int, number: int, rng: np.random.Generator) -> Pictures:
    """The references of a way to draw a subject."""
    if WAYS[way] == "no references":
        return ()
    subject = [*SUBJECTS.values()][(number + (way == 2)) % len(SUBJECTS)]
    return tuple(Image.fromarray(render(subject_scene(subject, rng))) for _ in range(REFERENCES))


def drawn(
    model: Any, way: int, number: int, count: int
) -> tuple[list[Pictures], list[np.ndarray], list[tuple[str, str]]]:
    """References, pictures and the grounds that were asked for, of one subject."""
    subject = [*SUBJECTS.values()][number]
    rngs = [np.random.default_rng([SEED, number, i]) for i in range(count)]
    grounds = [([*TONES][rng.integers(2)], TEXTURES[rng.integers(4)]) for rng in rngs]
    given = [shown(way, number, rng) for rng in rngs]
    asked = [
        Request(
            prompt=f"a photo of {article(subject.shape)} on a {tone} {texture} background",
            seed=1000 * number + i,
            pictures=given[i],
        )
        for i, (tone, texture) in enumerate(grounds)
    ]
    pictures = to_uint8(
        torch.from_numpy(model.draw(asked, steps=STEPS, guidance=model.guidance(CFG_SCALE))).movedim(-1, 1)
    )
    return given, list(pictures), grounds


def scores(model: Any, way: int, count: int) -> dict[str, float]:
    """Means over subjects and their pictures."""
    rows = []
    for number, (name, subject) in enumerate(SUBJECTS.items()):
        _, pictures, grounds = drawn(model, way, number, count)
        rows += [
            (recognise(p) == name, subject_fidelity(p, subject), ground_of(p) == g)
            for p, g in zip(pictures, grounds, strict=True)
        ]
    return dict(zip(("known", "likeness", "ground"), np.mean(rows, 0).round(3).tolist(), strict=True))


@torch.no_grad()
def errors(model: Any, sets: int = 4) -> dict[str, dict[int, float]]:
    """Squared errors of x_0 of the new pictures at each timestep, of each way."""
    size = REFERENCES + 1
    scenes = [
        [subject_scene(subject, np.random.default_rng([SEED, number, i, k])) for k in range(size)]
        for number, subject in enumerate(SUBJECTS.values())
        for i in range(sets)
    ]
    # Those of another subject are those of the next one's sets.
    other = [[own[0], *scenes[(i + sets) % len(scenes)][1:]] for i, own in enumerate(scenes)]
    found: dict[str, dict[int, float]] = {}
    for way, given, sizes in zip(WAYS, (scenes, scenes, other), ((size,), (1,), (size,)), strict=True):
        pixels = to_tensor(np.stack([render(scene) for one in given for scene in one])) * 2 - 1
        x_0, words = model.encode(pixels, sample=False), []
        for one in given:
            new = one[0]
            words += [f"a photo of {article(new.things[0].shape)} on a {new.tone} {new.texture} background"]
            words += [""] * REFERENCES
        clear = torch.zeros(len(x_0), 1, *pixels.shape[2:])
        channels = model.channels(x_0, clear)
        channels[::size] = model.painted_whole(x_0.shape[1:])
        cond = replace(model.embed(words), extra={"channels": channels})
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(SEED))
        found[way] = {}
        for level in LEVELS:
            t = torch.full((len(x_0),), level)
            x_t = model.schedule.add_noise(x_0, eps, t)
            with model.couple().of(sizes):
                clean = model.schedule.to_x_0(model.predict(x_t, t, cond), x_t, t)
            found[way][level] = float((clean - x_0)[::size].square().mean())
    return found


def sheet(model: Any, rows: int = 3) -> Image.Image:
    """For each subject of the first picture: a reference, and the pictures of each way, one a column."""
    lines = []
    for number in range(len(SUBJECTS)):
        parts = [drawn(model, way, number, rows) for way in range(len(WAYS))]
        first = [np.asarray(given[0]) for given in parts[0][0]]
        lines.append(np.concatenate([*first, *(p for _, pictures, _ in parts for p in pictures)], 1))
    whole = Image.fromarray(np.concatenate(lines))
    return whole.resize((3 * whole.width // 2, 3 * whole.height // 2), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run, or its adapter")
    parser.add_argument("--sheet", type=Path, help="a picture to write")
    parser.add_argument("--count", type=int, default=8, help="pictures of each subject and way")
    args = parser.parse_args()
    model: Any = load("pocket/inpaint")
    model.couple()
    adapters.load(model.networks(), adapter_file(args.run)).eval()
    measured = errors(model)
    shares = {way: {t: round(e / measured[WAYS[1]][t], 3) for t, e in found.items()} for way, found in measured.items()}
    table = {way: scores(model, i, args.count) for i, way in enumerate(WAYS)}
    heads = " | ".join(f"error at {t}" for t in LEVELS)
    lines = [
        f"| | known | likeness | ground | {heads} |",
        "|---" * (4 + len(LEVELS)) + "|",
    ]
    for way, row in table.items():
        cells = [f"{row[key]:.2f}" for key in ("known", "likeness", "ground")] + [
            f"{s:.2f}" for s in shares[way].values()
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    told = {"count": args.count, "references": REFERENCES, "steps": STEPS, "cfg_scale": CFG_SCALE}
    write_json(RESULTS / "jedi.json", {**told, "rows": table, "errors": measured})
    write_text(
        RESULTS / "jedi.md",
        f"# Subjects that were never seen, from {REFERENCES} pictures\n\n{args.count} pictures of each of "
        f"{len(SUBJECTS)} subjects, {STEPS} steps, cfg_scale {CFG_SCALE:g}; see `benchmarks/evidence/jedi.py`.\n\n"
        + "\n".join(lines)
        + "\n",
    )
    if args.sheet:
        sheet(model).save(args.sheet)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
