"""Measure the pocket world's oracle and the shipped pocket models against their bars.

    python benchmarks/pocket.py
    python benchmarks/pocket.py --only pocket-clip   # the other rows stay as they were measured

Writes ``benchmarks/results/pocket.json`` and ``pocket.md``. Seeds and prompts are fixed; no prompt was trained on.

The rows of pocket-clip say beside its score what judges without a sense would have: see ``evaluation/attributes.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from visiontune.core import Request
from visiontune.evaluation.attributes import JUDGES, audit
from visiontune.evaluation.metrics import psnr
from visiontune.guidance import control, inpaint
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.models.clip import load_clip
from visiontune.models.diffusion import DiffusionModel
from visiontune.models.expand import expand_input
from visiontune.pocket import oracle
from visiontune.pocket.controls import MAPS, followed
from visiontune.pocket.holes import Hole, filled, mask_of
from visiontune.pocket.holes import stream as stream_holes
from visiontune.pocket.scenes import stream, subject_scene
from visiontune.pocket.world import SUBJECTS, render
from visiontune.sampling.generate import images
from visiontune.sampling.shown import Shown

RESULTS = Path(__file__).parent / "results"
KINDS = ("one", "two", "many", "three")
FEWER = 200  # prompts of the kinds that no bar is set for
FEWEST = 24  # of controls, whose pictures are drawn one by one
FEWEST_HOLES = 48
CFG_SCALE = 4.0
Codec = Callable[[np.ndarray], np.ndarray]


def codec(model: DiffusionModel) -> Codec:
    """VAE round trip of ``uint8 [n, 64, 64, 3]``."""

    def round_trip(pictures: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            parts = [model.decode(model.encode(part)) for part in x.split(100)]
        y = torch.cat(parts).clamp(-1, 1).add(1).mul(127.5).round()
        return y.permute(0, 2, 3, 1).byte().numpy()

    return round_trip


def oracle_rows(through: Codec, n: int) -> Iterator[dict]:
    """Oracle accuracy on ground truth and after the VAE: captions of each kind, then subject identity."""
    for kind in KINDS:
        pairs = list(itertools.islice(stream(900, kind), n))
        pictures = np.stack([render(scene) for scene, _ in pairs])
        for name, seen in (("ground truth", pictures), ("after the VAE", through(pictures))):
            right = [oracle.matches(image, text) for image, (_, text) in zip(seen, pairs, strict=True)]
            yield {"what": f"oracle reads '{kind}', {name}", "value": float(np.mean(right)), "n": n}
    rng = np.random.default_rng(901)
    names = [name for name in SUBJECTS for _ in range(n // len(SUBJECTS))]
    pictures = np.stack([render(subject_scene(SUBJECTS[name], rng)) for name in names])
    for label, seen in (("ground truth", pictures), ("after the VAE", through(pictures))):
        right = [oracle.recognise(image) == name for image, name in zip(seen, names, strict=True)]
        yield {"what": f"oracle knows the subject, {label}", "value": float(np.mean(right)), "n": len(names)}


def sampling_rows(name: str, n: int) -> Iterator[dict]:
    """Prompt accuracy of a model with and without classifier-free guidance, in 25 steps of its own sampler."""
    model = load(f"pocket/{name.removeprefix('pocket-')}")
    for cfg_scale, kinds in ((CFG_SCALE, KINDS), (1.0, ("one", "two"))):
        for kind in kinds:
            count = n if kind in ("one", "two") else min(n, FEWER)
            prompts = [text for _, text in itertools.islice(stream(902, kind, holdout=True), count)]
            # Short captions repeat; a seed each keeps their pictures apart.
            pictures = images(model, prompts, range(count), steps=25, cfg_scale=cfg_scale, batch_size=50)
            right = [oracle.matches(image, text) for image, text in zip(pictures, prompts, strict=True)]
            yield {"what": f"{name} draws '{kind}', cfg {cfg_scale:g}", "value": float(np.mean(right)), "n": count}


def vae_rows(through: Codec, n: int) -> Iterator[dict]:
    """The error of a VAE round trip."""
    pictures = np.stack([render(scene) for scene, _ in itertools.islice(stream(904), n)])
    yield {"what": "VAE round trip, PSNR in dB", "value": psnr(through(pictures), pictures), "n": n}


def clip_rows(n: int) -> Iterator[dict]:
    """What pocket-clip can tell apart, one attribute a row, beside what judges that lack a sense would score."""
    for row in audit(load_clip("pocket/clip"), n):
        yield {**row, "what": f"pocket-clip: {row['what']}"}


def control_rows(n: int) -> Iterator[dict]:
    """Objects of held-out scenes in their place, drawn in 12 steps without words, with a control and without one."""
    model, count = load("pocket/sd"), min(n, FEWEST)
    scenes = [scene for scene, _ in itertools.islice(stream(905, holdout=True), count)]
    for name, of_picture in {"nothing": None, **MAPS}.items():
        hits = []
        for seed, scene in enumerate(scenes):
            terms = []
            if of_picture is not None:
                shown = Image.fromarray(of_picture(render(scene)))
                terms = [control.Config(net=f"pocket/{name}", picture=shown)]
            picture = model.draw([Request(prompt="", seed=seed)], steps=12, guidance=GuidanceStack(terms))[0]
            hits.append(followed((picture * 255).round().astype(np.uint8), scene))
        for what in ("shape", "color"):
            value = float(np.mean([hit[what] for hit in hits]))
            yield {"what": f"pocket-controls, {name}: objects in place with their {what}", "value": value, "n": count}


def inpaint_rows(n: int) -> Iterator[dict]:
    """Held-out holes filled with the thing that was there, in 12 steps, beside what the numbers are worth."""
    count = min(n, FEWEST_HOLES)
    holes = list(itertools.islice(stream_holes(906, ["thing"], holdout=True, patterns=0.0), count))
    truth = np.stack([render(hole.scene) for hole in holes])
    ways: dict[str, Callable[[], np.ndarray]] = {
        "the truth through the VAE": lambda: codec(load("pocket/sd"))(truth),
        "another hole's scene": lambda: np.roll(truth, 1, axis=0),
        "pocket-sd guided by inpaint": lambda: _painted(load("pocket/sd"), holes),
        "its channels untrained": lambda: _painted(expand_input(load("pocket/sd"), "paint"), holes),
        "the model": lambda: _painted(load("pocket/inpaint"), holes),
    }
    for way, make in ways.items():
        pictures = make()
        pasted = [_shown(hole).pasted(picture) for hole, picture in zip(holes, pictures, strict=True)]
        right = [filled(picture, hole) for hole, picture in zip(holes, pasted, strict=True)]
        yield {"what": f"pocket-inpaint: {way}, holes filled", "value": float(np.mean(right)), "n": count}
        # Over all of them at once: a mean of dB is made by scenes that have nothing but ground there.
        kept = np.stack([~mask_of(hole.box) for hole in holes])
        yield {
            "what": f"pocket-inpaint: {way}, PSNR outside in dB",
            "value": psnr(pictures[kept], truth[kept]),
            "n": count,
        }


def _shown(hole: Hole) -> Shown:
    picture, mask = Image.fromarray(render(hole.scene)), Image.fromarray(mask_of(hole.box))
    return Shown(pictures=(picture,), mask=mask.convert("L"))


def _painted(model: DiffusionModel, holes: list[Hole]) -> np.ndarray:
    """What a model that paints makes of each hole, or one that does not, guided."""
    found = []
    for seed, hole in enumerate(holes):
        shown = _shown(hole)
        options: dict = {"shown": shown}
        if not model.paints:
            term = inpaint.Config(picture=shown.pictures[0], mask=list(hole.box))
            options = {"guidance": GuidanceStack([term])}
        found.append(images(model, hole.prompt, seed, steps=12, cfg_scale=3.0, **options)[0])
    return np.stack(found)


PARTS: dict[str, Callable[[int], Iterator[dict]]] = {
    "oracle": lambda n: oracle_rows(codec(load("pocket/sd")), n),
    "VAE": lambda n: vae_rows(codec(load("pocket/sd")), n),
    "pocket-clip": clip_rows,
    "pocket-sd": lambda n: sampling_rows("pocket-sd", n),
    "pocket-controls": control_rows,
    "pocket-inpaint": inpaint_rows,
    "pocket-flow": lambda n: sampling_rows("pocket-flow", n),
}


def table(rows: list[dict]) -> str:
    """The rows as Markdown; baselines are blank where a row has none."""
    lines = [f"| what | value | n | {' | '.join(JUDGES)} |", "|" + "---|" * (3 + len(JUDGES))]
    for row in rows:
        baselines = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in JUDGES)
        lines.append(f"| {row['what']} | {row['value']:.3f} | {row['n']} | {baselines} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="pictures or prompts a row")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these rows anew alone")
    args = parser.parse_args()
    file = args.out / "pocket.json"
    old = json.loads(file.read_text()) if file.is_file() else []
    rows = []
    for name, measure in PARTS.items():
        rows += measure(args.n) if name in args.only else [row for row in old if row["what"].startswith(name)]
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
