"""DreamCom: its loss in closed form, what is painted where, words in the box alone, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import SIZE, save_tiny, tiny_model

from visiontune import adapters, assemble, models
from visiontune.cli import main as cli
from visiontune.config import load_run
from visiontune.core import Batch, Request
from visiontune.data.base import Config as DataConfig
from visiontune.data.base import Sample, source
from visiontune.data.picks import Pick
from visiontune.data.readers import read
from visiontune.data.rows import Rows
from visiontune.errors import UserError
from visiontune.objectives import denoising
from visiontune.objectives.base import Tools, condition_of, generator
from visiontune.objectives.dreamcom import Config, build
from visiontune.pocket import oracle
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.sources import Bench
from visiontune.training.lending import reference


@pytest.fixture
def model():
    return tiny_model("sd", edits="inpaint")


def box_mask(rows: int, left: int = 4, top: int = 2, side: int = 8) -> torch.Tensor:
    found = torch.zeros(rows, 1, SIZE, SIZE)
    found[:, :, top : top + side, left : left + side] = 1
    return found


def batch_of(model, mask: torch.Tensor | None = None, prompts=("a red circle", "a circle"), **more) -> Batch:
    shape, count = model.latent_shape(), len(prompts)
    hidden = torch.randn(count, *shape, generator=generator("hidden"))
    channels = model.channels(hidden, box_mask(count))
    data = {"image": torch.randn(count, *shape, generator=generator("image")), "channels": channels}
    cond = model.embed(list(prompts))
    given = {"weight": torch.ones(count), "prior": torch.zeros(count, dtype=torch.bool), **more}
    ids = [str(i) for i in range(count)]
    return Batch(
        prompts=list(prompts), data=data if mask is None else {**data, "mask": mask}, cond=cond, ids=ids, **given
    )


def loss_of(model, batch, objective=None):
    return (objective or build(Config())).loss(model, batch, Tools(rng=generator(1))).total


def test_a_mask_of_ones_is_no_mask_and_the_mean_is_over_channels_too(model):
    plain = loss_of(model, batch_of(model))
    assert torch.equal(plain, loss_of(model, batch_of(model), denoising.build(denoising.Config())))
    torch.testing.assert_close(plain, loss_of(model, batch_of(model, torch.ones(2, 1, 8, 8))))
    # One row, one place: the mean over its four channels.
    one = torch.zeros(2, 1, 8, 8)
    one[:, :, 3, 5] = 1
    batch, objective = batch_of(model, one), build(Config())
    t, eps = objective.noised(model, batch.data["image"], batch, Tools(rng=generator(1)))
    x_t = model.schedule.add_noise(batch.data["image"], eps, t)
    error = (model.predict(x_t, t, condition_of(model, batch)) - eps)[:, :, 3, 5].double().square().mean()
    assert float(loss_of(model, batch)) == pytest.approx(float(error), rel=1e-5)


def test_nothing_is_learnt_where_augmentation_left_nothing(model, monkeypatch):
    left = torch.ones(2, 1, 8, 8)
    left[..., :3] = 0
    kept, predict = [], model.predict

    def watched(*args):
        kept.append(predict(*args).detach().requires_grad_())
        return kept[-1]

    monkeypatch.setattr(model, "predict", watched)
    loss_of(model, batch_of(model, left)).backward()
    gradient = kept[0].grad
    assert not gradient[..., :3].any() and (gradient[..., 3:] != 0).all()


def test_the_network_is_shown_the_mask_before_what_is_left_as_its_pipeline_shows_it(model, tmp_path):
    """And a box, whatever the silhouette."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    silhouette = Image.new("L", (SIZE, SIZE))
    for x, y in ((4, 6), (11, 3), (8, 9)):
        silhouette.putpixel((x, y), 255)
    box = Image.new("L", (SIZE, SIZE))
    box.paste(255, (4, 3, 12, 10))
    sources = {"image": source("image", lambda: picture), "region": source("region", lambda: silhouette)}
    rows = Rows(model, [Sample(id="0", sources=sources, caption="a")], DataConfig(root="none", box=True), tmp_path)
    found = condition_of(model, rows.collate([Pick(index=0, size=(SIZE, SIZE))]))
    wanted = model.read([Request(prompt="a", pictures=(picture,), mask=box)], size=(SIZE, SIZE))
    torch.testing.assert_close(found.extra["channels"], wanted.extra["channels"], rtol=0, atol=1e-6)
    x, t = torch.randn(1, *model.latent_shape(), generator=generator("x")), torch.tensor([500])
    swapped = replace(found, extra={"channels": found.extra["channels"].roll(-1, dims=1)})
    assert (model.predict(x, t, found) - model.predict(x, t, swapped)).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- words in the box


def predicted(model, prompts, mask):
    x = torch.randn(1, *model.latent_shape(), generator=generator("x")).expand(len(prompts), -1, -1, -1)
    hidden = torch.randn(1, *model.latent_shape(), generator=generator("h")).expand_as(x)
    cond = replace(
        model.embed(prompts), extra={"channels": model.channels(hidden, mask.expand(len(prompts), -1, -1, -1))}
    )
    return model.predict(x, torch.full((len(prompts),), 500), cond)


def test_confined_words_say_nothing_where_nothing_is_painted(model):
    prompts, nothing = ["a red circle", "a small blue square"], torch.zeros(1, 1, SIZE, SIZE)
    free = predicted(model, prompts, nothing)
    assert (free[0] - free[1]).abs().max() > 1e-3
    undo = model.confine_words()
    one, other = predicted(model, prompts, nothing)
    assert torch.equal(one, other)
    one, other = predicted(model, prompts, box_mask(1))
    assert (one - other).abs().max() > 1e-3
    # Everywhere is nowhere else.
    undo()
    whole = torch.ones(1, 1, SIZE, SIZE)
    free = predicted(model, prompts, whole)
    model.confine_words()
    torch.testing.assert_close(predicted(model, prompts, whole), free)


def test_what_a_layer_adds_of_words_is_nothing_outside_of_the_box(model):
    layers = {n: m for n, m in model.denoiser.named_modules() if n.endswith("attn2")}
    model.confine_words()
    given = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, __, found, name=name: given.update({name: found}))
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 4:8, 8:16] = 1
    predicted(model, ["a red circle"], mask)
    assert len(given) == len(layers) >= 2
    for found in given.values():
        side = int(found.shape[1] ** 0.5)
        there = found[0].abs().amax(-1).unflatten(0, (side, side)) > 0
        wanted = torch.nn.functional.adaptive_max_pool2d(mask[0], side)[0] > 0
        assert torch.equal(there, wanted)


# ------------------------------------------------------------------------------------------------------ prior


def samples(tmp_path):
    picture, where = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("L", (SIZE, SIZE))
    where.paste(255, (2, 2, 8, 8))
    sources = {"image": source("image", lambda: picture), "region": source("region", lambda: where)}
    return [Sample(id=str(i), sources=sources, caption="a photo of a sks circle") for i in range(3)]


def test_prior_rows_are_own_pictures_with_holes_of_chance(tmp_path):
    data = DataConfig(root="none", class_noun="circle")
    rows = build(Config(prior_weight=0.5, prior_empty=0.25)).prepare(None, data, samples(tmp_path), tmp_path, Tools())
    assert [row.caption for row in rows] == ["a photo of a circle"] * 3 + [""]
    assert all(row.prior and row.weight == 0.5 and {*row.sources} == {"image"} for row in rows)
    # Without a word that is taught there is no plain one.
    plain = [replace(one, caption="a circle") for one in samples(tmp_path)]
    assert [row.caption for row in build(Config()).prepare(None, data, plain, tmp_path, Tools())] == [""] * 3
    assert build(Config(prior="none")).prepare(None, data, samples(tmp_path), tmp_path, Tools()) == []


def test_the_prior_is_what_the_base_predicts_of_the_same_hole(model):
    found = adapters.attach(model.of("denoiser"), "dense", targets="all", presets=model.presets(["denoiser"]))
    batch = batch_of(model, prior=torch.tensor([False, True]))
    tools = Tools(rng=generator(1), reference=reference(found, {}, model.networks().values()))
    loss = build(Config()).loss(model, batch, tools)
    assert loss.terms["prior"] < 1e-10 and loss.terms["instance"] > 0
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator("move"))
    tools = replace(tools, rng=generator(1))
    assert build(Config()).loss(model, batch, tools).terms["prior"] > 1e-4


# --------------------------------------------------------------------------------------------------- behaviour


def test_one_subject_is_learnt_in_its_box_and_the_box_says_where():
    """Inside the error falls by more than five times, and is larger where neither box nor picture is shown."""
    model = tiny_model("sd", edits="inpaint", prediction_type="v_prediction")  # of what the noise hides
    rows, size = 4, model.latent_shape()
    subject = 2 * torch.randn(1, 4, 1, 1, generator=generator("subject"))
    tokens = model.embed(["a red circle"]).tokens.expand(rows, -1, -1)

    def drawn(key, seen=True):
        rng = generator("rows", key)
        x_0, masks = torch.randn(rows, *size, generator=rng), torch.zeros(rows, 1, SIZE, SIZE)
        for row, (y, x) in enumerate(torch.randint(0, 5, (rows, 2), generator=rng).tolist()):
            x_0[row, :, y : y + 4, x : x + 4] = subject[0]
            masks[row, :, 2 * y : 2 * y + 8, 2 * x : 2 * x + 8] = 1
        inside = masks[:, :, ::2, ::2]
        channels = model.channels(x_0 * (1 - inside), masks)
        return x_0, channels * seen, inside

    def inside_error(key, seen=True):
        x_0, channels, inside = drawn(key, seen)
        t, eps = torch.full((rows,), 900), torch.randn(x_0.shape, generator=generator("eps", key))
        cond = replace(model.embed(["a red circle"] * rows), tokens=tokens, extra={"channels": channels})
        error = model.predict(model.schedule.add_noise(x_0, eps, t), t, cond) - model.schedule.target(x_0, eps, t)
        return float((error.square() * inside).sum() / inside.sum() / 4)

    with torch.no_grad():
        before = inside_error("held")
    objective = build(Config())
    batches = Batch(
        prompts=["a red circle"] * rows, data={}, cond=model.embed(["a red circle"] * rows),
        weight=torch.ones(rows), prior=torch.zeros(rows, dtype=torch.bool), ids=["0"] * rows,
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.denoiser.requires_grad_(True).parameters(), lr=4e-3)
    for step in range(90):
        x_0, channels, _ = drawn(step)
        batch = replace(batches, data={"image": x_0, "channels": channels})
        optimiser.zero_grad()
        objective.loss(model, batch, Tools(rng=generator("step", step))).total.backward()
        optimiser.step()
    with torch.no_grad():
        after, blind = inside_error("held"), inside_error("held", seen=False)
    assert after < before / 5 and after < blind


# ---------------------------------------------------------------------------------------------------- a user's run


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "region").mkdir(parents=True)
    for i, one in enumerate(samples(tmp_path)):
        one.sources["image"].open().save(tmp_path / "photos" / f"{i}.png")
        one.sources["region"].open().save(tmp_path / "photos" / "region" / f"{i}.png")
    return tmp_path / "photos"


def run_of(folder, photos, tmp_path, *more):
    given = {
        "out": tmp_path, "name": "run", "model": folder, "data.root": photos, "data.class_noun": "circle",
        "train.steps": 2, "train.batch_size": 2, "adapter.rank": 2, "adapter.targets": "attention",
        "preview.samples": 1, "preview.steps": 2, "preview.every": 2, "preview.seeds": "[0]",
        "train.trackers": "[]", "train.device": "cpu",
    }  # fmt: skip
    return load_run("compose/dreamcom", [*(f"{key}={value}" for key, value in given.items()), *more])


def test_from_a_folder_to_a_picture_whose_rest_is_untouched(photos, tmp_path):
    folder = save_tiny(tmp_path / "painting", edits="inpaint")
    file = assemble.assemble(run_of(folder, photos, tmp_path, "objective.confine_words=true")).fit()
    assert adapters.read_header(file)["confined_words"] == "true"
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    where = Image.new("L", (SIZE, SIZE))
    where.paste(255, (4, 2, 12, 10))
    picture.save(tmp_path / "scene.png")
    where.save(tmp_path / "box.png")
    shown = [f"pictures={tmp_path / 'scene.png'}", f"mask={tmp_path / 'box.png'}", "prompts=['a [trigger] [class]']"]
    told = [f"adapter={file}", "steps=2", "device=cpu", *shown]
    found = {}
    for paste in ("true", "false"):
        assert cli.main(["sample", *told, f"paste={paste}", f"out={tmp_path / paste}"]) == 0
        found[paste] = np.asarray(Image.open(tmp_path / paste / "00000_seed0.png"))
    inside = np.asarray(where) > 0
    assert np.array_equal(found["true"][~inside], np.asarray(picture)[~inside])
    assert np.array_equal(found["true"][inside], found["false"][inside])
    assert not np.array_equal(found["false"][~inside], np.asarray(picture)[~inside])
    bare = ["name=bare", "adapter=none", "train.parts=[denoiser]", "objective.confine_words=true"]
    with pytest.raises(UserError, match=r"objective\.confine_words is kept in the file of an adapter"):
        assemble.assemble(run_of(folder, photos, tmp_path, *bare))


def test_an_adapter_of_confined_words_is_for_models_that_paint(photos, tmp_path):
    folder = save_tiny(tmp_path / "painting", edits="inpaint")
    free = assemble.assemble(run_of(folder, photos, tmp_path, "train.steps=1", "preview.samples=0")).fit()
    assert "confined_words" not in adapters.read_header(free)
    model, config = models.load(str(folder)), SampleConfig(prompts="a", model=str(folder), adapter=str(free))
    before = predicted(model, ["a red circle"], box_mask(1))
    confined = tmp_path / "confined.safetensors"
    with safe_open(free, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, confined, {**header, "confined_words": "true"})
    with Bench(PartialState(), model) as bench:
        drawing = bench.at(replace(config, adapter=str(confined)))
        assert not torch.equal(predicted(drawing, ["a red circle"], box_mask(1)), before)
        bench.at(replace(config, adapter=None))
        assert torch.equal(predicted(model, ["a red circle"], box_mask(1)), before)
    with (
        Bench(PartialState(), tiny_model("sd")) as bench,
        pytest.raises(UserError, match="words that act where a model"),
    ):
        bench.at(replace(config, adapter=str(confined)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["objective=denoising", "data.ignore=[region]"], r"data\.box makes a box of a column 'region'"),
        (
            ["objective=diffusion_dpo", "data.zoom=0.1", "data.cache=false", "data.columns={rejected: region}"],
            "data.zoom",
        ),
    ],
)
def test_boxes_of_nothing_and_empty_places_that_would_count_are_refused(photos, tmp_path, more, message):
    folder = save_tiny(tmp_path / "painting", edits="inpaint")
    with pytest.raises(UserError, match=message):
        assemble.assemble(run_of(folder, photos, tmp_path, *more))


def test_the_pocket_subjects_have_regions_for_those_who_need_them():
    found = read(DataConfig(root="pocket/domino"), ("image", "region"))
    picture, where = (np.asarray(found[0].sources[name].open()) for name in ("image", "region"))
    assert (oracle.colored(picture) <= (where > 0)).all() and 0.1 < (where > 0).mean() < 0.3
    assert {*read(DataConfig(root="pocket/domino"), ("image",), ("region",))[0].sources} == {"image"}
    with pytest.raises(UserError, match=r"pocket/pairs has no 'region' pictures; pocket/bumble has"):
        read(DataConfig(root="pocket/pairs"), ("image", "region"))


@pytest.mark.parametrize(
    ("edits", "more", "message"),
    [
        (None, [], r"'.*' \(sd\) does not: make one of it, `visiontune expand .* FOLDER`"),
        ("instruct", [], r"\(sd\) does not: take an inpainting model, such as pocket/inpaint"),
        ("inpaint", ["data.columns={region: where}"], r"has no 'region' pictures: put them into the subfolder .*where"),
        ("inpaint", ["data.zoom=0.2"], r"set data\.cache=false"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_with_the_mend(photos, tmp_path, edits, more, message):
    folder = save_tiny(tmp_path / "model", **({"edits": edits} if edits else {}))
    with pytest.raises(UserError, match=message):
        assemble.assemble(run_of(folder, photos, tmp_path, *more))
