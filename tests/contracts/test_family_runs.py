"""What a user does with a family, from recipe to export, on its tiny pipeline: every family of continuous latents.

Runs are of two steps. What they draw, resume and export is judged by the stock pipeline of the family.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_training import interrupt
from workshop import Workshop

from visiontune import adapters, models
from visiontune.cli.main import main
from visiontune.core import Request
from visiontune.models.diffusion import DiffusionModel
from visiontune.weights.keys import Keys, keys_of

FAMILIES = sorted(name for name, cls in models.families().items() if issubclass(cls, DiffusionModel))
REQUESTS = [Request(prompt="a red circle", seed=1), Request(prompt="small", seed=2)]


@pytest.fixture(scope="module", params=FAMILIES)
def shop(request, tmp_path_factory) -> Workshop:
    return Workshop(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def personal(shop) -> Path:
    """The adapter of a personalisation."""
    return shop.personalise("personal").fit()


def drawn(model, requests=REQUESTS):
    return model.draw(requests, steps=3, guidance=model.guidance(3.0))


def moved(file: Path) -> bool:
    """Whether training changed what starts at zero: all but the few layers whose outputs a family does not use."""
    changes = [tensor.any().item() for name, tensor in load_file(file).items() if name.endswith("up")]
    return len(changes) > 4 and sum(changes) > 0.8 * len(changes)


def logged(folder: Path, name: str) -> list[float]:
    """What a run logged under a name, in order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_data_and_prior_pictures_train_an_adapter_of_every_part(shop, personal):
    folders = list((shop.folder / "runs" / ".cache").glob("prior-*"))
    assert len(folders) == 1 and len(list(folders[0].glob("*.png"))) == 2
    header = adapters.read_header(personal)
    assert {layer.split(".")[0] for layer in header["layers"]} == {*shop.open().DENOISERS, "text_encoder"}
    assert moved(personal)


@pytest.fixture(scope="module")
def rewarded(shop) -> Path:
    """The adapter of GRPO."""
    return shop.grpo("rewarded").fit()


@pytest.mark.parametrize(("recipe", "result"), [("personalise", "personal"), ("grpo", "rewarded")])
def test_an_interrupted_run_ends_in_the_same_bits(shop, recipe, result, request):
    train, whole = getattr(shop, recipe), load_file(request.getfixturevalue(result))
    interrupt(train(f"{recipe}-broken"), 1)
    broken = load_file(train(f"{recipe}-broken", "train.resume=true").fit())
    assert whole.keys() == broken.keys() and len(whole) > 4
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    assert any(tensor.any() for name, tensor in whole.items() if name.endswith("up"))


def test_to_its_steps_an_assistant_under_the_adapter_is_a_base_with_it_merged(shop, personal, tmp_path):
    merged = tmp_path / "merged"
    assert main(["export", str(personal), str(merged), "--format", "merged", "--dtype", "fp32"]) == 0
    common = ["objective.prior=none", "train.optimizer=sgd", "train.lr=0.1", "train.log_every=1"]
    bases = {"over": [f"adapter.under={personal}"], "base": [f"model={merged}"], "plain": []}
    found = {name: load_file(shop.personalise(name, *common, *more).fit()) for name, more in bases.items()}
    losses = {name: logged(shop.folder / "runs" / name, "loss") for name in bases}
    assert losses["over"] == pytest.approx(losses["base"], rel=1e-5)
    assert abs(losses["over"][0] - losses["plain"][0]) > 1e-4
    for name, tensor in found["base"].items():
        torch.testing.assert_close(found["over"][name], tensor, rtol=0, atol=1e-5)
    first = "samples/step-000000/00_seed0.png"
    over, base, plain = ((shop.folder / "runs" / name / first).read_bytes() for name in bases)
    assert over == plain != base


def test_a_rewards_gradient_reaches_the_adapter_through_the_sampler(shop):
    assert moved(shop.reward("reward_tune/alignprop", "prop", "train.batch_size=2").fit())


def test_sample_draws_what_the_stock_pipeline_draws_with_the_adapter(shop, personal, tmp_path):
    for name, more in (("adapted", [f"adapter={personal}"]), ("plain", [])):
        words = [f"model={shop.model}", f"out={tmp_path / name}", "prompts=a red circle", "seeds=[1]", "steps=3"]
        assert main(["sample", *words, "cfg_scale=3", "device=cpu", *more]) == 0
        model = shop.open()
        if more:
            adapters.load(model.networks(), personal).eval()
        with Image.open(tmp_path / name / "00000_seed1.png") as read:
            np.testing.assert_array_equal(
                np.asarray(read), (drawn(model, REQUESTS[:1])[0] * 255).round().astype("uint8")
            )
    first, second = ((tmp_path / name / "00000_seed1.png").read_bytes() for name in ("adapted", "plain"))
    assert first != second


def test_the_stock_pipeline_loads_an_exported_lora_and_draws_the_same(shop, personal, tmp_path, capsys):
    ours = shop.open()
    denoiser, loads = ours.names()[0], getattr(ours.pipe, "_lora_loadable_modules", ())
    refused = next((name for name in (denoiser, "text_encoder") if name not in loads), None)
    if refused:
        assert main(["export", str(personal), str(tmp_path / "lora.safetensors")]) == 2
        assert f"loads no LoRA of its {refused}" in capsys.readouterr().err
        personal = shop.denoiser
    # Where the pipeline takes none at all, PEFT puts it into its network.
    out, kind = (tmp_path / "lora.safetensors", "diffusers") if denoiser in loads else (tmp_path / "lora", "peft")
    assert main(["export", str(personal), str(out), "--format", kind, "--dtype", "fp32"]) == 0
    plain = drawn(ours)
    adapters.load(ours.networks(), personal).eval()
    cls = type(ours)
    stock = type(ours.pipe).from_pretrained(shop.model, **cls.load_options)
    if kind == "diffusers":
        stock.load_lora_weights(str(tmp_path), weight_name=out.name)
    else:
        PeftModel.from_pretrained(getattr(stock, denoiser), str(out))
    found = drawn(cls(stock))
    np.testing.assert_allclose(found, drawn(ours), rtol=0, atol=1e-5)
    assert abs(found - plain).max() > 1e-3


def test_a_merged_model_is_a_model_of_the_family_and_draws_the_same(shop, personal, tmp_path):
    options = ["--format", "merged", "--dtype", "fp32"]
    assert main(["export", str(personal), str(tmp_path / "merged"), *options]) == 0
    ours = shop.open()
    adapters.load(ours.networks(), personal).eval()
    merged = shop.open(tmp_path / "merged")
    assert merged.family == shop.family
    np.testing.assert_allclose(drawn(merged), drawn(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["kohya", "diff"])
def test_what_is_written_for_other_tools_is_read_back_and_draws_the_same(shop, personal, tmp_path, capsys, kind):
    """Or is refused in one line: for the family, or for a text encoder that the tools have no names for."""
    written, back = (str(tmp_path / f"{name}.safetensors") for name in ("written", "back"))
    words = [written, "--format", kind, "--dtype", "fp32"]
    known = type(keys_of(shop.family, {})) is not Keys
    if main(["export", str(personal), *words]) == 2:
        refusal = capsys.readouterr().err
        assert refusal.count("\n") == 1 and not Path(written).exists()
        assert (
            "no name for 'text_encoder." if known else f"no names for the layers of the family '{shop.family}'"
        ) in refusal
        if not known:
            return
        personal = shop.denoiser
        assert main(["export", str(personal), *words]) == 0
    assert known and main(["import", written, back, "--model", str(shop.model)]) == 0
    theirs, ours = shop.open(), shop.open()
    adapters.load(theirs.networks(), back).eval()
    adapters.load(ours.networks(), personal).eval()
    np.testing.assert_allclose(drawn(theirs), drawn(ours), rtol=0, atol=1e-5)
    assert abs(drawn(shop.open()) - drawn(ours)).max() > 1e-3
