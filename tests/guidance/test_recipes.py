"""Every term has a page and a recipe that uses it, and the recipes run as they are."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from visiontune import plugin
from visiontune.config import load_sample
from visiontune.guidance.base import Run
from visiontune.guidance.stack import GuidanceStack
from visiontune.models import load
from visiontune.sampling.sources import settled

ROOT = Path(__file__).parents[2]
# Recipes of models and files that are not in the package.
BROUGHT = ("autoguidance", "embedded", "wiclp")


@functools.cache
def pocket():
    return load("pocket/sd")


@pytest.mark.parametrize("name", plugin.names("guidance"))
def test_a_term_has_a_page_and_a_recipe(name):
    page = (ROOT / "docs" / "guidance" / f"{name}.md").read_text()
    assert "**Cost.**" in page and "**When not.**" in page
    assert f"[`{name}`]({name}.md)" in (ROOT / "docs" / "guidance" / "README.md").read_text()
    recipe = load_sample(f"guidance/{name}", [])
    stack = GuidanceStack.of(recipe.guidance)
    assert name in [term.name for term in stack.terms]
    assert recipe.out == f"runs/{name}"
    if name in BROUGHT:
        return
    model, recipe = pocket(), settled(recipe)
    size = model.size(recipe.height, recipe.width)
    plan = stack.plan(model, recipe.steps, size)
    assert any(name in acting for acting in plan.acting)
    for term in stack.terms:
        term.begins(Run(model=model, prompts=recipe.prompts))
