"""`visiontune evaluate clip`: what models of pictures and texts tell apart, one table for each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files, outside
from visiontune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from visiontune.evaluation.contrast import Report

NAME = "clip"
_POCKET = "pocket/clip"
# Pictures a row.
_COUNT = 200


def run(args: argparse.Namespace) -> None:
    """Compare models, adapters and runs on the same pictures.

    Raises:
        UserError: an option of something else, or a model or data that are not there.
    """
    from visiontune.cli import _compose

    others = _compose.given(args, but=("count", "device"))
    others += [f"--{name}" for name in ("checkpoints", "clip") if getattr(args, name)]
    others += ["--scales"] * (args.scales != "1")
    if others:
        raise UserError(f"{' '.join(others)}: is not of 'visiontune evaluate clip'; leave it out")
    from visiontune.evaluation.contrast import compared

    look = _look(args)
    reports: list[Report] = []
    for name in args.words or [_POCKET]:
        reports.append(look(_opened(name, args.device), name))
        print(reports[-1].table(), flush=True)
    for report in reports[1:]:
        print(compared(report, reports[0]))
    if args.out:
        content = [{"model": r.model, "means": r.summary(), "rows": r.rows} for r in reports]
        files.write_json(args.out, {"models": content})
        print(f"written: {args.out}")


def _look(args: argparse.Namespace) -> Callable[[Any, str], Report]:
    """What makes a report of a model: by attributes in the pocket world, or by captions of other pictures."""
    from visiontune.data.base import Config
    from visiontune.data.readers import read, resolve
    from visiontune.evaluation import contrast
    from visiontune.evaluation.attributes import audit

    style = _style(args.data)
    if style is not None:

        def of_pocket(model: Any, name: str) -> Report:
            rows = audit(model.encoder, args.count or _COUNT, style=style)
            return contrast.Report(model=name, rows=[*rows])

        return of_pocket
    samples = read(resolve(Config(root=args.data)), ("image",))
    pictures = [sample.sources["image"].open() for sample in samples]
    captions = [sample.caption for sample in samples]
    return lambda model, name: contrast.on_pictures(model, pictures, captions, name)


def _style(data: str | None) -> str | None:
    """The style in which the scenes of pocket data are drawn; None for other data."""
    from visiontune import catalogue

    if data is None:
        return "flat"
    if data not in catalogue.names("datasets"):
        return None
    spec = catalogue.load("datasets", data)
    return str(spec.get("style", "flat")) if spec.get("world") in ("scenes", "style") else None


def _opened(name: str, device: str) -> Any:
    """A model, or that of an adapter with it attached, or what a run of all weights left.

    Raises:
        UserError: there is none, or it does not compare pictures with texts.
    """
    from visiontune import adapters, models
    from visiontune.models.contrastive import ContrastiveModel
    from visiontune.ops.devices import check_device, usable
    from visiontune.sampling.sources import adapter_file, trained_on

    folder = outside.is_folder(name)
    whole = folder and (Path(name).expanduser() / "model").is_dir()
    weights = name.endswith(".safetensors") or (folder and (Path(name).expanduser() / "adapter.safetensors").is_file())
    file = adapter_file(name) if weights else None
    source = f"{name}/model" if whole and file is None else name
    model = models.load(source if file is None else trained_on(file, "model="), fetch=file is None)
    if not isinstance(model, ContrastiveModel):
        raise UserError(f"'{name}' is a {model.family}, which does not compare pictures with texts: name a CLIP")
    if file is not None:
        model.accept(adapters.read_header(file))
        adapters.load(model.networks(), file)
    check_device(device, "--device", ("auto",))
    return model.to(usable()[:2][-1] if device == "auto" else device)
