"""A word with a meaning of its own: rows of an embedding that are trained beside an adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_pipe
from torch import nn

from visiontune import adapters
from visiontune.adapters._words import Words
from visiontune.errors import UserError
from visiontune.models.sd import StableDiffusion
from visiontune.models.words import rows_of
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of

WITH, WITHOUT = "a photo of a sks dog", "a photo of a dog"


def attached(model, word="sks", parts=("denoiser",), **options):
    """A set with a word, whose rows have moved, and those of the embeddings."""
    words = rows_of(model, word)
    made = adapters.attach(model.of(*parts), "lora", targets="attention", rank=2, words=words, **options)
    with torch.no_grad():
        for own in made.embeddings().values():
            own.rows.normal_(generator=torch.Generator().manual_seed(0))
    return made, words


def read(model, *prompts):
    with torch.no_grad():
        return model.embed(prompts).tokens


def test_the_forward_is_that_of_the_weight_and_gradients_reach_the_rows_alone():
    layer = nn.Embedding(7, 3).double()
    words = Words(layer, {"one": [2], "two": [5, 2]})
    assert words.ids == [2, 5] and words.rows.dtype == torch.float64
    with torch.no_grad():
        words.rows.normal_()
    read = torch.tensor([[2, 0, 5], [2, 2, 6]])

    def below(x):
        return layer(x)

    out = words.forward(read, below, 0.7)
    weight = words.weight(layer.weight.detach(), 0.7)
    torch.testing.assert_close(out, nn.functional.embedding(read, weight), rtol=0, atol=1e-15)
    assert torch.equal(words.weight(layer.weight.detach(), 0.0), layer.weight)
    towards = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * towards).sum(), words.rows)
    expected = [towards[read == i].sum(0) * 0.7 for i in (2, 5)]
    torch.testing.assert_close(grad, torch.stack(expected))


def test_prompts_without_the_word_read_what_they_read_before():
    model = tiny_model()
    before = read(model, WITH, WITHOUT)
    made, _ = attached(model)
    after = read(model, WITH, WITHOUT)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], atol=1e-2)
    made.scale = 0.5
    half = read(model, WITH)
    made.scale = 1.0
    assert not torch.allclose(half, after[:1], atol=1e-3) and not torch.allclose(half, before[:1], atol=1e-3)
    made.merge()
    torch.testing.assert_close(read(model, WITH, WITHOUT), after, rtol=0, atol=1e-6)
    made.unmerge()
    with made.disable():
        assert torch.equal(read(model, WITH, WITHOUT), before)
    other = copy.deepcopy(model)
    made.detach()
    assert torch.equal(read(model, WITH, WITHOUT), before) and torch.equal(read(other, WITH, WITHOUT), after)


@pytest.mark.parametrize("parts", [("denoiser",), ("denoiser", "text")])
def test_a_file_holds_the_rows(parts, tmp_path):
    model = tiny_model()
    made, words = attached(model, parts=parts)
    after, (name,) = read(model, WITH), words
    file = made.save(tmp_path / "a.safetensors")
    header = adapters.read_header(file)
    assert list(header["words"]) == [name] and name not in header["layers"]
    made.detach()
    again = adapters.load(model.networks(), file)
    assert torch.equal(read(model, WITH), after)
    again.detach()
    if "text" not in parts:
        with pytest.raises(UserError, match="no embedding 'text_encoder"):
            adapters.load(model.of("unet"), file)
    with torch.no_grad():
        model.pipe.text_encoder.get_input_embeddings().weight += 0.1
    with pytest.raises(UserError, match="other base weights"):
        adapters.load(model.networks(), file)


DAMAGED = ["[]", '{"a": []}', '{"a": {}}', '{"a": {"b": []}}', '{"a": {"b": [-1]}}', '{"a": {"b": [1.5]}}', '{"a": 1}']


@pytest.mark.parametrize("words", DAMAGED)
def test_a_header_of_other_words_is_damaged(words, tmp_path):
    made, _ = attached(tiny_model())
    file = made.save(tmp_path / "a.safetensors")
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(load_file(file), file, header | {"words": words})
    with pytest.raises(UserError, match="is damaged"):
        adapters.read_header(file)


def test_rows_beyond_the_vocabulary_are_refused(tmp_path):
    model = tiny_model()
    made, words = attached(model)
    file = made.save(tmp_path / "a.safetensors")
    made.detach()
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(load_file(file), file, header | {"words": json.dumps({name: {"sks": [10**6]} for name in words})})
    with pytest.raises(UserError, match="with as many words"):
        adapters.load(model.networks(), file)


def test_a_start_has_the_word_as_the_run_has(tmp_path):
    model = tiny_model()
    made, words = attached(model)
    after, file = read(model, WITH), made.save(tmp_path / "a.safetensors")
    made.detach()
    plain = adapters.attach(model.of("denoiser"), "lora", targets="attention", rank=2)
    with pytest.raises(UserError, match="put trigger into"):
        adapters.start(plain, file)
    plain.detach()
    for rank in (2, 3):
        other = adapters.attach(model.of("denoiser"), "lora", targets="attention", rank=rank, words=words)
        adapters.start(other, file)
        assert torch.equal(read(model, WITH), after)
        other.detach()


# ---------------------------------------------------------------------------------------------------- finding them


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "amused"])
def test_every_text_encoder_has_its_rows(family):
    model = tiny_model(family)
    words = rows_of(model, "circle")
    assert {name.partition(".")[0] for name in words} == {*model.roles()["text"]}
    before = read(model, "a circle", "a square")
    made = adapters.attach(model.of("denoiser"), "lora", targets="attention", rank=1, words=words)
    assert torch.equal(read(model, "a circle", "a square"), before)
    for name, own in made.embeddings().items():
        with torch.no_grad():
            own.rows.normal_()
        after = read(model, "a circle", "a square")
        assert torch.equal(after[1], before[1]), name
        assert not torch.allclose(after[0], before[0], atol=1e-3), name
        with torch.no_grad():
            own.rows.zero_()


def test_the_class_keeps_its_meaning(tmp_path):
    model = tiny_model()
    before = read(model, "a circle", "a red circle", "a red square")
    words = rows_of(model, "red circle", "circle")
    made = adapters.attach(model.of("denoiser"), "lora", targets="attention", rank=2, words=words)
    model.embed(["a red circle"]).tokens.square().sum().backward()
    (own,) = made.embeddings().values()
    red, circle = (own.ids.index(model.pipe.tokenizer(word)["input_ids"][1]) for word in ("red", "circle"))
    assert own.rows.grad[red].abs().sum() > 0 and own.rows.grad[circle].abs().sum() == 0
    with torch.no_grad():
        own.rows[red].normal_()
    after = read(model, "a circle", "a red circle", "a red square")
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1:], before[1:], atol=1e-2)
    file = made.save(tmp_path / "a.safetensors")
    made.detach()
    adapters.load(model.networks(), file)
    assert torch.equal(read(model, "a circle", "a red circle", "a red square"), after)
    with pytest.raises(UserError, match="take another"):
        rows_of(model, "circle", "red circle")


def test_a_subject_of_several_words_has_a_row_for_each():
    model = tiny_model()
    (name,) = rows_of(model, "red")
    rows = rows_of(model, "red blue green")[name][1]["red blue green"]
    assert rows == [row for word in ("red", "blue", "green") for row in rows_of(model, word)[name][1][word]]
    made, _ = attached(model, "red blue green")
    table = made.base_layers()[name].weight.detach()
    moved = (made.weight(name) - table).abs().amax(1).nonzero().flatten().tolist()
    assert sorted(moved) == sorted(rows)


def test_words_that_cannot_be_had_are_refused():
    model = tiny_model()
    model.pipe.tokenizer = copy.deepcopy(model.pipe.tokenizer)
    model.pipe.tokenizer.unk_token = "<|endoftext|>"
    with pytest.raises(UserError, match="does not know the word '雪'"):
        rows_of(model, "雪")
    with pytest.raises(UserError, match="reads 'sks' otherwise in a prompt"):
        model.embed = lambda prompts: tiny_model().embed(prompts)
        rows_of(model, "sks")


# ---------------------------------------------------------------------------------------------------- other tools


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_diffusers_loads_the_word_beside_the_adapter(kind, tmp_path):
    model = tiny_model()
    made, _ = attached(model, parts=("denoiser", "text"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05)
    made.scale = 0.8
    done = export(
        made, tmp_path / "a.safetensors", kind, dtype=torch.float32, keys=keys_of("sd", model.networks()), model=model
    )
    assert "a-sks.safetensors" in done.notes[-1]
    pipe = tiny_pipe()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # pipelines of a session share it
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "a-sks.safetensors"), token="sks")
    torch.testing.assert_close(read(StableDiffusion(pipe), WITH, WITHOUT), read(model, WITH, WITHOUT))
    with pytest.raises(UserError, match=r"a-sks\.safetensors exists"):
        export(made, tmp_path / "a.safetensors", dtype=torch.float32)


def test_two_encoders_have_the_names_of_their_readers(tmp_path):
    model = tiny_model("sdxl")
    made, _ = attached(model, word="circle")
    export(made, tmp_path / "a.safetensors", dtype=torch.float16)
    tensors = load_file(tmp_path / "a-circle.safetensors")
    assert tensors.keys() == {"clip_l", "clip_g"}
    for name, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        rows = made.words[encoder].own[0]
        table = model.networks()[encoder].get_input_embeddings()
        expected = (table(torch.tensor(rows.words["circle"]))).half()
        torch.testing.assert_close(tensors[name], expected)


def test_a_merged_model_reads_the_word(tmp_path):
    model = tiny_model()
    made, _ = attached(model)
    after = read(model, WITH, WITHOUT)
    export(made, tmp_path / "out", "merged", dtype=torch.float32, model=model)
    other = StableDiffusion(StableDiffusionPipeline.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(read(other, WITH, WITHOUT), after)
    assert not list(tmp_path.glob("*.safetensors"))
