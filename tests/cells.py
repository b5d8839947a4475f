"""Cells of the matrix: an adapter that an objective trains on a family, from the recipe to pictures and files.

`run` does on a tiny pipeline what a user would, and says what came of it. The suite runs a few cells, and
`benchmarks/matrix.py` those in which every two of an adapter, an objective and a family meet.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from contracts.declared import declared
from PIL import Image
from safetensors.torch import load_file
from tiny import SIZE, tiny_model
from tiny_rewards import TOWERS
from tiny_training import interrupt
from workshop import Workshop

from visiontune import adapters, assemble, models, plugin
from visiontune.cli.main import main
from visiontune.config import load_run
from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.evaluation.contrast import on_pictures
from visiontune.models.contrastive import ContrastiveModel
from visiontune.models.pipeline import PipelineModel
from visiontune.rewards.loading import load as load_reward
from visiontune.sampling.shown import read

ACTIONS = ("train", "resume", "export", "sample")
FORMATS = ("diffusers", "kohya", "diff", "peft", "merged")
KINDS = (PipelineModel, ContrastiveModel)
FAMILIES = sorted(name for name, cls in models.families().items() if issubclass(cls, KINDS))
YES = "yes"
PLAIN = "sd"
# Whichever of these options an objective has.
SMALL = {
    "group": 2,
    "steps": 2,
    "micro_batch": 2,
    "prior_images": 2,
    "prior_steps": 2,
    "timestep_count": 1,
    "updates": 1,
}
# And of these an adapter that looks at the task, which takes minutes by default.
GLANCE = {"batches": 2, "proxy_steps": 3, "points": 2, "search_steps": 3}
SEEN = Request(prompt="a red circle", seed=1)
# Of families whose tiny pipelines do not paint by themselves, those that do.
PAINTERS = {"flux": {"edits": "fill"}, "sd": {"edits": "inpaint"}, "sdxl": {"edits": "inpaint"}}


@dataclass(frozen=True, order=True)
class Cell:
    """Names of the catalogue."""

    adapter: str
    objective: str
    family: str

    def __str__(self) -> str:
        return "-".join(astuple(self))


@functools.cache
def _model(family: str, **options: str) -> Any:
    if family not in TOWERS:
        return tiny_model(family, **options)
    return models.load(str(TOWERS[family](Path(tempfile.mkdtemp()) / family, SIZE)))


@functools.cache
def refusal(objective: str, family: str) -> str | None:
    """Why an objective does not take a family, if it does not."""
    module = plugin.load("objectives", objective)
    try:
        built = module.build(module.Config())
        built.check(_model(family, **(PAINTERS.get(family, {}) if paints(objective) else {})), load_reward("redness"))
    except UserError as error:
        return str(error)
    return None


@functools.cache
def paints(objective: str) -> bool:
    """Whether an objective is for models that paint."""
    module = plugin.load("objectives", objective)
    needs = module.build(module.Config()).needs
    return "region" in needs.columns or needs.sets


@functools.cache
def online(objective: str) -> bool:
    """Whether an objective has no data, at which some adapters look before training."""
    module = plugin.load("objectives", objective)
    return module.build(module.Config()).needs.online


@functools.cache
def covering() -> tuple[Cell, ...]:
    """Few cells in which every two of an adapter, an objective and a family that takes it meet.

    Adapters that look at data first meet objectives without data on one family, and those with data on all others.
    """
    cells = []
    for j, family in enumerate(FAMILIES):
        taken = [name for name in plugin.names("objectives") if refusal(name, family) is None]
        for i, adapter in enumerate(plugin.names("adapters")):
            looks = declared()[adapter].looks
            fit = [name for name in taken if not (looks and online(name))]
            if fit:
                cells.append(Cell(adapter, fit[(i + j) % len(fit)], family))
            if looks and (family == PLAIN or not fit):
                cells += (Cell(adapter, name, family) for name in taken if online(name))
    return (*cells, *_missed(cells))


def _missed(cells: list[Cell]) -> list[Cell]:
    """Cells for every two that do not meet in others, of which there are some where families refuse objectives."""
    found: list[Cell] = []
    names = plugin.names("adapters")
    for j, objective in enumerate(plugin.names("objectives")):
        takers = [family for family in FAMILIES if refusal(objective, family) is None]
        met = {c.adapter for c in cells if c.objective == objective}
        found += (Cell(a, objective, takers[(i + j) % len(takers)]) for i, a in enumerate(names) if a not in met)
        met = {c.family for c in [*cells, *found] if c.objective == objective}
        found += (Cell("lora", objective, family) for family in takers if family not in met)
    return found


def recipe(cell: Cell, shop: Workshop) -> dict[str, Any]:
    """Two steps of a small run."""
    module, method = plugin.load("objectives", cell.objective), declared()[cell.adapter]
    options = module.Config.__dataclass_fields__
    objective = {"name": cell.objective, **{key: value for key, value in SMALL.items() if key in options}}
    built = module.build(module.Config())
    needs, teaches = built.needs, "distilled_guidance" in built.facts()
    if needs.online:
        about = {"data": str(shop.folder / "prompts.txt"), **({"reward": "redness"} if needs.reward else {})}
        # A teacher has something to teach; others are faster without.
        objective |= {"cfg_scale": 1.0} if "cfg_scale" in options and needs.reward and not teaches else {}
    else:
        special = {"rejected": "pairs", "segments": "grounded", "region": "holes"}
        root = getattr(shop, next((special[name] for name in needs.columns if name in special), "photos"))
        about = {"data": {"root": str(root), "class_noun": "circle"}}
        if needs.sets:
            about["data"] |= {"root": str(shop.sets), "set_size": 2}
    chosen = method.options if method.plan_options is None else method.plan_options
    known = plugin.load("adapters", cell.adapter).Config.__dataclass_fields__
    glance = {key: value for key, value in GLANCE.items() if key in known}
    return {
        "verb": "train",
        "description": "a cell",
        "name": str(cell),
        "model": str(shop.model),
        "out": str(shop.folder / "runs"),
        "adapter": {"name": cell.adapter, "targets": "attention", **glance, **chosen},
        "objective": objective,
        **about,
        "preview": {"prompts": []},
        "train": {
            **({"parts": ["vision", "text"]} if cell.family in TOWERS else {}),
            "steps": 2,
            "batch_size": 2,
            "lr": 0.01,
            "checkpoint_every": 1,
            "trackers": [],
            "device": "cpu",
            "threads": 1,
        },
    }


def run(cell: Cell, shop: Workshop) -> dict[str, str]:
    """What comes of each action: `yes`, with the formats where it is an export, or the line that refuses it.

    Raises:
        Exception: whatever goes wrong otherwise, AssertionError where a result is not what it should be.
    """
    why = refusal(cell.objective, cell.family)
    if why is not None:
        return dict.fromkeys(ACTIONS, why)
    shop = shop.painting(**PAINTERS[cell.family]) if paints(cell.objective) else shop
    try:
        file = _train(cell, shop)
    except UserError as error:
        return dict.fromkeys(ACTIONS, str(error))
    _resume(cell, shop, file)
    drawn, use = _drawn(shop, file), _evaluate if cell.family in TOWERS else _sample
    return {"train": YES, "resume": YES, "export": _export(shop, file, drawn), "sample": use(shop, file, drawn)}


def _trainer(cell: Cell, shop: Workshop, name: str, **train: Any):
    content = recipe(cell, shop)
    content["train"] |= train
    path = shop.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "name": name}))
    return assemble.assemble(load_run(str(path), []))


def _train(cell: Cell, shop: Workshop) -> Path:
    trainer = _trainer(cell, shop, f"{cell}-whole")
    before = {name: tensor.clone() for name, tensor in trainer.adapters.state_dict().items()}
    file = trainer.fit()
    after = trainer.adapters.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    assert any(name not in before or not torch.equal(t, before[name]) for name, t in after.items()), "nothing moved"
    return file


def _resume(cell: Cell, shop: Workshop, file: Path) -> None:
    interrupt(_trainer(cell, shop, f"{cell}-broken"), 1)
    whole, broken = load_file(file), load_file(_trainer(cell, shop, f"{cell}-broken", resume=True).fit())
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole), "another end after an interruption"


def _drawn(shop: Workshop, file: Path) -> np.ndarray:
    model = shop.open()
    header = adapters.read_header(file)
    model.accept(header)
    adapters.load(model.networks(), file).eval()
    return _picture(model, shop, "coupled" in header)


def _picture(model: Any, shop: Workshop, coupled: bool) -> np.ndarray:
    """A picture that a pipeline draws, or the features of a model that draws none."""
    if isinstance(model, ContrastiveModel):
        with torch.no_grad():
            seen = model.image_features(torch.linspace(0, 1, 3 * SIZE * SIZE).view(1, 3, SIZE, SIZE)).pooled
            return torch.cat([seen, model.text_features([SEEN.prompt]).pooled]).numpy()
    if coupled:
        model.couple()
    files, mask = shop.shown if shop.options else ([], None)
    shown = read(files, mask if model.reads.mask else None).options()
    return model.draw([replace(SEEN, **shown)], steps=2, guidance=model.guidance(3.0))[0]


def _export(shop: Workshop, file: Path, drawn: np.ndarray) -> str:
    written, line = [], ""
    for kind in FORMATS:
        out, said = file.with_name(f"export-{kind}"), io.StringIO()
        target = out if kind in ("peft", "merged") else out.with_suffix(".safetensors")
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(["export", str(file), str(target), "--format", kind, "--dtype", "fp32"])
        assert code in (0, 2) and target.exists() is (code == 0)
        written += [kind] if code == 0 else []
        line = line or said.getvalue().strip()
    if "merged" in written:
        merged = _picture(shop.open(file.with_name("export-merged")), shop, "coupled" in adapters.read_header(file))
        np.testing.assert_allclose(merged, drawn, rtol=0, atol=1e-4)
    return f"{YES}: {', '.join(written)}" if written else line


def _sample(shop: Workshop, file: Path, drawn: np.ndarray) -> str:
    out = file.with_name("samples")
    words = [
        f"model={shop.model}",
        f"adapter={file}",
        f"out={out}",
        f"prompts={SEEN.prompt}",
        "seeds=[1]",
        "steps=2",
        "scheduler=model",
    ]
    if shop.options:
        (picture,), mask = shop.shown
        coupled = "coupled" in adapters.read_header(file)
        words += [f"pictures={picture}", *([] if coupled else [f"mask={mask}"])]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["sample", *words, "cfg_scale=3", "device=cpu"]) == 0
    with Image.open(out / "00000_seed1.png") as shown:
        # Sums may round otherwise from one call to the next, by a millionth, which a value just below a half tells.
        np.testing.assert_allclose(np.asarray(shown), drawn.astype(float) * 255, rtol=0, atol=0.5 + 1e-3)
    return YES


def _evaluate(shop: Workshop, file: Path, seen: np.ndarray) -> str:
    """What `sample` is to pipelines: the adapter, opened by its file alone, tells the photos apart as it did."""
    out = file.with_name("apart.json")
    with contextlib.redirect_stdout(io.StringIO()):
        assert (
            main(["evaluate", "clip", str(file), "--data", str(shop.photos), "--out", str(out), "--device", "cpu"]) == 0
        )
    model = shop.open()
    adapters.load(model.networks(), file).eval()
    pictures = [Image.open(shop.photos / f"{i}.png") for i in range(3)]
    captions = [(shop.photos / f"{i}.txt").read_text() for i in range(3)]
    assert json.loads(out.read_text())["models"][0]["rows"] == on_pictures(model, pictures, captions).rows
    return YES
