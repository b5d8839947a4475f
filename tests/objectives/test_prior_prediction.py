"""Prior rows whose target is the base's own prediction, and where such rows come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import PREDICTIONS, TinyModel, tiny_batch
from torch import nn

from visiontune import adapters
from visiontune.data.base import Config as DataConfig
from visiontune.data.base import Sample, Source
from visiontune.data.prompts import listed_prompts, read_data_prompts
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.evaluation.personalise import class_prompts, ordinary_prompts
from visiontune.objectives import _prior, denoising
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.dreambooth import Config, build
from visiontune.pocket.scenes import held_out, vocabulary
from visiontune.pocket.world import SUBJECTS
from visiontune.training.lending import reference

DATA = DataConfig(root="none", class_noun="dog")


def adapted(model, amount: float = 0.0):
    """Changes of all weights of the denoiser and the text encoder, moved off the identity by ``amount``."""
    model.encoder = nn.Sequential(model.encoder)  # layers are adapted by their names, and a root has none
    made = adapters.attach(
        model.of("denoiser", "text"), "dense", targets="all", presets=model.presets(["denoiser", "text"])
    )
    move(made, amount)
    return made


def move(made, amount: float) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter += amount * torch.randn(parameter.shape, generator=generator(i))


def tools_of(model, made=None) -> Tools:
    trained = {} if made is not None else dict(model.denoiser.named_parameters())
    return Tools(reference=reference(made, trained, model.networks().values()), rng=generator(1), text=True)


@pytest.mark.parametrize("embedded", [True, False], ids=["cached conditions", "text trained"])
def test_at_the_identity_nothing_is_asked_of_prior_rows(embedded):
    model = TinyModel()
    made, objective = adapted(model), build(Config(snr_gamma=5.0))
    batch = tiny_batch(model, 0, instance=2, prior=3, embedded=embedded)
    loss = objective.loss(model, batch, tools_of(model, made))
    assert float(loss.terms["prior"]) < 1e-12 < 1e-2 < float(loss.terms["instance"])
    move(made, 0.1)
    moved = objective.loss(model, batch, tools_of(model, made))
    assert float(moved.terms["prior"]) > 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_a_fresh_prediction_of_the_base_with_its_own_text_encoder(prediction):
    model, objective = TinyModel(prediction), build(Config())
    batch = tiny_batch(model, 0, instance=2, prior=3, embedded=False)
    batch = replace(
        batch, prompts=["a sks dog"] * 2 + ["a dog", "a cat", ""], prior=torch.tensor([0, 0, 1, 1, 1]).bool()
    )
    x_t, t = torch.randn(5, 4, 8, 8, generator=generator(2)), torch.tensor([1, 20, 400, 700, 999])
    with torch.no_grad():
        base = model.predict(x_t, t, model.embed(batch.prompts))
    made, mixed_in = adapted(model, 0.3), torch.full_like(x_t, 7.0)
    assert float((model.predict(x_t, t, model.embed(batch.prompts)) - base).abs().max()) > 0.05
    for _ in range(2):
        found = objective.targets(model, x_t, t, mixed_in, batch, tools_of(model, made))
        torch.testing.assert_close(found[2:], base[2:])
        assert (found[:2] == 7).all() and not found.requires_grad


def test_in_full_fine_tuning_the_target_is_that_of_a_frozen_copy():
    model, objective = TinyModel(), build(Config())
    batch = tiny_batch(model, 0, instance=1, prior=2)
    assert objective.needs.reference and not build(Config(prior="pictures")).needs.reference
    lent, x_t, t = tools_of(model), torch.randn(3, 4, 8, 8, generator=generator(2)), torch.tensor([5, 300, 900])
    before = objective.targets(model, x_t, t, x_t, batch, lent)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(1.5)
    assert torch.equal(objective.targets(model, x_t, t, x_t, batch, lent), before)
    assert float((model.predict(x_t, t, batch.cond) - before)[1:].abs().max()) > 0.05


def test_the_base_predicts_without_its_dropout():
    model, objective = TinyModel(dropout=0.5), build(Config())
    made, batch = adapted(model, 0.1), tiny_batch(model, 0, instance=1, prior=4)
    x_t, t = torch.randn(5, 4, 8, 8, generator=generator(2)), torch.full((5,), 500)
    model.denoiser.eval()
    with made.disable(), torch.no_grad():
        base = model.predict(x_t, t, batch.cond)
    model.denoiser.train()
    found = objective.targets(model, x_t, t, x_t, batch, tools_of(model, made))
    torch.testing.assert_close(found[1:], base[1:])
    assert model.denoiser.training and model.denoiser.dropout.training


@pytest.mark.parametrize("prior", [{"prior": "none"}, {"prior_weight": 0.0}, {"prior_images": 0}])
def test_without_prior_rows_it_is_the_denoising_loss(prior, tmp_path):
    model, batch = TinyModel(), tiny_batch(TinyModel(), 0, instance=3)
    objective = build(Config(snr_gamma=5.0, **prior))
    assert objective.prepare(model, DATA, own_pictures(), tmp_path, Tools()) == []
    plain = denoising.build(denoising.Config(snr_gamma=5.0)).loss(model, batch, Tools(rng=generator(1)))
    assert torch.equal(objective.loss(model, batch, Tools(rng=generator(1))).total, plain.total)


def test_the_gradient_is_that_of_a_constant_target():
    model, objective = TinyModel(), build(Config())
    made, batch = adapted(model, 0.2), tiny_batch(model, 0, instance=2, prior=2, weight=0.5)
    parameters = list(made.parameters())
    total = objective.loss(model, batch, tools_of(model, made)).total
    found = torch.autograd.grad(total, parameters, allow_unused=True)

    t, eps = objective.noised(model, batch.data["image"], batch, Tools(rng=generator(1)))
    x_t, target = (
        model.schedule.add_noise(batch.data["image"], eps, t),
        model.schedule.target(batch.data["image"], eps, t),
    )
    with made.disable(), torch.no_grad():
        target[2:] = model.predict(x_t, t, batch.cond)[2:]
    errors = (model.predict(x_t, t, batch.cond) - target).square().flatten(1).mean(1)
    wanted = torch.autograd.grad(errors[:2].mean() + 0.5 * errors[2:].mean(), parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------ the rows


def own_pictures(*captions: str) -> list[Sample]:
    picture = Image.new("RGB", (16, 16))
    return [
        Sample(id=f"own{i}", sources={"image": Source(lambda: picture)}, caption=caption)
        for i, caption in enumerate(captions or ("a photo of a sks dog", "a sks dog asleep"))
    ]


def images(model, prompts, seeds, **_):
    return np.stack([np.full((16, 16, 3), seed % 256, np.uint8) for seed in seeds])


def prepare(tmp_path, samples, **options):
    config = Config(**{"prior_prompts": ["a tree", "a [class]"], "prior_images": 13, **options})
    return build(config).prepare(TinyModel(), DATA, samples, tmp_path, Tools(draw=images))


def test_own_pictures_without_the_trigger_and_empty_prompts_have_their_shares(tmp_path):
    rows = prepare(tmp_path, own_pictures(), prior_own=0.25, prior_empty=0.1, prior_weight=0.5)
    own = [row for row in rows if row.id.startswith("own") and row.caption]
    empty = [row for row in rows if not row.caption]
    assert (len(rows), len(own), len(empty)) == (20, 5, 2)
    assert {row.caption for row in own} == {"a photo of a dog", "a dog asleep"}
    assert {(row.prior, row.weight) for row in rows} == {(True, 0.5)}
    assert [row.caption for row in rows[:3]] == ["a tree", "a dog", "a tree"]


def test_captions_without_the_trigger_are_never_held_in_place(tmp_path):
    rows = prepare(tmp_path, own_pictures("in the style of x", "a house"), prior_empty=0.0)
    assert not any(row.id.startswith("own") for row in rows) and len(rows) == 13


def test_pictures_learn_what_is_in_them_so_own_ones_stay_out(tmp_path):
    assert len(prepare(tmp_path, own_pictures(), prior="pictures")) == 13


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("a photo of a sks dog", "a photo of a dog"),
        ("SKS asleep", "dog asleep"),
        ("sks, the dog", ", the dog"),
        ("a photo of sks", "a photo of dog"),
        ("a dog on sksen", None),
        ("hot dogs and sks", "hot dogs and dog"),
    ],
)
def test_the_class_takes_the_place_of_the_trigger(caption, kept):
    assert _prior.without(caption, "sks", "dog") == kept


def test_a_prompt_with_the_trigger_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prior_prompts has 'a Sks tree' with the trigger"):
        prepare(tmp_path, [], prior_prompts=["a tree", "a Sks tree"])


def test_given_pictures_take_the_place_of_drawn_ones(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a [class], number {i}")
    rows = prepare(tmp_path, [], prior_data=str(folder), prior_empty=0.0)
    assert [row.caption for row in rows] == [f"a dog, number {i}" for i in range(3)]
    assert not list(tmp_path.glob("prior-*"))


def test_more_prompts_than_pictures_are_a_sample_of_them_all(tmp_path):
    prompts = [f"class {i}" for i in range(50)] + [f"other {i}" for i in range(50)]
    rows = prepare(tmp_path, [], prior_prompts=prompts, prior_images=20, prior_empty=0.0)
    words = [row.caption for row in rows]
    assert len(set(words)) == 20 and 5 <= sum(word.startswith("class") for word in words) <= 15
    assert words == [
        row.caption for row in prepare(tmp_path, [], prior_prompts=prompts, prior_images=20, prior_empty=0.0)
    ]


@pytest.mark.parametrize(("source", "name"), [("pocket/sd", "pocket/ordinary"), ("some/model", "everyday")])
def test_the_prompts_are_those_that_the_model_has_words_for(tmp_path, source, name):
    model = TinyModel()
    model.source = source
    rows = build(Config(prior_images=5, prior_empty=0)).prepare(model, DATA, [], tmp_path, Tools(draw=images))
    assert {row.caption for row in rows} <= {prompt.replace("[class]", "dog") for prompt in listed_prompts(name)}


@pytest.mark.parametrize("name", ["everyday", "pocket/ordinary"])
def test_the_lists_that_ship_are_half_about_the_class_and_without_a_subject(name):
    prompts = listed_prompts(name)
    about = [prompt for prompt in prompts if "[class]" in prompt]
    assert len(set(prompts)) == len(prompts) >= 60 and 0.3 < len(about) / len(prompts) <= 0.5
    assert read_data_prompts(DataConfig(root=name, class_noun="dog"))[0] == prompts[0].replace("[class]", "dog")
    assert not any(_prior._has(prompt, "sks") or "[trigger]" in prompt for prompt in prompts)
    with pytest.raises(UserError, match="without pictures"):
        read(DataConfig(root=name))


def test_the_pocket_list_is_in_the_model_s_words_and_not_what_it_is_judged_by():
    words = set(vocabulary())
    for subject in SUBJECTS.values():
        prompts = [prompt.replace("[class]", subject.shape) for prompt in listed_prompts("pocket/ordinary")]
        assert all(set(prompt.replace(",", " ,").split()) <= words for prompt in prompts)
        assert not {*prompts} & {*class_prompts(subject), *ordinary_prompts(200)}
    assert not any(held_out(prompt) for prompt in listed_prompts("pocket/ordinary") if "[class]" not in prompt)


def test_the_share_decides_how_many_prior_rows_a_batch_has():
    assert [build(Config(prior_share=share)).prior_rows(4) for share in (0.5, 0.2, 0.01, 0.75)] == [4, 1, 1, 12]
    with pytest.raises(ValueError, match="less than 1 together"):
        Config(prior_own=0.6, prior_empty=0.4)
