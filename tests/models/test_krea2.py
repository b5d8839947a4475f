"""What Krea 2 has of its own: layers of a text encoder side by side, and steps that a distilled model shifts alike."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from tiny import remade, tiny_model, tiny_pipe

from visiontune.adapters import attach
from visiontune.errors import UserError
from visiontune.models.krea2 import Krea2

PROMPTS = ["a", "a small green triangle left of the large red circle, in the photo of a blue square"]


def closing(model):
    """How many tokens of the tiny tokenizer close the template."""
    return len(model.pipe.tokenizer(model.pipe.prompt_template_encode_suffix)["input_ids"])


def test_a_prompt_is_its_layers_side_by_side_without_the_padding():
    model = tiny_model("krea2")
    cond = model.embed(PROMPTS)
    layers, mask = model.pipe.get_text_hidden_states(PROMPTS)
    # what closes the template stands after the padding
    assert mask[0, -closing(model) :].all() and not mask[0, -closing(model) - 1]
    assert cond.mask.sum(1).tolist() == mask.sum(1).tolist()
    assert cond.mask.shape[1] == mask.sum(1).max() < mask.shape[1] and cond.mask[1].all()
    for row in range(2):
        found = cond.tokens[row, cond.mask[row]].view(-1, 3, 16)
        torch.testing.assert_close(found, layers[row, mask[row]])


def test_the_reader_knows_how_many_tokens_of_a_prompt_are_read():
    model = tiny_model("krea2")
    counts = [len(model.embed([" a" * (model.reader.limit + more)]).tokens[0]) for more in (-1, 0, 1)]
    room = 512 - 5 + closing(model)  # the template's end counts as five tokens, as with the published tokenizer
    assert counts == [room - 1, room, room]
    assert model.reader.cut([" a" * model.reader.limit, " a" * (model.reader.limit + 1)]) == {
        " a" * (model.reader.limit + 1): model.reader.limit + 1
    }


def test_steps_are_shifted_by_resolution_unless_the_model_is_distilled():
    for distilled in (False, True):
        model = tiny_model("krea2", distilled=distilled)
        small, large = (model.chain(4, model.latent_shape(side, 16))[0] for side in (16, 48))
        assert torch.equal(small, large) is distilled
        assert small[0] == 1000 and (large >= small).all()


def test_the_shift_that_a_scheduler_says_nothing_of_is_the_stock_pipelines():
    pipe = tiny_pipe("krea2")
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    model = Krea2(pipe)
    start, _ = model.chain(4, model.latent_shape(32, 16))
    pipe("a", num_inference_steps=4, height=32, width=16, output_type="latent")
    torch.testing.assert_close(start[1:] / 1000, pipe.scheduler.sigmas[1:-1], rtol=0, atol=1e-7)


def test_presets_reach_gates_and_the_text_fusion_but_no_tower_of_pictures():
    model = tiny_model("krea2")
    counts = {}
    for preset in ("attention", "attention+ff"):
        found = attach(model.of("denoiser"), "lora", targets=preset, presets=model.presets())
        counts[preset] = len(found.layers)
        found.detach()
    assert counts == {"attention": 4 * 5, "attention+ff": 4 * 8}
    found = attach(model.of("text"), "lora", targets="all", presets=model.presets(["text"]))
    assert len(found.layers) == 4 * 7 and not any("visual" in layer for layer in found.layers)


def test_what_is_no_text_to_image_checkpoint_is_refused():
    pipe = tiny_pipe("krea2")
    pipe.transformer = remade(pipe.transformer, in_channels=20)
    with pytest.raises(UserError, match="its transformer takes 20 channels"):
        Krea2(pipe)
    pipe = tiny_pipe("krea2")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="its scheduler is not one of flow"):
        Krea2(pipe)
