"""ScaleLong in training: long skips scaled by depth wherever the model is used, and nowhere in the untrained model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import save_tiny, tiny_model

from visiontune import adapters, assemble, models
from visiontune.adapters.lora import Config as Lora
from visiontune.config import load_run
from visiontune.errors import UserError
from visiontune.guidance.stack import GuidanceStack
from visiontune.models._skips import set_skips
from visiontune.ops.skips import as_opened, kappa_of
from visiontune.sampling.pipeline import images
from visiontune.training.lending import reference

KAPPA = 0.75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("skips") / "tiny")


def drawn(model, **options):
    return images(model, ["a red circle"], [0], steps=2, height=16, width=16, **options)


def conditions(model, rows=2):
    torch.manual_seed(0)
    x = torch.randn(rows, *model.latent_shape(), requires_grad=True)
    return x, torch.full((rows,), 500), model.embed(["a red circle"] * rows)


def test_pictures_are_those_of_the_sampling_term_and_kappa_one_changes_no_bit(folder):
    plain = models.load(str(folder))
    term = GuidanceStack.of([{"cfg": 4}, {"scalelong": {"scale": KAPPA}}])
    assert (drawn(models.load(str(folder), skips=KAPPA)) == drawn(plain, guidance=term)).all()
    assert (drawn(models.load(str(folder), skips=1)) == drawn(plain)).all()
    assert (drawn(plain, guidance=term) != drawn(plain)).any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_skip_is_scaled_in_a_training_step_too(folder, checkpointing):
    model = models.load(str(folder), skips=KAPPA)
    unet, seen = model.pipe.unet, []

    def note(stage, args, given):
        seen.append(given["res_hidden_states_tuple"])

    handles = [stage.register_forward_pre_hook(note, with_kwargs=True) for stage in unet.up_blocks]
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    x, t, cond = conditions(model)
    model.predict(x, t, cond).square().mean().backward()
    scaled, seen[:] = [skip for stage in seen for skip in reversed(stage)], []
    with as_opened([unet]):
        model.predict(x, t, cond)
    plain = [skip for stage in seen for skip in reversed(stage)]
    for handle in handles:
        handle.remove()
    assert len(scaled) == len(plain) >= 4
    for exponent, one, other in zip(reversed(range(len(plain))), scaled, plain, strict=True):
        torch.testing.assert_close(one, other * KAPPA**exponent)
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_untrained_model_has_the_skips_of_its_checkpoint(folder):
    model, plain = models.load(str(folder), skips=KAPPA), models.load(str(folder))
    made = adapters.attach(model.of("denoiser"), Lora(rank=2), targets="attention", presets=model.presets(["unet"]))
    x, t, cond = conditions(plain)
    with torch.no_grad():
        base, own = plain.predict(x, t, cond), model.predict(x, t, cond)
        with reference(made, {}, [model.pipe.unet])():
            assert torch.equal(model.predict(x, t, cond), base)
        assert torch.equal(model.predict(x, t, cond), own) and not torch.equal(own, base)
        copied = copy.deepcopy(model.pipe.unet)
        with as_opened([copied]):
            assert torch.equal(model.predict(x, t, cond), own)


def test_a_saved_model_opens_as_it_was_and_says_what_a_stock_pipeline_leaves_out(folder, tmp_path):
    model = models.load(str(folder), skips=KAPPA)
    model.save(tmp_path / "saved")
    again = models.load(str(tmp_path / "saved"))
    assert kappa_of(again.networks().values()) == KAPPA
    assert (drawn(again) == drawn(model)).all()
    with as_opened(again.networks().values()):  # its checkpoint is one of scaled skips
        assert (drawn(again) == drawn(model)).all()
    assert json.loads((tmp_path / "saved" / "unet" / "config.json").read_text())["skip_scale"] == KAPPA
    assert (drawn(models.load(str(tmp_path / "saved"), skips=1)) == drawn(models.load(str(folder)))).all()


def test_a_run_says_it_in_its_file_and_samples_take_it_from_there(folder, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "a.txt").write_text("a red circle")
    given = {
        "out": tmp_path, "name": "run", "model.source": folder, "model.skips": KAPPA, "data.root": tmp_path / "data",
        "train.steps": 1, "train.batch_size": 1, "objective": "denoising", "data.resolution": 16, "judge": "none",
        "preview.prompts": "[]", "adapter.rank": 2,
    }  # fmt: skip
    file = assemble.assemble(load_run("personalise/lora", [f"{key}={value}" for key, value in given.items()])).fit()
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["skips"] == str(KAPPA)
    with pytest.raises(UserError, match=r"trained with model\.skips=0\.75, and this model has 1: open it with that"):
        adapters.load(models.load(str(folder)).networks(), file)
    adapters.load(models.load(str(folder), skips=KAPPA).networks(), file)


def test_models_without_long_skips_are_refused():
    with pytest.raises(UserError, match=r"model\.skips is for UNets, and 'tiny-sd3' \(sd3\) has no long skips"):
        set_skips(tiny_model("sd3"), KAPPA)
    with pytest.raises(UserError, match=r"model\.skips=0\.3 is out of range: take one from 0\.5 to 1"):
        set_skips(tiny_model("sd"), 0.3)
