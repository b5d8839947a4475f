"""The demonstration and the README's example, on the shipped models but in few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from visiontune import demo
from visiontune.config import load_run
from visiontune.errors import UserError

pytestmark = pytest.mark.pocket
FEW = ["train.steps=2", "train.batch_size=1", "preview.prompts=[]"]
FEW += ["objective.prior_images=2", "objective.prior_steps=2"]


def test_the_demo_leaves_adapters_recipes_report_and_grid_and_can_be_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SIZES", {"ordinary": 2, "steps": 2, "seeds": (1,)})
    for workers in (1, 2):
        report = json.loads(demo.run(tmp_path / "demo", FEW, workers).read_text())
        assert list(report["results"]) == ["base", "oft", "lora"]
        for scores in report["results"].values():
            assert all(-1 <= value <= 1 for value in scores.values()) and "prompt_accuracy" in scores
        for path in report["adapters"].values():
            assert Path(path).exists() and (Path(path).parent / "recipe.yaml").exists()
        with Image.open(tmp_path / "demo" / "grid.png") as grid:
            assert grid.width > 500
        (tmp_path / "demo" / "grid.png").unlink()


def test_a_mistake_in_a_process_of_the_demo_is_the_user_s_line(tmp_path):
    recipe = load_run("personalise/oft", [*FEW, f"out={tmp_path}", "adapter.targets=nonsense"])
    with pytest.raises(UserError, match="matches no layer"):
        demo._all({"oft": demo._Job(data=recipe.data, recipe=recipe, sizes=demo.SIZES)}, 2)


def test_a_demo_replaces_no_run_but_a_demos(tmp_path):
    own = tmp_path / "oft"
    own.mkdir()
    (own / "adapter.safetensors").write_text("weeks of work")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="oft is not of a demo, which would replace it: choose another --out"):
        demo.run(tmp_path, FEW)
    assert (own / "adapter.safetensors").read_text() == "weeks of work" and not (tmp_path / "lora").exists()


def test_the_example_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("seeds=[0, 1, 2, 3]", "seeds=[0], steps=2"), {})
    assert "parameters on" in capsys.readouterr().out
    assert (tmp_path / "adapter.safetensors").exists() and (tmp_path / "merged" / "model_index.json").exists()
