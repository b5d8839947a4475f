"""``train.parts`` with ``trigger``: the embedding of the user's word is trained beside an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from visiontune import adapters, config
from visiontune.assemble import assemble

OPTIONS = ["train.trigger_lr=0.1", "train.weight_decay=5", "objective={name: dreambooth, prior_images: 2}"]
OPTIONS += ["objective.prior_steps=1", "objective.prior_prompts=[a square]", "data.trigger=red"]


def rows(path: str) -> torch.Tensor:
    (found,) = [tensor for name, tensor in load_file(path).items() if name.endswith(".rows")]
    return found


@pytest.mark.usefixtures("glance")
@pytest.mark.parametrize("parts", ["[denoiser, trigger]", "[denoiser, text, trigger]"])
def test_the_word_is_learnt_at_its_own_rate_and_prompts_without_it_stay(cli, recipe, parts):
    checked = cli("check", recipe, f"train.parts={parts}", *OPTIONS)
    assert checked.code == 0 and "trained word: 'red' in text_encoder.embeddings.token_embedding" in checked.out
    result = cli("train", recipe, f"train.parts={parts}", *OPTIONS)
    assert result.code == 0, result.err
    assert "`red`, whose meaning is part of the weights" in Path("runs/tiny/README.md").read_text()
    file = Path("runs/tiny/adapter.safetensors")
    # Two steps of AdamW at 0.1: no decay, which would have halved it.
    moved = rows(file).abs()
    assert 0.1 < float(moved.median()) <= 0.2 + 1e-4
    model = tiny_model()
    prompts = ["a red circle", "a circle"]
    with torch.no_grad():
        before = model.embed(prompts).tokens
        adapters.load(model.networks(), file)
        after = model.embed(prompts).tokens
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1], before[1]) == ("text" not in parts)
    drawn = cli("sample", "adapter=runs/tiny", "prompts=[a red circle]", "steps=1", "seeds=1")
    assert drawn.code == 0, drawn.err
    judged = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--checkpoints")
    assert judged.code == 0, judged.err


def test_the_word_alone_is_a_textual_inversion(cli, recipe):
    """No weight is changed: the file, and what other tools get of it, is the word."""
    words = ["train.parts=[trigger]", *OPTIONS, "objective.prior=none"]
    checked = cli("check", recipe, *words)
    assert checked.code == 0 and "adapted layers: none; words alone are trained" in checked.out
    result = cli("train", recipe, *words)
    assert result.code == 0, result.err
    file = Path("runs/tiny/adapter.safetensors")
    assert len(load_file(file)) == 1 and float(rows(file).abs().median()) > 0.1
    assert adapters.read_header(file)["layers"] == []
    model = tiny_model()
    before = {name: p.clone() for name, p in model.main.named_parameters()}
    with torch.no_grad():
        plain = model.embed(["a circle", "a red circle"]).tokens
        adapters.load(model.networks(), file)
        told = model.embed(["a circle", "a red circle"]).tokens
    assert torch.equal(told[0], plain[0]) and not torch.equal(told[1], plain[1])
    assert all(torch.equal(p, before[name]) for name, p in model.main.named_parameters())
    assert cli("sample", "adapter=runs/tiny", "prompts=[a red circle]", "steps=1", "seeds=1").code == 0
    exported = cli("export", file, "out.safetensors", "--format", "diffusers")
    assert exported.code == 0, exported.err
    assert not Path("out.safetensors").exists()
    assert load_file("out-red.safetensors").keys() == {"red"}


def test_a_run_that_goes_on_ends_in_the_same_bits(cli, recipe):
    words = ("train.parts=[denoiser, trigger]", *OPTIONS, "train.steps=3")
    assert cli("train", recipe, "name=whole", *words).code == 0
    trainer = assemble(config.load_run(recipe, ["name=broken", *words]))
    done = trainer._after

    def stop(step, metrics):
        done(step, metrics)
        if step == 2:
            raise KeyboardInterrupt

    trainer._after = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    del trainer
    assert cli("train", recipe, "name=broken", *words, "train.resume=true").code == 0
    one, two = (load_file(f"runs/{name}/adapter.safetensors") for name in ("whole", "broken"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_reader_of_matrices_leaves_the_rows_to_plain_steps(cli, recipe):
    words = ("train.parts=[denoiser, trigger]", *OPTIONS, "train.optimizer=galore", "train.matrix_options={rank: 2}")
    result = cli("train", recipe, *words, "adapter={name: lora, rank: 4}")
    assert result.code == 0, result.err
    assert float(rows("runs/tiny/adapter.safetensors").abs().median()) > 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.parts=[trigger]", "adapter=none"], "trained beside an adapter"),
        (["train.parts=[denoiser, trigger]", "adapter=none"], "trained beside an adapter"),
        (["train.part_lr={trigger: 0.1}"], "whose rate is train.trigger_lr"),
        (["train.parts=[denoiser, triger]"], "has no part 'triger'"),
    ],
)
def test_what_cannot_be_is_one_line(cli, recipe, words, message):
    result = cli("train", recipe, *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not Path("runs/tiny").exists()


def test_two_subjects_have_two_words_in_one_file(cli, recipe, photos):
    others = photos.with_name("others")
    shutil.copytree(photos, others)
    words = [*OPTIONS, "train.parts=[denoiser, trigger]", "train.batch_size=4", "train.steps=3"]
    second = f"data.subjects=[{{root: {others}, trigger: blue, class_noun: square}}]"
    checked = cli("check", recipe, *words, second)
    assert checked.code == 0, checked.err
    assert "'red'" in checked.out and "'blue'" in checked.out
    result = cli("train", recipe, *words, second)
    assert result.code == 0, result.err
    assert (rows("runs/tiny/adapter.safetensors").abs().median(1).values > 0.1).all()
    header = adapters.read_header("runs/tiny/adapter.safetensors")
    assert header["trigger"] == "red" and header["modelspec.trigger_phrase"] == "red, blue"
    (own,) = header["words"].values()
    assert list(own) == ["red", "blue"]
    judged = cli("train", recipe, *words, second, "name=judged", "judge={clip: pocket/clip}")
    assert judged.code == 2 and "set judge=none" in judged.err
    same = cli("train", recipe, *words, second.replace("blue", "red"), "name=same")
    assert same.code == 2 and "goes by 'red'" in same.err
