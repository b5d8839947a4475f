"""``adapter.under`` and distilled models, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model

from visiontune import adapters, config, models
from visiontune.estimate import measure
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of

SGD = ["train.optimizer=sgd", "train.lr=0.5"]


def moved(made, std=0.4):
    """A set with random values."""
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * std)
    return made


def assistant(path, parts=("denoiser",), targets=("to_k", "to_v"), **options):
    """The file of a LoRA that moves a tiny model much."""
    made = moved(adapters.attach(tiny_model(**options).of(*parts), "lora", targets=list(targets), rank=3))
    return made.save(path)


def adapter(name):
    return load_file(f"runs/{name}/adapter.safetensors")


def apart(one, other):
    """The greatest difference of two runs' results."""
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    return max(float((tensor - second[key]).abs().max()) for key, tensor in first.items())


def test_it_is_in_the_recipe_the_header_and_the_card_and_not_in_the_tensors(cli, recipe):
    assistant("assistant.safetensors")
    done = cli("train", recipe, "adapter.under=assistant.safetensors")
    assert done.code == 0, done.err
    assert cli("train", recipe, "name=plain").code == 0
    assert adapter("tiny").keys() == adapter("plain").keys() and apart("tiny", "plain") > 1e-6
    assert adapters.read_header("runs/tiny/adapter.safetensors")["under"] == "assistant.safetensors"
    assert config.load_run("runs/tiny/recipe.yaml").adapter["under"] == "assistant.safetensors"
    assert "under" not in yaml.safe_load(Path("runs/plain/recipe.yaml").read_text())["adapter"]
    assert "| trained over (not needed to use it) | assistant.safetensors |" in Path("runs/tiny/README.md").read_text()


def test_check_tells_of_it_and_counts_its_memory(cli, recipe, unchanged):
    file = assistant("assistant.safetensors")
    with unchanged:
        plain, over = (cli("check", recipe, *more) for more in ([], [f"adapter.under={file}"]))
        costs = [measure(config.load_run(recipe, more)) for more in ([], [f"adapter.under={file}"])]
    line = "under the adapter in every step: assistant.safetensors (lora on 16 layers); pictures and the result are"
    assert over.code == 0 and line in over.out and line not in plain.out
    held = sum(tensor.nbytes for tensor in load_file(file).values())
    assert costs[1].parameter_bytes - costs[0].parameter_bytes == held
    assert (costs[1].trained, costs[1].layers) == (costs[0].trained, costs[0].layers)


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "peft", "run folder"])
def test_adapters_of_other_tools_lie_there_as_their_own_do(cli, recipe, tiny_folder, kind):
    own = assistant("assistant.safetensors")
    assert cli("train", recipe, f"adapter.under={own}", "name=own", *SGD).code == 0
    given = Path("foreign" if kind in ("peft", "run folder") else "foreign.safetensors")
    if kind == "run folder":
        given.mkdir()
        shutil.copy(own, given / "adapter.safetensors")
    else:
        model = models.load(str(tiny_folder))
        networks = model.networks()
        loaded = adapters.load(networks, own)
        export(loaded, given, kind, dtype=torch.float32, keys=keys_of(model.family, networks), model=model)
    done = cli("train", recipe, f"adapter.under={given}", "name=other", *SGD)
    assert done.code == 0, done.err
    assert cli("train", recipe, "name=plain", *SGD).code == 0
    assert apart("own", "other") < 1e-6 < 1e-4 < apart("own", "plain")


def test_a_run_goes_on_over_the_same_content_alone(cli, recipe, unchanged):
    file = assistant("assistant.safetensors")
    over = [recipe, f"adapter.under={file}", "train.schedule=constant", "train.lr=0.01"]
    assert cli("train", *over, "name=whole", "train.steps=4").code == 0
    for steps in (2, 4):
        more = cli("train", *over, "name=part", "train.resume=true", f"train.steps={steps}")
        assert more.code == 0, more.err
    assert apart("whole", "part") == 0
    moved(adapters.load(tiny_model().networks(), file), 0.1).save(file)
    with unchanged:
        for verb in ("check", "train"):
            other = cli(verb, *over, "name=part", "train.resume=true", "train.steps=6")
            assert other.code == 2 and "hash of adapter.under=" in other.err and "set it back" in other.err
        none = cli("train", recipe, "name=part", "train.resume=true", "train.steps=6", "train.lr=0.01")
        assert none.code == 2 and "adapter.under=assistant.safetensors, not None" in none.err


def test_what_it_changes_is_left_in_no_cache(cli, recipe):
    """A text encoder's captions, and the pictures of prior preservation, are the base's own."""
    file = assistant("assistant.safetensors", ("denoiser", "text"), ("to_k", "to_v", "q_proj", "v_proj"))
    prior = ["objective.name=dreambooth", "objective.prior_images=2", "objective.prior_steps=2"]
    for out, first in (("over", [f"adapter.under={file}"]), ("plain", [])):
        done = cli("train", recipe, *prior, f"out={out}", "name=first", *first, *SGD)
        assert done.code == 0, done.err
        assert cli("train", recipe, *prior, f"out={out}", "name=then", *SGD).code == 0
    (pictures,), (others,) = (sorted(Path(out, ".cache").glob("prior-*")) for out in ("over", "plain"))
    assert pictures.name == others.name and len(list(pictures.glob("*.png"))) == 2
    for picture in pictures.glob("*.png"):
        assert picture.read_bytes() == (others / picture.name).read_bytes()
    first, then = (
        [load_file(Path(out, name, "adapter.safetensors")) for out in ("over", "plain")] for name in ("first", "then")
    )
    assert all(torch.equal(tensor, then[1][key]) for key, tensor in then[0].items())
    assert any(not torch.allclose(tensor, first[1][key], atol=1e-4) for key, tensor in first[0].items())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nowhere.safetensors", "adapter.under: there is no adapter file or run folder 'nowhere.safetensors'"),
        ("empty", "adapter.under: there is no adapter empty/adapter.safetensors"),
        ("notes.txt", "adapter.under: notes.txt is no safetensors file"),
        ("vae.safetensors", "adapter.under: vae.safetensors changes vae, and what is encoded once serves all runs"),
        ("other.safetensors", "adapter.under: other.safetensors: no layer for 'transformer."),
        ("base.safetensors", "adapter.under: base.safetensors: trained on other base weights"),
        ("strange.safetensors", "adapter.under: strange.safetensors"),
    ],
)
def test_what_cannot_lie_there_is_refused_in_one_line(cli, recipe, unchanged, word, message):
    Path("empty").mkdir()
    Path("notes.txt").write_text("notes")
    if word == "vae.safetensors":
        assistant(word, ("vae",), ("to_k",))
    if word == "other.safetensors":
        assistant(word, family="sd3")
    if word == "base.safetensors":
        model = tiny_model()
        with torch.no_grad():
            model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(2)
        moved(adapters.attach(model.of("denoiser"), "lora", targets=["to_k"], rank=2)).save(word)
    if word == "strange.safetensors":
        save_file({f"unet.nowhere.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}, word)
    with unchanged:
        for verb in ("check", "train"):
            refused = cli(verb, recipe, f"adapter.under={word}")
            assert refused.code == 2 and message in refused.err, refused.err
            assert refused.err.count("\n") == 1


def test_a_distilled_model_is_trained_over_an_assistant_or_when_told_so(cli, recipe, tmp_path, unchanged):
    model = save_tiny(tmp_path / "quick", "flux", schnell=True)
    file = assistant("assistant.safetensors", family="flux", schnell=True)
    common = [recipe, f"model={model}"]
    with unchanged:
        for objective in ("denoising", "dreambooth"):
            for verb in ("check", "train"):
                refused = cli(verb, *common, f"objective={objective}")
                assert refused.code == 2 and "was distilled to few steps (neither guidance_embeds" in refused.err
                assert "(adapter.under=FILE), or set objective.distilled=true" in refused.err
    for more in ([f"adapter.under={file}"], ["objective.name=denoising", "objective.distilled=true"]):
        done = cli("check", *common, *more)
        assert done.code == 0, done.err
    drawn = cli("sample", f"model={model}", "prompts=a", "steps=1", "device=cpu", "out=o", "cfg_scale=1")
    assert drawn.code == 0, drawn.err


def test_it_lies_on_quantised_weights_too(cli, recipe):
    file = assistant("assistant.safetensors")
    for name, more in (("over", [f"adapter.under={file}"]), ("plain", [])):
        done = cli("train", recipe, f"name={name}", "model.quantize=int8", "train.log_every=1", *more, *SGD)
        assert done.code == 0, done.err
    assert cli("train", recipe, "name=full", "train.log_every=1", f"adapter.under={file}", *SGD).code == 0
    over, plain, full = (
        json.loads(Path("runs", name, "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("over", "plain", "full")
    )
    assert over == pytest.approx(full, rel=0.01) and abs(plain - full) > 2 * abs(over - full)
