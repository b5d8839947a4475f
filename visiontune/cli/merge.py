"""Merge the changes of several runs of one base into one, by told weights or by a search.

  visiontune merge runs/low runs/high runs/merged.safetensors --weight .5 --weight .5
  visiontune merge runs/low runs/high runs/merged.safetensors --data pocket/scenes

The result is base + sum of weight x (run - base). Runs have adapters of any methods, or are models of all weights
(the folder `model` of a run), for which the result is a folder. Without weights those with the least denoising loss on
held-out pictures are looked for: give pictures that neither trained any run nor will judge the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontune import files
from visiontune.errors import UserError
from visiontune.ranges import argument

if TYPE_CHECKING:
    from visiontune.weights.shares import Shares

# Of the header of an adapter: what it is, and how what it makes is drawn.
_ABOUT = ("base_model", "trigger", "class_noun", "prompt")
_DRAWN = ("distilled_guidance", "few_steps", "confined_words", "coupled", "canvas")
_GRID = [0.0, 0.25, 0.5, 0.75, 1.0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    share = argument(float, least=-10, greatest=10)
    parser.add_argument(
        "runs", nargs="+", metavar="run", help="folders of finished runs of one base, or their adapter.safetensors"
    )
    parser.add_argument("out", type=Path, help="the .safetensors file to write; of runs of all weights a folder")
    parser.add_argument("--weight", type=share, action="append", metavar="W", help="of each run, in their order")
    parser.add_argument("--data", help="held-out pictures with captions, on which weights are searched; as data.root")
    parser.add_argument(
        "--grid", type=share, nargs="+", default=_GRID, metavar="W", help="weights to try (%(default)s)"
    )
    parser.add_argument("--count", type=argument(int, least=1, greatest=10_000), default=32, help="pictures looked at")
    parser.add_argument("--model", help="the base, where it has moved, and of runs of all weights")


def run(args: argparse.Namespace) -> None:
    files.check_new(args.out)
    _check(args)
    whole = [folder for folder in map(_model_of, args.runs) if folder is not None]
    if whole and len(whole) < len(args.runs):
        raise UserError("some runs have adapters and others all weights: merge those of one kind")
    (_merge_models(args, whole) if whole else _merge_adapters(args))


def _check(args: argparse.Namespace) -> None:
    if len(args.runs) < 2:
        raise UserError("merging takes two runs or more: give them before the file to write")
    if (args.weight is None) == (args.data is None):
        raise UserError("give either a --weight for each run, or --data, pictures on which the weights are searched")
    if args.weight is not None and len(args.weight) != len(args.runs):
        raise UserError(f"{len(args.weight)} --weight for {len(args.runs)} runs: give one for each")


def _model_of(name: str) -> Path | None:
    """The model that a run of all weights wrote, or that the name is."""
    folder = Path(name).expanduser()
    return next((one for one in (folder / "model", folder) if (one / "model_index.json").is_file()), None)


def _merge_adapters(args: argparse.Namespace) -> None:
    from visiontune import adapters, models
    from visiontune.sampling.sources import adapter_file, skips_of, trained_on
    from visiontune.weights.mixing import mixed

    if args.out.suffix != ".safetensors":
        raise UserError(f"adapters are merged into a .safetensors file, not {args.out.name}")
    weights = [adapter_file(name) for name in args.runs]
    headers = [adapters.read_header(file) for file in weights]
    if special := next((h for h in headers if h["whole"] or h["words"]), None):
        what = next(iter([*special["whole"], *special["words"]]))
        raise UserError(f"'{what}' is no weight of the base that could be added up: merge adapters of layers alone")
    told = _facts(headers)
    base = args.model or trained_on(weights[0], "--model")
    model = models.load(base, fetch=args.model is not None, skips=skips_of(weights))
    networks = model.networks()
    sets = [adapters.load(networks, file, name=f"merge{i}").eval() for i, file in enumerate(weights)]
    for one in sets:
        one.enabled = False

    def loss(shares: Shares) -> float:
        made = mixed(networks, sets, shares, "trial")
        try:
            return held.loss(model)
        finally:
            made.detach()

    held = _Held(args, model)
    shares = held.search(loss, len(sets))
    made = mixed(networks, sets, shares)
    made.save(args.out, {**told, "merged": _told(args.runs, shares)})
    print(f"written: {args.out}, {made.method} on {len(made.layers)} layers")


def _facts(headers: list[dict[str, Any]]) -> dict[str, str]:
    """What the headers of all runs say alike.

    Raises:
        UserError: runs that are drawn in different ways, which the sum could not be.
    """
    for key in _DRAWN:
        if len({header.get(key) for header in headers}) > 1:
            raise UserError(f"the runs are drawn in different ways ({key} in their headers): merge those of one kind")
    first, *others = headers
    kept = (key for key in (*_ABOUT, *_DRAWN) if all(first.get(key) == other.get(key) for other in others))
    return {key: first[key] for key in kept if first.get(key)}


def _merge_models(args: argparse.Namespace, folders: list[Path]) -> None:
    from visiontune import models
    from visiontune.weights.mixing import merged

    if args.model is None:
        raise UserError("runs of all weights do not say in their model what they began from: name it by --model")
    model: Any = models.load(args.model)
    base = _state(model, copy=True)
    others = [_state(models.load(str(folder)), copy=False) for folder in folders]

    def put(shares: Shares) -> None:
        made = merged(base, others, shares)
        for name, network in model.networks().items():
            own = {key: made[f"{name}.{key}"] for key in network.state_dict()}
            network.load_state_dict(own)

    def loss(shares: Shares) -> float:
        put(shares)
        return held.loss(model)

    held = _Held(args, model)
    put(held.search(loss, len(others)))
    with files.atomic_write(args.out) as partial:
        model.save(partial)
    print(f"written: {args.out}, {type(model.pipe).__name__}")


def _state(model: Any, copy: bool) -> dict[str, Any]:
    """All weights, with their network's name before them."""
    return {
        f"{name}.{key}": value.clone() if copy else value
        for name, network in model.networks().items()
        for key, value in network.state_dict().items()
    }


def _told(names: list[str], shares: Shares) -> str:
    return " + ".join(f"{share:g} {Path(name).name}" for name, share in zip(names, shares, strict=True))


class _Held:
    """The weights that are told, or those that do best on held-out pictures."""

    def __init__(self, args: argparse.Namespace, model: Any) -> None:
        self.args = args
        if args.data is None:
            return
        from visiontune.data.base import Config
        from visiontune.data.preflight import preflight
        from visiontune.data.readers import read, resolve
        from visiontune.data.rows import Rows
        from visiontune.training.held import Held

        config = resolve(Config(root=args.data, cache=False))
        samples = read(config)[: args.count]
        preflight(samples)
        self.rows = Held(Rows(model, samples, config), args.count)

    def loss(self, model: Any) -> float:
        return float(self.rows.losses(model).mean())

    def search(self, loss: Any, count: int) -> Shares:
        """The weights; what was found of them is printed."""
        from visiontune.weights.shares import alone, search

        if self.args.weight is not None:
            return tuple(self.args.weight)
        best, tried = search(loss, count, self.args.grid)
        names = ["the base", *(Path(name).name for name in self.args.runs), "merged"]
        looked = [(0.0,) * count, *alone(count), best]
        for name, shares in zip(names, looked, strict=True):
            print(f"{name:>12}: held-out loss {tried[shares]:.5g} at {' '.join(f'{share:g}' for share in shares)}")
        return best
