"""The tables in the READMEs of the root and its folders; run as a script (`make tables`) to write them anew."""

from __future__ import annotations

import inspect
from pathlib import Path

from torch import nn

from visiontune import catalogue, plugin
from visiontune.files import write_text

ROOT = Path(__file__).parents[1]
FOLDERS = (*catalogue.KINDS, "samples", ".")
START, END = "<!-- table: written by `make tables` -->\n", "<!-- end of table -->"


def table(folder: str) -> str:
    """The Markdown table of a root folder's entries."""
    head, rows = {
        "pipelines": (["recipe", "verb", "model", "adapter", "objective", "what it does"], _recipes),
        "rewards": (["reward", "module", "range", "differentiable", "licence", "what it measures"], _rewards),
        "datasets": (["dataset", "source", "images", "licence", "what it is"], _datasets),
        "samples": (["grid", "how to reproduce it"], _samples),
        ".": (["adapter", "what it trains", "layers"], _adapters),
    }[folder]
    lines = [head, ["---"] * len(head), *rows()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def readme(folder: str, text: str) -> str:
    """The text of a README with its table up to date."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table(folder)}\n{END}{rest.partition(END)[2]}"


def _name(spec: object) -> object:
    return spec["name"] if isinstance(spec, dict) else spec


def _recipes() -> list[list[object]]:
    rows = []
    for name in catalogue.names("pipelines"):
        r = catalogue.load("pipelines", name)
        model = r.get("model", "the adapter's")
        model = model["source"] if isinstance(model, dict) else model
        what = [model, _name(r.get("adapter", "")), _name(r.get("objective", ""))]
        rows.append([f"[{name}]({name}.yaml)", r["verb"], *what, r["description"]])
    return rows


def _rewards() -> list[list[object]]:
    rows = []
    for name in catalogue.names("rewards"):
        r = catalogue.load("rewards", name)
        facts = ["{} to {}".format(*r["range"]), "yes" if r["differentiable"] else "no", r["licence"], r["description"]]
        rows.append([f"[{name}]({name}.yaml)", r["name"], *facts])
    return rows


def _datasets() -> list[list[object]]:
    rows = []
    for name in catalogue.names("datasets"):
        r = catalogue.load("datasets", name)
        count = r.get("count") or f"{len(r['prompts'])} prompts"
        rows.append([f"[{name}]({name}.yaml)", r["source"], count, r["licence"], r["description"]])
    return rows


def _samples() -> list[list[object]]:
    grids = sorted(f for f in (ROOT / "samples").rglob("*") if f.suffix in (".png", ".webp"))
    names = [f.relative_to(ROOT / "samples") for f in grids]
    return [[f"![{n.stem}]({n.as_posix()})", f"[{n.stem}.json]({n.with_suffix('.json').as_posix()})"] for n in names]


def _adapters() -> list[list[object]]:
    kinds = {"linear": nn.Linear, "convolution": nn.Conv2d, "norm": nn.LayerNorm, "embedding": nn.Embedding}
    rows = []
    for name in plugin.names("adapters"):
        module = plugin.load("adapters", name)
        first = inspect.getdoc(module).partition("\n")[0]
        what = first.partition(": ")[2] or first
        layers = ", ".join(kind for kind, cls in kinds.items() if issubclass(cls, module.LAYERS))
        rows.append([f"[`{name}`](docs/adapters/{name}.md)", (what[0].upper() + what[1:]).replace("``", "`"), layers])
    return rows


if __name__ == "__main__":
    for each in FOLDERS:
        path = ROOT / each / "README.md"
        write_text(path, readme(each, path.read_text(encoding="utf-8")))
