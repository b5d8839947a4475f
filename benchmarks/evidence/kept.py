"""Finished rows of the tables, committed beside them: evidence that takes many hours goes on wherever it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from visiontune import catalogue, config
from visiontune.files import append_jsonl

RESULTS = Path(__file__).parents[1] / "results"
UNTOLD = ("description", "name", "out", "preview", "verb")


class Kept:
    """Rows by name, one JSON line each in ``results/rows``; several processes may add to a file.

    With each row stands the digest of what it was made of, a recipe and its options mostly: where that has changed, the
    row is made anew. The code and the weights of the pocket models are not part of it. Who changes what they give
    deletes the rows that it concerns.
    """

    def __init__(self, table: str) -> None:
        self.file = RESULTS / "rows" / f"{table}.jsonl"

    def find(self, name: str, of: Any) -> Any:
        """The last row of this name that was made of ``of``, or None."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        rows = (json.loads(line) for line in reversed(lines))
        return next((r["row"] for r in rows if (r["name"], r["of"]) == (name, _digest(of))), None)

    def row(self, name: str, of: Any, make: Callable[[], Any]) -> Any:
        """The row of this name, made if there is none of ``of``; anything that JSON can hold."""
        found = self.find(name, of)
        if found is None:
            append_jsonl(self.file, {"name": name, "of": _digest(of), "row": make()})
            found = self.find(name, of)  # as it will be read again
            print(name, json.dumps(found), flush=True)
        return found


def told(recipe: str, options: Sequence[str]) -> dict[str, Any]:
    """What a recipe of the catalogue and options on top of it say about a run, but for its name and its pictures.

    Options at their defaults are not part of it, so a new one leaves finished rows as they are.
    """
    content = config.apply(catalogue.load("pipelines", recipe), options)
    return {key: value for key, value in content.items() if key not in UNTOLD}


def _digest(of: Any) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
