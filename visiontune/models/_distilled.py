"""Checkpoints that were distilled to few steps, known by their names where no configuration says it.

Stable Diffusion 3.5 and its Turbo, for instance, have the same configuration.
"""

from __future__ import annotations

import re
from pathlib import Path

# A name such as Z-Image-De-Turbo says that the distillation was undone again.
_WORDS = re.compile(
    r"(?P<undone>(?<![a-z])(?:de|un)[-_. ]?)?(?P<word>turbo|schnell|lightning|distill|hyper-?sd|(?<![a-z])lcm(?![a-z]))"
)


def few_steps(source: str, configured: str | None) -> str | None:
    """Why a checkpoint counts as distilled to few steps; None for one that does not.

    Args:
        source: what the user named: a folder, or a Hub id. configured: what its configuration says of it, if anything.
    """
    found = list(_WORDS.finditer(_name(source).lower()))
    if any(match["undone"] for match in found):
        return None
    return configured or (f"its name says {found[0]['word']}" if found else None)


def _name(source: str) -> str:
    """A Hub id without its owner, and of a folder the last part; the Hub's cache has the id further up."""
    path = Path(source)
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
