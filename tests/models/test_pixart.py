"""What PixArt has of its own: a variance beside eps, sizes that alpha is told, prompts in lower case."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import remade, save_tiny, tiny_model, tiny_pipe

from visiontune import models
from visiontune.core import Condition
from visiontune.errors import UserError
from visiontune.models.pixart import PixArt


def predicted(model):
    x_t = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, torch.tensor([500]), model.embed(["a red circle"]))


@pytest.mark.parametrize(("alpha", "tokens"), [(False, 300), (True, 120)])
def test_prompts_are_read_in_lower_case_by_a_masked_t5(alpha, tokens):
    model = tiny_model("pixart", alpha=alpha)
    cond = model.embed(["Small Red CIRCLE ", "red"])
    assert cond.tokens.shape == (2, tokens, 72) and cond.mask.sum(1).tolist() == [4, 2] and cond.pooled is None
    assert torch.equal(cond.tokens[:1], model.embed(["small red circle"]).tokens)
    whole = "RED " * (tokens - 1)
    assert model.embed([whole]).mask.all()
    assert model.reader.cut([whole, whole + "red"]) == {whole + "red": tokens + 1}


def test_the_variance_that_is_predicted_too_is_left_out():
    model = tiny_model("pixart")
    given = []
    hook = model.denoiser.register_forward_hook(lambda module, args, out: given.append(out[0]))
    found = predicted(model)
    hook.remove()
    assert given[0].shape[1] == 8 and torch.equal(found, given[0][:, :4])
    model.pipe.transformer = remade(model.denoiser, out_channels=4)
    assert predicted(PixArt(model.pipe)).shape == found.shape


def test_the_published_index_names_an_older_class_of_transformer(tmp_path):
    folder = save_tiny(tmp_path / "model", "pixart")
    expected = predicted(tiny_model("pixart"))
    for file, change in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel"}),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | change))
    torch.testing.assert_close(predicted(models.load(str(folder))), expected)


def test_what_is_no_pixart_to_train_is_refused(tmp_path):
    pipe = tiny_pipe("pixart")
    pipe.transformer = remade(pipe.transformer, in_channels=9)
    with pytest.raises(UserError, match="its transformer takes 9 channels and gives 8"):
        PixArt(pipe)
    pipe = tiny_pipe("pixart")
    pipe.transformer = remade(pipe.transformer, use_additional_conditions=True)
    with pytest.raises(UserError, match=r"is to be told sizes .* only PixArtAlphaPipeline does, at sample_size 128"):
        PixArt(pipe)
    pipe = tiny_pipe("pixart")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="its scheduler is one of flow"):
        PixArt(pipe)
    pipe = tiny_pipe("pixart")
    pipe.text_encoder = None
    pipe.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="it lacks its T5; give a folder with text_encoder and tokenizer"):
        models.load(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="make the Condition with embed"):
        model = tiny_model("pixart")
        model.predict(torch.ones(1, 4, 8, 8), torch.tensor([1]), Condition(tokens=model.embed(["a"]).tokens))
