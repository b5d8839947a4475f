from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from visiontune import adapters, config
from visiontune.training.loop import Trainer


def test_train_writes_the_adapter_the_recipe_and_what_it_was_trained_with(cli, recipe):
    result = cli(
        "train", recipe, "train.lr=1e-2", "seed=7", "preview.prompts=['a [trigger] circle']", "preview.steps=1"
    )
    assert result.code == 0, result.err
    assert "runs/tiny/adapter.safetensors" in result.out
    resolved = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())
    assert resolved["train"]["lr"] == 0.01 and resolved["seed"] == 7 and resolved["adapter"]["rank"] == 2
    header = adapters.read_header("runs/tiny/adapter.safetensors")
    assert header["trigger"] == "sks" and header["class_noun"] == "circle" and header["method"] == "lora"
    assert all(layer.split(".")[0] == "unet" for layer in header["layers"])
    assert Path("runs/tiny/samples/step-000000/grid.png").is_file()


def test_the_resolved_recipe_repeats_the_run(cli, recipe):
    assert cli("train", recipe).code == 0
    again = cli("train", "runs/tiny/recipe.yaml", "name=again")
    assert again.code == 0, again.err
    first, second = (load_file(f"runs/{name}/adapter.safetensors") for name in ("tiny", "again"))
    assert first.keys() == second.keys()
    assert all((first[k] == second[k]).all() for k in first)
    assert config.load_run("runs/tiny/recipe.yaml") == config.load_run(recipe)


def test_a_run_goes_on_only_when_told_and_only_as_the_same_run(cli, recipe, unchanged):
    assert cli("train", recipe).code == 0
    with unchanged:
        refused = cli("train", recipe)
        assert refused.code == 2 and "already holds a run" in refused.err and "train.resume=true" in refused.err
        other = cli("train", recipe, "train.resume=true", "adapter.rank=4")
        assert other.code == 2 and "adapter.rank=2, not 4" in other.err
    longer = cli("train", recipe, "train.resume=true", "train.steps=3")
    assert longer.code == 0, longer.err
    steps = [json.loads(line)["step"] for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3 and sorted(set(steps)) == steps


@pytest.mark.parametrize("section", ["adapter", "objective"])
def test_a_folder_that_a_run_goes_on_in_has_no_code_run(cli, recipe, section):
    assert cli("train", recipe).code == 0
    held = Path("runs/tiny/recipe.yaml")
    held.write_text(yaml.safe_dump(yaml.safe_load(held.read_text()) | {section: {"name": "evil.py"}}))
    Path("evil.py").write_text("open('ran', 'w')")
    result = cli("train", recipe, "train.resume=true", "train.steps=3")
    assert result.code == 2 and f"holds a run with {section}.name=evil.py" in result.err
    assert not Path("ran").exists()


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_name_free(cli, recipe):
    for mistake in ("train.optimizer=os.system", "train.optimizer_options={speed: 3}", "model=nowhere", "data.root=x"):
        assert cli("train", recipe, mistake).code == 2
        assert not Path("runs/tiny").exists()
    late = [
        "train.optimizer=sgd",
        "train.lr=100",
        "train.weight_decay=100",
        "train.max_grad_norm=null",
        "train.checkpoint_every=9",
        "train.steps=9",
    ]
    failed = cli("train", recipe, *late, "adapter.rank=3")
    assert failed.code == 2 and "start again (there is no checkpoint yet)" in failed.err
    assert yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())["adapter"]["rank"] == 3
    again = cli("train", recipe)
    assert again.code == 0, again.err
    assert yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())["adapter"]["rank"] == 2
    Path("runs/tiny/checkpoints").rename("elsewhere")
    assert "already holds a run" in cli("train", recipe).err  # its result is kept


def test_check_refuses_the_places_that_train_refuses(cli, recipe):
    Path("taken").write_text("a file")
    for words in (["out=taken"], ["out=taken/deeper"], ["out=.", "name=taken"]):
        for verb in ("check", "train"):
            refused = cli(verb, recipe, *words)
            assert refused.code == 2 and "taken is a file: choose another" in refused.err
    assert Path("taken").read_text() == "a file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preview.steps=5000"], "preview.steps: 5000 sampling steps are more than the 1000 of the model's noise"),
        (["preview.seeds=[]"], "preview: seeds names none"),
        (
            ["objective.name=dreambooth", "objective.prior_images=2", "objective.prior_steps=1001"],
            "1001 sampling steps",
        ),
    ],
)
def test_check_refuses_the_pictures_that_train_could_not_draw(cli, recipe, unchanged, words, message):
    for verb in ("check", "train"):
        refused = cli(verb, recipe, "preview.prompts=[a]", *words)
        assert refused.code == 2 and message in refused.err, refused.err
        assert not Path("runs/tiny").exists()


def test_check_refuses_the_folder_in_which_train_could_not_go_on(cli, recipe):
    assert cli("train", recipe).code == 0
    Path("runs/tiny/samples/step-000900").mkdir(parents=True)
    changed = (["train.batch_size=2"], "train.batch_size=1, not 2"), (["train.steps=1"], "is past train.steps=1")
    for words, message in (*changed, (["train.steps=3"], "no run wrote it: move it away")):
        for verb in ("check", "train"):
            refused = cli(verb, recipe, "train.resume=true", *words)
            assert refused.code == 2 and message in refused.err, refused.err
    assert Path("runs/tiny/samples/step-000900").is_dir()


def in_names_of_0_1(file):
    """Rewrite a resolved recipe as visiontune 0.1 would have written it."""
    old = yaml.safe_load(file.read_text())
    old["train"] = {"denoiser": True, "text_encoder": False, "steps": 2}
    timesteps = old["objective"].pop("timesteps")
    old["objective"] |= {"min_timestep": round(timesteps["low"] * 1000), "max_timestep": None}
    old["data"] |= {"image_column": "image", "rejected_column": "rejected"}
    for name in ("columns", "ignore"):
        del old["data"][name]
    file.write_text(yaml.safe_dump(old))


def test_a_run_folder_of_the_first_version_goes_on_and_its_recipe_names_what_is_new(cli, recipe):
    low = ["objective=denoising", "objective.timesteps.low=0.2"]
    assert cli("train", recipe, *low).code == 0
    file = Path("runs/tiny/recipe.yaml")
    in_names_of_0_1(file)
    other = cli("train", recipe, "train.resume=true", "train.steps=3")
    assert other.code == 2 and "objective.timesteps.low=0.2, not 0.0" in other.err
    asked = cli("train", file, "name=again")
    assert asked.code == 2 and "is now" in asked.err and asked.err.count("\n") == 1
    more = cli("train", recipe, "train.resume=true", "train.steps=3", *low)
    assert more.code == 0, more.err


def test_a_trained_text_encoder_is_adapted_too(cli, recipe):
    assert cli("train", recipe, "train.parts=[denoiser, text]").code == 0
    layers = adapters.read_header("runs/tiny/adapter.safetensors")["layers"]
    assert {layer.split(".")[0] for layer in layers} == {"unet", "text_encoder"}


def test_full_fine_tuning_saves_a_model_that_loads(cli, recipe):
    result = cli("train", recipe, "adapter=none")
    assert result.code == 0, result.err
    from visiontune import models

    assert models.load("runs/tiny/model").fingerprint("denoiser")
    assert yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())["adapter"] == "none"


def test_dreambooth_prior_images_are_made_once_and_cached(cli, recipe):
    options = ["objective.name=dreambooth", "objective.prior_images=2", "objective.prior_steps=1"]
    assert cli("train", recipe, *options).code == 0
    folders = list((recipe.parent / "runs/.cache").glob("prior-*"))
    assert len(folders) == 1 and len(list(folders[0].glob("*.png"))) == 2


@pytest.mark.parametrize("words", [["adapter=none"], ["train.parts=[denoiser, text]"], ["train.ema=0.9"]])
def test_check_reports_the_cost_and_writes_nothing(cli, recipe, unchanged, words):
    with unchanged:
        result = cli("check", recipe, *words)
    assert result.code == 0, result.err
    for word in ("data: 3 images", "trainable:", "s/step on this cpu", "memory:", "optimiser", "activations"):
        assert word in result.out


def test_check_tells_what_it_uses_and_what_it_does_not(cli, recipe, photos, caplog):
    (photos / "0.txt").unlink()
    (photos / "notes.html").write_text("of a browser")
    words = ["data.prompt=a circle", "data.ignore=notes.html"]
    result = cli("check", recipe, *words)
    assert result.code == 0, result.err
    for line in ("columns: image 3 (3 .png)", "captions: 2 from .txt files, 1 from data.prompt", "ignored: notes.html"):
        assert line in result.out.splitlines()
    assert "1 of 3 pictures have no caption and get data.prompt: 0.png" in result.out
    assert cli("train", recipe, *words).code == 0
    assert "1 of 3 pictures have no caption" in caplog.text


def test_captions_that_are_read_in_part_are_named_on_every_run(cli, recipe, photos, caplog):
    (photos / "1.txt").write_text("a red circle " * 12)
    lines = ["1 caption is longer than the 32 tokens", "1.png (38 tokens)", "preview.prompts[1]"]
    words = ["preview.prompts=[a circle, " + "a blue circle " * 12 + "]"]
    for name in ("first", "second"):  # the second reads the cache
        caplog.clear()
        assert cli("train", recipe, f"name={name}", *words).code == 0
        said = [record.getMessage() for record in caplog.records if record.name.startswith("visiontune")]
        assert len(said) == 2 and all(any(line in words for words in said) for line in lines)
    caplog.clear()
    result = cli("check", recipe, *words)
    assert result.code == 0 and not caplog.records
    assert all(line in result.out for line in lines)


def test_sample_names_the_prompts_that_are_read_in_part(cli, tiny_folder, caplog):
    Path("p.txt").write_text("a circle\n" + "a red circle " * 12)
    words = [f"model={tiny_folder}", "prompts=p.txt", "steps=1", "device=cpu", "out=o"]
    assert cli("sample", *words).code == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith("visiontune")]
    assert len(said) == 1 and "prompts[1] (38 tokens)" in said[0]


def test_sample_uses_the_adapter_and_its_trigger_and_score_reads_the_folder(cli, recipe, tiny_folder):
    assert cli("train", recipe, "train.lr=0.1").code == 0
    words = ["model=" + str(tiny_folder), "prompts=a photo of a [trigger] circle", "steps=2", "seeds=2", "device=cpu"]
    result = cli("sample", *words, "adapter=runs/tiny", "out=with")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in Path("with/manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a photo of a sks circle"] * 2
    assert cli("sample", *words, "adapter=runs/tiny", "adapter_scale=0", "out=without").code == 0
    assert Path("with", rows[0]["file"]).read_bytes() != Path("without", rows[0]["file"]).read_bytes()
    reward = recipe.parent / "brightness.py"
    reward.write_text(
        "from dataclasses import dataclass\nfrom visiontune.schema import option\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Config:\n    gain: float = option(1.0, help='factor')\n"
        "def build(config):\n    return lambda images, prompts, meta: config.gain * images.mean((1, 2, 3))\n"
    )
    scored = cli("score", "with", reward.name, "--out", "scores.json")
    assert scored.code == 0, scored.err
    assert "brightness" in scored.out
    assert len(json.loads(Path("scores.json").read_text())["images"]) == 2


def test_a_run_starts_from_another_ones_adapter_and_goes_on(cli, recipe):
    assert cli("train", recipe, "train.lr=1e-2", "name=broad").code == 0
    start = "adapter.start=runs/broad/adapter.safetensors"
    checked = cli("check", recipe, start, "adapter.rank=3")
    assert checked.code == 0, checked.err
    assert cli("train", recipe, start, "train.lr=1e-12").code == 0
    broad, own = (load_file(f"runs/{name}/adapter.safetensors") for name in ("broad", "tiny"))
    assert all(torch.allclose(own[key], broad[key], atol=1e-6) for key in broad)
    assert adapters.read_header("runs/tiny/adapter.safetensors")["start"] == "runs/broad/adapter.safetensors"
    assert config.load_run("runs/tiny/recipe.yaml").adapter["start"] == "runs/broad/adapter.safetensors"
    whole = cli("train", recipe, start, "name=whole", "train.steps=4", "train.lr=1e-2", "train.schedule=constant")
    assert whole.code == 0, whole.err
    for steps in (2, 4):
        more = ["name=part", "train.lr=1e-2", "train.schedule=constant", "train.resume=true", f"train.steps={steps}"]
        assert cli("train", recipe, start, *more).code == 0
    one, two = (load_file(f"runs/{name}/adapter.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    refused = cli("train", recipe, "train.resume=true")
    assert refused.code == 2 and "adapter.start=runs/broad/adapter.safetensors" in refused.err


def test_a_start_that_is_no_adapter_is_refused(cli, recipe, unchanged):
    with unchanged:
        missing = cli("check", recipe, "adapter.start=nowhere.safetensors")
        assert missing.code == 2 and "adapter.start: there is no adapter file 'nowhere.safetensors'" in missing.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_by_the_command_that_goes_on(cli, recipe, monkeypatch, number):
    optimise = Trainer.optimise

    def signalled(self, step):
        if step == 0:
            os.kill(os.getpid(), number)
        return optimise(self, step)

    monkeypatch.setattr(Trainer, "optimise", signalled)
    result = cli("train", recipe, "name=a b", "train.resume=false", "train.steps=3")
    assert result.code == 128 + number and "a second one ends at once" not in result.out
    command = shlex.split(result.err.rsplit("`", 2)[1])
    assert command == ["visiontune", "train", str(recipe), "name=a b", "train.steps=3", "train.resume=true"]
    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    assert cli(*command[1:]).code == 0
    assert (recipe.parent / "runs" / "a b" / "adapter.safetensors").exists()


def test_a_signal_before_the_first_step_is_one_line(cli, recipe, monkeypatch):
    monkeypatch.setattr("visiontune.assemble.assemble", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    result = cli("train", recipe)
    assert result.code == 143 and result.err.endswith("visiontune: terminated\n")
