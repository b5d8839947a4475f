"""Guidance distilled into an adapter, from the recipe to pictures drawn without any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from visiontune import adapters

OPTIONS = [
    "objective={name: cfg_distill, steps: 2, updates: 2, cfg_scale: 3}",
    "train.batch_size=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
]


def test_what_was_distilled_is_drawn_without_guidance(cli, recipe, caplog):
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    words = ["train", recipe, *OPTIONS, "data.root=prompts.txt", "preview.prompts=[a red circle]", "preview.steps=1"]
    result = cli(*words)
    assert result.code == 0, result.err
    assert "preview.cfg_scale=4 guides what learns to do without" in result.err + caplog.text
    header = adapters.read_header("runs/tiny/adapter.safetensors")
    assert json.loads(header["distilled_guidance"]) == {"cfg_scale": 3.0}
    first = json.loads(Path("runs/tiny/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["error"] < first["target"]
    drawn = cli("sample", "adapter=runs/tiny", "prompts=[a red circle]", "steps=1", "device=cpu")
    assert drawn.code == 0, drawn.err
    row = json.loads(Path("runs/samples/manifest.jsonl").read_text().splitlines()[0])
    assert row["settings"]["cfg_scale"] == 1.0
    for folder, said in (("runs/tiny", result.out), ("runs/samples", drawn.out)):
        assert f"{folder}/index.html shows it" in said and Path(folder, "index.html").is_file()


def test_a_student_that_is_told_its_guidance_is_sampled_continued_and_merged(cli, recipe, caplog):
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    told = ["objective={name: cfg_distill, steps: 2, updates: 2, w: [2, 3]}", *OPTIONS[1:], "data.root=prompts.txt"]
    train = ["train", recipe, *told, "preview.prompts=[]", "train.lr=0.01"]
    result = cli(*train)
    assert result.code == 0, result.err
    header = adapters.read_header("runs/tiny/adapter.safetensors")
    assert header["whole"] == ["unet.time_embedding.cond_proj"]
    assert json.loads(header["distilled_guidance"]) == {"w": [2.0, 3.0], "w_density": "uniform"}
    sample = ["sample", "prompts=[a red circle]", "steps=1", "device=cpu", "grid=0"]
    for scale in ([], ["cfg_scale=2.5"], ["cfg_scale=9"]):
        out = f"runs/{scale}"
        drawn = cli(*sample, "adapter=runs/tiny", f"out='{out}'", *scale)
        assert drawn.code == 0, drawn.err
        row = json.loads(Path(out, "manifest.jsonl").read_text().splitlines()[0])
        assert row["settings"]["cfg_scale"] == (float(scale[0].partition("=")[2]) if scale else 3.0)
    assert "strengths of guidance from 2 to 3, and cfg_scale=9 is none" in caplog.text
    assert "guided again" not in caplog.text
    assert cli("export", "runs/tiny", "lora.safetensors").code == 2
    assert cli("export", "runs/tiny", "merged", "--format", "merged", "--dtype", "fp32").code == 0
    assert cli(*sample, "model=merged", "cfg_scale=2.5", "out=runs/merged").code == 0
    ours, merged = (
        np.array(Image.open(next(Path(out).glob("0*.png")))) for out in ("runs/['cfg_scale=2.5']", "runs/merged")
    )
    np.testing.assert_allclose(merged, ours.astype(float), atol=1)
    for more, said in (
        (["model=merged"], "has guidance distilled into it already"),
        (["adapter.under=runs/tiny"], "is told its guidance, by layers that the base does not have"),
    ):
        refused = cli(*train, "name=other", *more)
        assert refused.code == 2 and said in refused.err
    again = cli(*train, "name=again", "adapter.start=runs/tiny/adapter.safetensors")
    assert again.code == 0, again.err
    assert adapters.read_header("runs/again/adapter.safetensors")["whole"] == header["whole"]


def test_an_assistant_with_guidance_inside_is_not_guided_as_a_teacher(cli, recipe):
    Path("prompts.txt").write_text("a red circle\n")
    words = ["train", recipe, *OPTIONS, "data.root=prompts.txt", "preview.prompts=[]"]
    assert cli(*words).code == 0
    refused = cli(*words, "name=other", "adapter.under=runs/tiny")
    assert refused.code == 2 and "has guidance distilled into it already, and would be guided" in refused.err


def test_pictures_of_a_folder_are_learnt_from_too(cli, recipe):
    result = cli("train", recipe, *OPTIONS, "objective.states=data", "preview.prompts=[]")
    assert result.code == 0, result.err
    assert "distilled_guidance" in adapters.read_header("runs/tiny/adapter.safetensors")


def test_few_steps_are_learnt_and_drawn(cli, recipe, caplog):
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    objective = "objective={name: mmd_ddm, few_steps: 2, steps: 2, updates: 2, group: 2}"
    words = [objective, *OPTIONS[1:], "data.root=prompts.txt", "preview.prompts=[a red circle]", "preview.cfg_scale=1"]
    result = cli("train", recipe, *words, "preview.steps=3")
    assert result.code == 0, result.err
    assert "preview.steps=3 draws in other steps than what is trained for: set it to 2" in result.err + caplog.text
    drawn = cli("sample", "adapter=runs/tiny", "prompts=[a red circle]", "device=cpu")
    assert drawn.code == 0, drawn.err
    settings = json.loads(Path("runs/samples/manifest.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["steps"], settings["scheduler"], settings["cfg_scale"]) == (2, "ddim", 1.0)


def test_few_steps_are_learnt_from_pictures_of_a_folder(cli, recipe):
    words = ["objective={name: mmd_ddm, few_steps: 2, compare_with: data}", *OPTIONS[1:], "preview.prompts=[]"]
    result = cli("train", recipe, *words)
    assert result.code == 0, result.err
