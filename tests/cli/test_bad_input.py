"""Every mistake a user can make is one readable line and status 2, with nothing half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from visiontune import adapters, models

ROOT = Path(__file__).parents[2]


def refused(result, *words: str) -> None:
    """Assert status 2 and that the last line, which is the only one of the error, has all the words."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    last = result.err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert last.startswith("visiontune"), last
    for word in words:
        assert word in last
    lines = [line for line in result.err.splitlines() if line.startswith("visiontune")]
    assert lines == [last]


def test_a_missing_folder(cli, recipe, unchanged):
    with unchanged:
        refused(cli("train", recipe, "data.root=./no_such_folder"), "./no_such_folder", "does not exist")


def test_a_folder_without_images(cli, recipe, tmp_path, unchanged):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.pdf").write_text("")
    with unchanged:
        refused(cli("train", recipe, "data.root=empty"), "no images in empty")


def test_a_corrupt_image(cli, recipe, photos, unchanged):
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[: len(whole) // 2])
    with unchanged:
        refused(cli("train", recipe), "1.png", "unreadable")


def test_a_caption_without_its_image(cli, recipe, photos, unchanged):
    (photos / "9.txt").write_text("a photo of nothing")
    with unchanged:
        refused(cli("check", recipe), "9.txt", "captions without an image")


def test_an_image_without_a_caption(cli, recipe, photos, unchanged):
    (photos / "2.txt").unlink()
    with unchanged:
        refused(cli("train", recipe), "2.png", "data.prompt")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ("train.stepz", "did you mean 'steps'?")),
        ("trian.steps=3", ("trian", "did you mean 'train'?")),
        ("adapter.rnk=3", ("adapter.rnk", "did you mean 'rank'?")),
        ("adapter=lorra", ("adapter.name", "'lorra'", "did you mean 'lora'?")),
        ("objective=denoisin", ("objective.name", "did you mean 'denoising'?")),
        ("train.steps=many", ("train.steps must be a whole number", "'many'")),
        ("train.steps=0", ("train.steps must be a whole number from 1 to", "not '0'")),
        ("train.schedule=cosin", ("train.schedule", "did you mean 'cosine'?")),
        ("adapter.targets=to_qq", ("adapter: target 'to_qq' matches no layer", "did you mean 'to_q'?")),
        ("name=../elsewhere", ("name '../elsewhere'",)),
        ("model=./no_such_model", ("./no_such_model",)),
        ("train.steps", ("one recipe at a time",)),
        ("=3", ("not an override",)),
    ],
)
def test_options(cli, recipe, unchanged, override, words):
    more = ["preview.prompts=['a [class]']"] if "class_noun" in override else []
    with unchanged:
        refused(cli("train", recipe, override, *more), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution=2048", ("data.resolution: 2048x2048", "16384 times the 16x16", "at most 64 times")),
        ("objective={name: dreambooth, prior_steps: 1001}", ("objective.prior_steps: 1001 sampling steps",)),
        ("preview={prompts: [a], steps: 1001}", ("preview.steps: 1001 sampling steps", "1000")),
    ],
)
def test_products_that_the_model_cannot_do(cli, recipe, override, words):
    refused(cli("train", recipe, override), *words)


def test_samples_that_the_model_cannot_do(cli, tiny_folder, monkeypatch):
    words = ["sample", f"model={tiny_folder}", "prompts=a circle", "out=o", "device=cpu"]
    refused(cli(*words, "height=2048", "width=2048"), "16384 times the 16x16", "at most 64 times")
    refused(cli(*words, "steps=1001"), "1001 sampling steps", "1000")
    monkeypatch.setattr("visiontune.sampling.pipeline._MOST_PIXELS", 3 * 16**2)
    refused(cli(*words, "seeds=4"), "a batch of 4 pictures of 16x16 has 1024 pixels", "smaller batch_size")
    assert cli(*words, "seeds=4", "batch_size=3", "steps=1").code == 0


def test_very_many_pictures_are_said_first(cli, tiny_folder, monkeypatch):
    monkeypatch.setattr("visiontune.sampling.outlook._MANY", 1)
    result = cli("sample", f"model={tiny_folder}", "prompts=a circle", "out=o", "device=cpu", "seeds=2", "steps=1")
    assert "visiontune: 1 prompts and 2 seeds make 2 pictures of 1 steps each" in result.err.splitlines()[0]


def test_a_hub_id_that_cannot_be_reached(cli, recipe, monkeypatch, unchanged):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with unchanged:
        refused(cli("train", recipe, "model=nobody/no-such-model"), "nobody/no-such-model", "hf download")


def test_a_hub_dataset_that_cannot_be_reached(cli, recipe, monkeypatch, unchanged):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with unchanged:
        refused(cli("train", recipe, "data.root=nobody/no-such-data"), "nobody/no-such-data")


def test_a_folder_that_holds_another_run(cli, recipe, unchanged):
    assert cli("train", recipe).code == 0
    with unchanged:
        refused(cli("train", recipe, "adapter.rank=1"), "runs/tiny", "name=", "train.resume=true")
        refused(cli("check", recipe, "adapter.rank=1"), "runs/tiny", "name=", "train.resume=true")


def test_an_adapter_of_another_base(cli, recipe, tiny_folder, tmp_path, unchanged):
    import torch
    from diffusers import StableDiffusionPipeline

    assert cli("train", recipe).code == 0
    other = StableDiffusionPipeline.from_pretrained(tiny_folder)
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    words = ["adapter=runs/tiny/adapter.safetensors", "prompts=a circle", "device=cpu", "steps=1"]
    refused(cli("sample", "model=other", *words, "out=images"), "base")
    assert not list(tmp_path.glob("images/*.png"))


def test_an_adapter_file_that_is_missing_or_something_else(cli, tiny_folder, tmp_path, unchanged):
    (tmp_path / "notes.safetensors").write_bytes(b"not safetensors at all")
    words = [f"model={tiny_folder}", "prompts=a circle", "steps=1", "out=images"]
    refused(cli("sample", *words, "adapter=nowhere.safetensors"), "nowhere.safetensors")
    refused(cli("sample", *words, "adapter=notes.safetensors"), "notes.safetensors")
    assert not list(tmp_path.glob("images/*.png"))


def test_a_recipe_that_is_missing_misspelt_or_for_another_verb(cli, recipe, unchanged):
    with unchanged:
        refused(cli("train", "nowhere.yaml"), "there is no recipe 'nowhere.yaml'")
        refused(cli("train", "personalise/lorra"), "did you mean 'personalise/lora'?")
        refused(cli("train", "sample/prompts"), "visiontune sample sample/prompts")
        refused(cli("train"), "name a recipe")
    recipe.write_text(recipe.read_text() + "train: {}\n")
    refused(cli("train", recipe), "'train' is given twice")


def test_the_command_line_itself(cli, unchanged):
    with unchanged:
        refused(cli("trian"), "invalid choice: 'trian'")
        refused(cli("train", "personalise/lora", "--steps", "3"), "unknown argument: --steps")
        refused(cli("show", "ltora"), "did you mean 'lora'?")
        refused(cli("list", "adaptors"), "invalid choice: 'adaptors'")
        refused(cli("copy", "personalise/lorra"), "did you mean 'personalise/lora'?")
        refused(cli("score", "nowhere", "oracle"), "no folder nowhere")


def test_score_refuses_unknown_rewards_options_and_formats(cli, photos, unchanged):
    with unchanged:
        refused(cli("score", photos), "at least one reward")
        refused(cli("score", photos, "oracel"), "oracel.name", "did you mean 'oracle'?")
        refused(cli("score", photos, "oracle", "oracle.subjekt=bumble"), "did you mean 'subject'?")
        refused(cli("score", photos, "oracle", "orakle.subject=bumble"), "'orakle'")
        refused(cli("score", photos, "oracle", "--out", "scores.txt"), "scores.txt")


def test_score_writes_what_it_has_before_it_complains(cli, photos):
    Path("picky.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    gain: float = 1.0\n"
        "def build(config):\n    return lambda images, prompts, meta: [config.gain] * len(images)\n"
    )
    assert "2.5000" in cli("score", photos, "picky.py", "picky.gain=2.5").out
    Path("broken.py").write_text(Path("picky.py").read_text().replace("[config.gain]", "[float('nan')]"))
    result = cli("score", photos, "broken.py", "brightness", "--out", "scores.csv")
    refused(result, "no score of 'broken' for 3 of 3 images; first 0.png", "not finite")
    assert "brightness" in result.out
    assert len(Path("scores.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_cannot_be_written(cli, recipe, monkeypatch, code):
    def full(*_):
        raise OSError(code, "no room", "runs/tiny/recipe.yaml")

    monkeypatch.setattr("visiontune.files.write_text", full)
    words = ["the disk that holds runs/tiny is full"] if code == errno.ENOSPC else ["runs/tiny/recipe.yaml", "no room"]
    refused(cli("train", recipe), *words)
    assert not (recipe.parent / "runs/tiny/recipe.yaml").exists()


def test_interruption_is_not_an_error_report(cli, recipe, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("visiontune.assemble.assemble", stop)
    result = cli("train", recipe)
    assert result.code == 130 and "Traceback" not in result.err


def test_the_installed_command_reports_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "visiontune", "train", "personalise/nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("visiontune: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("prompts", ["gone.csv", "gone.txt", "~nobody-is-called-so/a.txt", "a" * 300 + ".txt"])
def test_a_list_of_prompts_that_is_not_there(cli, tiny_folder, prompts, unchanged):
    with unchanged:
        refused(cli("sample", f"model={tiny_folder}", f"prompts={prompts}", "out=o"), "prompts file")


# Every verb that reads adapter files, on one that is damaged in its header and one in its tensors.
READERS = {
    "sample": ("sample", "prompts=a", "adapter={}", "steps=1", "device=cpu", "out=o", "model={base}"),
    "export": ("export", "{}", "out.safetensors", "--model", "{base}"),
    "train": ("train", "{recipe}", "adapter.start={}"),
    "train under": ("train", "{recipe}", "adapter.under={}"),
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("damage", ["header", "tensors", "pipe"])
def test_a_damaged_adapter_file(cli, recipe, tiny_folder, tmp_path, verb, damage, unchanged):
    assert cli("train", recipe, "name=whole").code == 0
    file = tmp_path / "bad.safetensors"
    if damage == "pipe":
        os.mkfifo(file)
    else:
        with safe_open(tmp_path / "runs" / "whole" / "adapter.safetensors", "pt") as whole:
            metadata, tensors = whole.metadata(), {name: whole.get_tensor(name) for name in whole.keys()}  # noqa: SIM118
        if damage == "header":
            del metadata["base_hash"]
        else:
            tensors[min(tensors)][0] = float("nan")
        save_file(tensors, file, metadata)
    words = [word.format(file, base=tiny_folder, recipe=recipe) for word in READERS[verb]]
    reason = {"header": "it has no 'base_hash'", "tensors": "not finite", "pipe": "is a pipe"}[damage]
    with unchanged:
        refused(cli(*words), str(file), reason)


def test_an_adapter_that_does_not_say_its_base(cli, tiny_folder, tmp_path, unchanged):
    made = adapters.attach(models.load(str(tiny_folder)).of("denoiser"), "lora", rank=2)
    made.save(tmp_path / "a.safetensors")
    with unchanged:
        for words, option in (
            (("sample", "prompts=a", "adapter=a.safetensors", "out=o"), "model="),
            (("export", "a.safetensors", "e.safetensors"), "--model"),
        ):
            refused(cli(*words), "does not say what it was trained on", option)
    assert cli("export", "a.safetensors", "e.safetensors", "--model", tiny_folder).code == 0


@pytest.mark.parametrize("place", ["f/o", "loop", "/proc/o", "~nosuchuser/o", "k" * 300])
@pytest.mark.parametrize("verb", ["train", "sample", "export", "score", "demo", "copy"])
def test_a_place_that_cannot_be_written(cli, recipe, photos, tiny_folder, unchanged, verb, place):
    Path("f").write_text("a file")
    Path("loop").symlink_to("loop")
    out = "loop/o" if place == "loop" else place
    words = {
        "train": ("train", recipe, f"out={out}"),
        "sample": ("sample", "prompts=a", f"model={tiny_folder}", f"out={out}", "device=cpu", "steps=1"),
        "export": ("export", "nothing", f"{out}.safetensors"),
        "score": ("score", photos, "brightness", "--out", f"{out}.json"),
        "demo": ("demo", "--out", out),
        "copy": ("copy", "personalise/oft", f"{out}/recipe.yaml"),
    }[verb]
    with unchanged:
        result = cli(*words)
    assert result.code == 2 and result.err.count("visiontune: ") == 1
    assert len([line for line in result.err.splitlines() if line.startswith("visiontune: ")]) == 1, result.err


@pytest.mark.parametrize("taken", ["grid.png", "manifest.jsonl", "00000_seed0.png"])
def test_a_folder_where_sampling_writes_a_file(cli, tiny_folder, taken):
    Path("o", taken).mkdir(parents=True)
    refused(cli("sample", "prompts=a", f"model={tiny_folder}", "out=o", "device=cpu", "steps=1"), taken, "move it away")
