"""A subject put into boxes of other scenes: DreamCom and what it is made of, judged by the oracle.

    python benchmarks/evidence/dreamcom.py

The recipes of the catalogue on a subject and three seeds; their options were chosen on another subject and another seed
(``--tune NAME,train.lr=1e-3``). Each scene has another object, the subject's box is free ground, and the prompt names
the subject alone. `known`: the oracle recognises the subject in the box, in the picture pasted back outside of it.
`inside`: nothing of what the model drew in the box reaches out of it, before pasting. `background`: PSNR outside of the
box in dB, before pasting; after it the picture's own pixels are there.

Finished rows are kept beside the table. Writes ``dreamcom.json`` and ``dreamcom.md`` into ``benchmarks/results``, and
``samples/dreamcom.png`` of the first seed: scenes with their boxes, then the ways that were run, one a row.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import RESULTS, Kept, told
from PIL import Image

from visiontune import config
from visiontune.assemble import assemble
from visiontune.evaluation.metrics import psnr
from visiontune.files import write_json, write_text
from visiontune.guidance import inpaint
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.ops.pixels import shown as in_range
from visiontune.ops.pixels import to_tensor, to_uint8
from visiontune.pocket.holes import INSIDE, Box, box_around, mask_of, standing, stream
from visiontune.pocket.oracle import read, recognise_object
from visiontune.pocket.world import SUBJECTS, Scene, render
from visiontune.sampling.pipeline import images
from visiontune.sampling.shown import Shown

SAMPLE = Path(__file__).parents[2] / "samples/dreamcom.png"
SUBJECT, SEEDS = "bumble", (0, 1, 2)
TUNING = ("mallow", 7)
SCENES_SEED, STEPS, CFG_SCALE, SHOWN = 83, 12, 3.0, 8
QUIET = ["preview.prompts=[]", "preview.samples=0", "judge=none", "train.precision=bf16"]
BOOTH = [
    "objective=dreambooth",
    "objective.prior=none",
    "objective.snr_gamma=5.0",
    "data.box=false",
    "data.box_jitter=0",
]
# Recipe and options; None is a model that was not trained.
WAYS: dict[str, tuple[str, list[str]] | None] = {
    "DreamCom": ("compose/dreamcom", []),
    "DreamCom, words confined": ("compose/dreamcom", ["objective.confine_words=true"]),
    "DreamBooth on pocket-inpaint": ("compose/dreamcom", BOOTH),
    "DreamBooth on pocket-sd, guidance inpaint": ("personalise/lora", []),
    "pocket-inpaint": None,
}

Scores = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A scene, the box that the subject is to stand in, and the scene with it."""

    before: Scene
    box: Box
    after: Scene

    @property
    def shown(self) -> Shown:
        """As a model that paints is shown it."""
        return Shown(
            pictures=(Image.fromarray(render(self.before)),), mask=Image.fromarray(mask_of(self.box)).convert("L")
        )


def places(subject: str, count: int) -> list[Place]:
    """Scenes of two held-out objects, of which a large one has left its place to the subject."""
    found = []
    for i, hole in enumerate(stream(SCENES_SEED, ["thing"], holdout=True, patterns=0.0)):
        thing = hole.thing
        if len(hole.scene.things) != 2 or thing is None or thing.size != "large":
            continue
        own = SUBJECTS[subject].thing(thing.x, thing.y, thing.radius)
        others = tuple(one for one in hole.scene.things if one is not thing)
        before, after = (replace(hole.scene, things=things, relation=None) for things in (others, (*others, own)))
        found.append(Place(before, box_around(own, np.random.default_rng([SCENES_SEED, i])), after))
        if len(found) == count:
            return found


def judged(pictures: Sequence[np.ndarray], given: Sequence[Place], subject: str) -> Scores:
    """The scores of one picture for each place; no `background` where it is the scene's own."""
    rows = []
    for picture, place in zip(pictures, given, strict=True):
        mask = mask_of(place.box)
        pasted = place.shown.pasted(picture)
        known = [recognise_object(pasted, one) == subject for one in standing(pasted, place.box)]
        shares = [(one.mask & mask).sum() / one.mask.sum() for one in read(picture)]
        reaching = [share for share in shares if share > 1 - INSIDE]
        inside = bool(reaching) and min(reaching) >= INSIDE
        rows.append((any(known), inside, psnr(picture[~mask], render(place.before)[~mask])))
    known_share, inside_share, background = np.mean(rows, 0).round(3).tolist()
    apart = background if np.isfinite(background) else None
    return {"known": known_share, "inside": inside_share, "background": apart}


def drawn(model: Any, prompt: str, given: Sequence[Place], seed: int) -> list[np.ndarray]:
    """What a model draws into each place."""
    found = []
    for i, place in enumerate(given):
        options: dict[str, Any] = {"shown": place.shown}
        if not model.paints:
            picture = place.shown.pictures[0]
            options = {"guidance": GuidanceStack([inpaint.Config(picture=picture, mask=list(place.box))])}
        found += list(images(model, prompt, 1000 * seed + i, steps=STEPS, cfg_scale=CFG_SCALE, **options))
    return found


def trained(recipe: str, options: Sequence[str], subject: str, seed: int, folder: Path) -> Any:
    """The model that a recipe makes of a subject."""
    own = [f"out={folder}", f"name={recipe.partition('/')[2]}", f"seed={seed}", f"data.root=pocket/{subject}"]
    run = config.load_run(recipe, [*own, *QUIET, *options])
    shutil.rmtree(run.folder, ignore_errors=True)
    trainer = assemble(run)
    trainer.fit()
    shutil.rmtree(run.folder, ignore_errors=True)
    if trainer.adapters is not None:
        trainer.adapters.eval()
    return trainer.model


def row(way: str, subject: str, seed: int, args: argparse.Namespace, more: Sequence[str] = ()) -> Scores:
    """Scores of one way, trained and drawn with one seed, and the pictures that are shown as lists."""
    given, asked = places(subject, args.scenes), WAYS[way]
    prompt = f"a photo of a sks {SUBJECTS[subject].shape}"
    model = load("pocket/inpaint") if asked is None else trained(asked[0], [*asked[1], *more], subject, seed, args.work)
    pictures = drawn(model, prompt, given, seed)
    file = args.work / f"{way}-{subject}-{seed}.png"
    Image.fromarray(np.concatenate([p.shown.pasted(q) for p, q in zip(given[:SHOWN], pictures, strict=False)], 1)).save(
        file
    )
    return judged(pictures, given, subject)


def bounds(args: argparse.Namespace) -> dict[str, Scores]:
    """What is right, what the VAE leaves of it, and what would be had without knowing the subject."""
    given = places(SUBJECT, args.scenes)
    truth = [render(place.after) for place in given]
    model: Any = load("pocket/inpaint")
    with torch.no_grad():
        pixels = to_tensor(np.stack(truth)) * 2 - 1
        coded = list(to_uint8(in_range(model.decode(model.encode(pixels, sample=False)))))
    plain = [
        render(replace(p.after, things=(*p.before.things, replace(p.after.things[-1], pattern="solid", accent=""))))
        for p in given
    ]
    return {
        "truth": judged(truth, given, SUBJECT),
        "truth through the VAE": judged(coded, given, SUBJECT),
        "its shape in its first colour": judged(plain, given, SUBJECT),
        "the scene as it was": judged([render(place.before) for place in given], given, SUBJECT),
    }


def sheet(args: argparse.Namespace, ways: Sequence[str]) -> Image.Image:
    """Scenes with their boxes, and below them what the ways made of them with the first seed."""
    given = places(SUBJECT, args.scenes)[:SHOWN]
    top = np.concatenate([np.asarray(place.shown.seen()) for place in given], 1)
    files = [args.work / f"{way}-{SUBJECT}-{SEEDS[0]}.png" for way in ways]
    rows = [top, *(np.asarray(Image.open(file)) for file in files if file.is_file())]
    whole = Image.fromarray(np.concatenate(rows))
    return whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST)


def table(rows: dict[str, list[Scores]]) -> str:
    """Means over seeds, and how many there are."""
    lines = ["| | known (each seed) | inside | background, dB | seeds |", "|---|---|---|---|---|"]
    for name, found in rows.items():
        known, inside = (np.mean([one[key] for one in found]) for key in ("known", "inside"))
        apart = [one["background"] for one in found if one["background"] is not None]
        background = f"{np.mean(apart):.1f}" if apart else "equal"
        each = ", ".join(f"{one['known']:.2f}" for one in found)
        lines.append(f"| {name} | {known:.2f} ({each}) | {inside:.2f} | {background} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/dreamcom"))
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only run these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    parser.add_argument("--tune", nargs="+", metavar="NAME[,OVERRIDE]", help="try options on the tuning subject only")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for trial in args.tune or ():
        name, *options = trial.split(",")
        make = partial(row, "DreamCom", *TUNING, args, options)
        Kept("dreamcom_tuning").row(name, [told("compose/dreamcom", options), args.scenes], make)
    if args.tune:
        return
    kept, rows = Kept("dreamcom"), {name: [found] for name, found in bounds(args).items()}
    for seed in SEEDS:
        for way, asked in WAYS.items():
            of = [told(*asked) if asked else None, args.scenes, STEPS, CFG_SCALE]
            name, wanted = f"{way}-{SUBJECT}-{seed}", way in args.ways and seed in args.seeds
            found = kept.row(name, of, partial(row, way, SUBJECT, seed, args)) if wanted else kept.find(name, of)
            rows[way] = [*rows.get(way, []), *([found] if found else [])]
    rows = {way: found for way, found in rows.items() if found}
    write_json(RESULTS / "dreamcom.json", {"scenes": args.scenes, "steps": STEPS, "cfg_scale": CFG_SCALE, "rows": rows})
    write_text(
        RESULTS / "dreamcom.md",
        f"# A subject in boxes\n\n{SUBJECT} in {args.scenes} scenes, {STEPS} steps, cfg_scale {CFG_SCALE:g}; see "
        f"`benchmarks/evidence/dreamcom.py`.\n\n{table(rows)}\n",
    )
    sheet(args, list(WAYS)).save(SAMPLE)
    print(table(rows))


if __name__ == "__main__":
    main()
