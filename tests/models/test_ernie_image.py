"""What ERNIE-Image has of its own: the constant in its latents' deviation, and prompts that nobody writes anew."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_pipe

from visiontune import models
from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.models.ernie_image import ErnieImage

REQUEST = Request(prompt="a red circle", seed=1)


def test_the_deviation_of_latents_is_the_pipelines_and_not_the_configs():
    model = tiny_model("ernie_image")
    model.vae.bn.running_var.fill_(1e-5)
    assert model.vae.config.batch_norm_eps != 1e-5
    latents = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "latents": latents}
    final = model.pipe("a", output_type="latent", **options).images
    expected = model.pipe("a", output_type="pt", **options).images
    torch.testing.assert_close((model.decode(final) / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.to_latents(model.from_latents(latents)), latents)


def test_a_prompt_is_drawn_as_it_stands(monkeypatch):
    model = tiny_model("ernie_image")
    expected = model.draw([REQUEST], steps=2, guidance=model.guidance(3.0))
    model.pipe.register_modules(pe=model.pipe.text_encoder, pe_tokenizer=model.pipe.tokenizer)
    monkeypatch.setattr(model.pipe, "_enhance_prompt_with_pe", lambda *args, **options: "green")
    assert (model.draw([REQUEST], steps=2, guidance=model.guidance(3.0)) == expected).all()
    rewritten = model.pipe("a red circle", num_inference_steps=2, height=16, width=16, output_type="pt")
    assert rewritten.revised_prompts == ["green"]


def test_the_model_that_writes_prompts_anew_is_not_opened(tmp_path):
    index = save_tiny(tmp_path / "model", "ernie_image") / "model_index.json"
    named = {
        "pe": ["transformers", "Ministral3ForCausalLM"],
        "pe_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    model = models.load(str(tmp_path / "model"))
    assert model.pipe.pe is None and list(model.networks()) == ["transformer", "vae", "text_encoder"]


def test_an_empty_prompt_is_one_token():
    model = tiny_model("ernie_image")
    cond = model.embed(["", "a red circle"])
    assert cond.mask.sum(1).tolist() == [1, len(model.pipe.tokenizer("a red circle")["input_ids"])]
    torch.testing.assert_close(cond.tokens[0, :1], model.pipe.encode_prompt("", "cpu")[0])


def test_a_scheduler_that_shifts_by_resolution_is_refused():
    pipe = tiny_pipe("ernie_image")
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="its pipeline shifts no steps by resolution: set use_dynamic_shifting"):
        ErnieImage(pipe)
