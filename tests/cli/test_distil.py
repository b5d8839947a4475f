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
    sample = ["sample", "prompts=[a red circle]", "steps=1", "device=cpu", "sheet=0"]
    for number, scale in enumerate(([], ["cfg_scale=2.5"], ["cfg_scale=9"])):
        drawn = cli(*sample, "adapter=runs/tiny", f"out=runs/drawn{number}", *scale)
        assert drawn.code == 0, drawn.err
        row = json.loads(Path(f"runs/drawn{number}/manifest.jsonl").read_text().splitlines()[0])
        assert row["settings"]["cfg_scale"] == (3.0, 2.5, 9.0)[number]
    assert "strengths of guidance from 2 to 3, and cfg_scale=9 is none" in caplog.text
    assert "guided again" not in caplog.text
    assert cli("export", "runs/tiny", "lora.safetensors").code == 2
    assert cli("export", "runs/tiny", "merged", "--format", "merged", "--dtype", "fp32").code == 0
    assert cli(*sample, "model=merged", "cfg_scale=2.5", "out=runs/merged").code == 0
    ours, merged = (np.array(Image.open(next(Path(out).glob("0*.png")))) for out in ("runs/drawn1", "runs/merged"))
    np.testing.assert_allclose(merged, ours.astype(float), atol=1)
    for more, said in (
        (["model=merged"], "has guidance distilled into it already"),
        (["adapter.under=runs/tiny"], "is told its guidance, by layers that the base does not have"),
    ):
        refused = cli(*train, "name=other", *more)
        assert refused.code == 2 and said in refused.err
    whole = cli(*train, "name=whole", "adapter=none")
    assert whole.code == 0, whole.err
    config = json.loads(Path("runs/whole/model/unet/config.json").read_text())
    assert config["time_cond_proj_dim"] == 256
    again = cli(*train, "name=again", "adapter.start=runs/tiny/adapter.safetensors")
    assert again.code == 0, again.err
    assert adapters.read_header("runs/again/adapter.safetensors")["whole"] == header["whole"]


def test_steps_are_halved_round_after_round_and_samplers_take_them(cli, recipe, caplog):
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    options = [*OPTIONS[1:], "data.root=prompts.txt", "preview.prompts=[]", "train.lr=0.01"]

    def train(name, *more):
        told = "objective={name: progressive, updates: 2, cfg_scale: 1}"
        return cli("train", recipe, told, *options, f"name={name}", *more)

    assert train("four", "objective.steps=4", "objective.cfg_scale=3").code == 0
    start = "adapter.start=runs/four/adapter.safetensors"
    refused = train("guided", start, "objective.steps=2", "objective.cfg_scale=3")
    assert refused.code == 2 and "has guidance distilled into it already: set objective.cfg_scale to 1" in refused.err
    second = train("two", start, "objective.steps=2")
    assert second.code == 0, second.err
    header = adapters.read_header("runs/two/adapter.safetensors")
    assert json.loads(header["distilled_guidance"]) == {"cfg_scale": 3.0}
    assert json.loads(header["few_steps"]) == {"steps": 2, "scheduler": "model"}
    first = json.loads(Path("runs/two/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["error"] < first["target"]
    sample = ["sample", "adapter=runs/two", "prompts=[a red circle]", "device=cpu", "sheet=0"]
    assert cli(*sample).code == 0 and "was made for" not in caplog.text
    row = json.loads(Path("runs/samples/manifest.jsonl").read_text().splitlines()[0])
    assert (row["settings"]["steps"], row["settings"]["cfg_scale"]) == (2, 1.0)
    assert cli(*sample, "steps=5", "out=runs/other").code == 0
    assert "was made for 2 steps of model, not 5 of model" in caplog.text


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
