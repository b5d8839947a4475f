"""Adapters that have guidance inside are drawn without, and whoever guides them again is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune import adapters
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.pipeline import images

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
    found = [made.save(folder / "distilled.safetensors", told), made.save(folder / "plain.safetensors")]
    made.detach()
    return found


def drawn(out, model, file, **options):
    generate(SampleConfig(prompts=PROMPTS, out=str(out), adapter=str(file), device="cpu", steps=2, **options), model)
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
