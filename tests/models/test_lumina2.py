"""What Lumina 2 has of its own: the sentence before a prompt, steps shifted by channels, guidance by rows."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import remade, tiny_model, tiny_pipe

from visiontune.core import Condition
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, RowLengthCFG, guided
from visiontune.errors import UserError
from visiontune.models.lumina2 import Lumina2


def lengths(cond):
    return cond.mask.sum(1).tolist()


def test_a_prompt_is_read_after_a_sentence_and_a_negative_one_alone():
    model = tiny_model("lumina2")
    words = model.pipe.tokenizer
    assert lengths(model.embed(["red circle"], negative=True)) == [len(words("red circle")["input_ids"])]
    whole = f"{model.pipe.system_prompt} <Prompt Start> red circle"
    assert lengths(model.embed(["red circle"])) == [len(words(whole)["input_ids"])]
    same = model.embed([whole], negative=True)
    torch.testing.assert_close(model.embed(["red circle"]).tokens, same.tokens)
    assert lengths(model.unconditional(2)) == [1, 1]  # the mark that every text begins with


def test_what_is_named_is_what_stands_past_the_tokens_that_the_sentence_leaves():
    model = tiny_model("lumina2")
    fits = " ".join(("a red circle " * 60).split()[: model.reader.limit - 1])
    for more, read in (("", fits.rpartition(" ")[0]), (" blue", fits)):
        text = fits + more
        assert bool(model.reader.cut([text])) is bool(more)
        assert torch.equal(model.embed([text]).tokens, model.embed([read]).tokens) is bool(more)


def test_steps_are_shifted_by_the_number_of_channels_alone():
    fixed, dynamic = tiny_model("lumina2"), tiny_model("lumina2", dynamic=True)
    for model in (fixed, dynamic):
        small, large = (model.chain(4, model.latent_shape(side, 32))[0] for side in (32, 128))
        assert torch.equal(small, large) and small[0] == 1000
    assert not torch.allclose(fixed.chain(4, (16, 4, 4))[0], dynamic.chain(4, (16, 4, 4))[0])
    assert not torch.allclose(dynamic.chain(4, (16, 4, 4))[0], dynamic.chain(4, (32, 4, 4))[0])


def test_rows_keep_the_length_that_they_have_in_the_prompts_own_prediction():
    model = tiny_model("lumina2")
    cond, t = model.embed(["a red circle"]), torch.tensor([700.0])
    x_t = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    given = model.predict(x_t, t, cond)
    found = guided(model, x_t, t, cond, None, model.guidance(4.0))
    plain = guided(model, x_t, t, cond, None, CFG(scale=4.0))
    torch.testing.assert_close(found.norm(dim=3), given.norm(dim=3))
    torch.testing.assert_close(torch.cosine_similarity(found, plain, dim=3), torch.ones(1, 16, 4))
    assert not torch.allclose(plain.norm(dim=3), given.norm(dim=3), rtol=1e-3)
    assert model.guidance(4.0) == RowLengthCFG(scale=4.0) and model.guidance(1.0) is NO_GUIDANCE


def test_pictures_must_fit_the_places_of_rows_and_of_columns():
    model = tiny_model("lumina2")
    assert (model.unit, model.resolution) == (16, 32)
    assert model.size(512, 16) == (512, 16)
    with pytest.raises(UserError, match="height and width must be at most 512, not 528 and 16"):
        model.size(528, 16)


def test_a_condition_without_mask_is_refused():
    model = tiny_model("lumina2")
    with pytest.raises(ValueError, match="make the Condition with embed"):
        model.predict(torch.ones(1, 16, 4, 4), torch.tensor([1]), Condition(tokens=model.embed(["a"]).tokens))


def test_what_is_no_text_to_image_checkpoint_is_refused():
    pipe = tiny_pipe("lumina2")
    pipe.transformer = remade(pipe.transformer, in_channels=33)
    with pytest.raises(UserError, match="its transformer takes 33 channels"):
        Lumina2(pipe)
    pipe = tiny_pipe("lumina2")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="its scheduler is not one of flow"):
        Lumina2(pipe)
