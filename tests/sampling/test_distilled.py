"""Adapters that have guidance inside, or few steps, are drawn so, and whoever draws them otherwise is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.pipeline import images
from visiontune.sampling.sources import settled

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("sd")


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """An adapter that says that guidance is distilled into it, and the same one without the word."""
    made = adapters.attach(model.of("denoiser"), "lora", targets="attention", presets=model.presets())
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    folder = tmp_path_factory.mktemp("adapters")
    told = {"distilled_guidance": json.dumps({"cfg_scale": 3.0})}
    few = {"few_steps": json.dumps({"steps": 3, "scheduler": "euler"})}
    wrong = {"few_steps": json.dumps({"steps": 0})}
    found = [
        made.save(folder / f"{name}.safetensors", header)
        for name, header in {"distilled": told, "plain": None, "few": few, "wrong": wrong}.items()
    ]
    made.detach()
    return found


def drawn(out, model, file, **options):
    options = {"steps": 2, **options}
    generate(SampleConfig(prompts=PROMPTS, out=str(out), adapter=str(file), device="cpu", **options), model)
    pictures = [Image.open(path) for path in sorted(out.glob("0*.png"))]
    return np.stack([np.array(picture) for picture in pictures])


@pytest.mark.parametrize("kind", [0, 1])
def test_the_scale_is_that_of_the_adapter_unless_it_is_given(tmp_path, model, files, caplog, kind):
    found = drawn(tmp_path, model, files[kind])
    loaded = adapters.load(model.networks(), files[kind])
    expected = images(model, PROMPTS, 0, steps=2, cfg_scale=(1.0, 4.0)[kind])
    loaded.detach()
    assert np.array_equal(found, expected) and "guided again" not in caplog.text
    first = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])
    assert first["settings"]["cfg_scale"] == (1.0, 4.0)[kind]


@pytest.mark.parametrize("options", [{"cfg_scale": 2.0}, {"guidance": [{"cfg": 2}]}])
def test_guiding_it_twice_is_told(tmp_path, model, files, caplog, options):
    drawn(tmp_path / "twice", model, files[0], **options)
    assert 'cfg_scale": 3.0}), and is guided again' in caplog.text
    caplog.clear()
    drawn(tmp_path / "once", model, files[1], **options)
    drawn(tmp_path / "none", model, files[0], cfg_scale=1.0)
    assert "guided again" not in caplog.text


def test_an_adapter_of_few_steps_is_drawn_in_those_by_its_sampler(tmp_path, model, files, caplog):
    found = drawn(tmp_path, model, files[2], steps=None)
    loaded = adapters.load(model.networks(), files[2])
    expected = images(model, PROMPTS, 0, steps=3, cfg_scale=4.0, scheduler="euler")
    loaded.detach()
    assert np.array_equal(found, expected) and "was made for" not in caplog.text
    settings = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["steps"], settings["scheduler"]) == (3, "euler")


@pytest.mark.parametrize("options", [{"steps": 2}, {"steps": None, "scheduler": "ddim"}])
def test_other_steps_than_it_was_made_for_are_told(tmp_path, model, files, caplog, options):
    drawn(tmp_path, model, files[2], **options)
    assert "was made for 3 steps of euler, not" in caplog.text


def test_an_adapter_that_says_nonsense_of_its_steps_is_refused(tmp_path, model, files):
    with pytest.raises(UserError, match=r"wrong\.safetensors: few_steps\.steps must be .* not 0"):
        drawn(tmp_path, model, files[3], steps=None)


def test_what_no_adapter_says_is_as_the_model_came(tmp_path, model, files):
    found = settled(SampleConfig(prompts=PROMPTS, adapter=str(files[1])))
    assert (found.steps, found.scheduler, found.cfg_scale) == (25, "model", 4.0)
