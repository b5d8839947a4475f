"""Painting models made of text-to-image ones, and trained on regions of the user's or of chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from tiny import save_tiny, tiny_model

from visiontune import adapters, assemble, models
from visiontune.assemble.build import build
from visiontune.cli import main as cli
from visiontune.config import load_run
from visiontune.core import Request
from visiontune.data.base import Config, Sample, source
from visiontune.data.picks import Pick
from visiontune.data.rows import Rows
from visiontune.data.transforms import random_region
from visiontune.errors import UserError
from visiontune.models.expand import expand_input
from visiontune.objectives.base import condition_of

SIZE = (16, 16)


def half(picture):
    """White in the left half."""
    return Image.fromarray(np.uint8(255 * (np.indices(picture.size[::-1])[1] < picture.width // 2)))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "region").mkdir(parents=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        picture.save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("a red circle")
        half(picture).save(tmp_path / "photos" / "region" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_until_it_is_trained_an_expanded_model_predicts_what_it_did(family):
    plain, painting = tiny_model(family), expand_input(tiny_model(family))
    x, t = torch.randn(2, *plain.latent_shape()), torch.tensor([300, 700])
    requests = [
        Request(prompt=text, pictures=(Image.new("RGB", SIZE, colour),), mask=half(Image.new("L", SIZE)))
        for text, colour in (("a circle", "red"), ("a square", "green"))
    ]
    shown = painting.read(requests)
    assert torch.equal(painting.predict(x, t, shown), plain.predict(x, t, plain.embed(["a circle", "a square"])))
    weight = painting.pipe.unet.conv_in.weight.requires_grad_()
    painting.predict(x, t, shown).square().mean().backward()
    assert weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0  # of the mask's channel and of each of the picture's


def test_the_verb_writes_what_the_stock_pipeline_opens(tmp_path, capsys):
    save_tiny(tmp_path / "plain")
    assert cli.main(["expand", str(tmp_path / "plain"), str(tmp_path / "painting")]) == 0
    assert "StableDiffusionInpaintPipeline with 9 input channels" in capsys.readouterr().out
    stock = DiffusionPipeline.from_pretrained(tmp_path / "painting")
    assert type(stock).__name__ == "StableDiffusionInpaintPipeline" and stock.unet.config.in_channels == 9
    model = models.load(str(tmp_path / "painting"))
    assert model.paints and model.latent_shape() == (4, 8, 8)


def test_what_cannot_be_expanded_is_refused():
    with pytest.raises(UserError, match=r"'tiny-sd3' \(sd3\) cannot be expanded: give a model of sd or sdxl"):
        expand_input(tiny_model("sd3"))
    with pytest.raises(UserError, match=r"paints into pictures already"):
        expand_input(tiny_model("sd", edits="inpaint"))


def test_rows_are_shown_what_the_pipeline_shows(photos, tmp_path):
    """The channels of a row are those of a request with the same picture and mask."""
    model = tiny_model("sd", edits="inpaint")
    sources = {"image": source("image", photos / "0.png"), "region": source("region", photos / "region" / "0.png")}
    sample = Sample(id="0", sources=sources, caption="a red circle")
    rows = Rows(model, [sample], Config(root=str(photos)), tmp_path / "cache")
    batch = rows.collate([Pick(index=0, size=SIZE)])
    picture = Image.open(photos / "0.png")
    wanted = model.read([Request(prompt="a red circle", pictures=(picture,), mask=half(picture))], size=SIZE)
    found = condition_of(model, batch)
    torch.testing.assert_close(found.extra["channels"], wanted.extra["channels"], rtol=0, atol=1e-6)
    assert "region" not in batch.data and torch.equal(found.tokens, wanted.tokens)


def test_without_regions_they_are_drawn_anew_at_every_visit(photos, tmp_path):
    model = tiny_model("sd", edits="inpaint")
    sample = Sample(id="0", sources={"image": source("image", photos / "0.png")}, caption="a red circle")
    rows = Rows(model, [sample], Config(root=str(photos)), tmp_path / "cache")
    one, same, other = (rows.channels(Pick(index=0, size=SIZE, seed=seed))[0, 0] for seed in (1, 1, 3))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_random_regions_are_rectangles_or_all():
    rng = torch.Generator().manual_seed(0)
    shares = torch.stack([random_region((40, 64), rng).mean() for _ in range(2000)])
    assert abs((shares == 1).double().mean() - 0.25) < 0.03
    part = shares[shares < 1]
    assert part.min() >= 0.9 * 0.125**2 and 0.15 < part.mean() < 0.35
    assert {*random_region((40, 64), rng).unique().tolist()} <= {0.0, 1.0}


def run_of(folder, photos, tmp_path, *more):
    given = {
        "out": tmp_path, "name": "run", "model.source": folder, "data.root": photos, "train.steps": 2, "judge": "none",
        "train.batch_size": 2, "objective": "denoising", "data.resolution": 16, "preview.prompts": "[]",
        "adapter.rank": 2, "adapter.targets": "[attention, conv_in]",
    }  # fmt: skip
    return load_run("personalise/lora", [*(f"{key}={value}" for key, value in given.items()), *more])


@pytest.mark.parametrize("regions", [True, False])
def test_an_adapter_learns_to_paint(photos, tmp_path, regions):
    folder = save_tiny(tmp_path / "painting", edits="inpaint")
    more = [] if regions else ["data.ignore=[region]"]
    file = assemble.assemble(run_of(folder, photos, tmp_path, *more)).fit()
    made = adapters.load(models.load(str(folder)).networks(), file)
    change, _ = made.change("unet.conv_in")
    assert change.shape[1] == 9 and change[:, 4:].abs().max() > 0


@pytest.mark.parametrize("edits", ["kontext", "fill"])
def test_flow_transformers_are_shown_their_column_in_a_training_step(photos, tmp_path, edits):
    """The error of a step depends on what the picture was made of, or on where it is painted."""
    folder = save_tiny(tmp_path / edits, "flux", edits=edits)
    column = photos / ("source" if edits == "kontext" else "region")
    (photos / "region").rename(column)
    run, found = run_of(folder, photos, tmp_path, "adapter.targets=attention", "data.cache=false"), []
    for turned in (False, True):
        for file in column.iterdir() if turned else ():
            ImageOps.mirror(Image.open(file)).save(file)
        trainer = build(run, cache_dir=tmp_path / "cache")
        batch = trainer.rows.batch(0)
        found.append(trainer.objective.loss(trainer.model, batch, trainer.lender.tools(0)).total.item())
    assert np.isfinite(found).all() and found[0] != found[1]


def test_an_edit_without_what_it_was_made_of_is_refused(photos, tmp_path):
    edit = save_tiny(tmp_path / "edit", "qwen_image", edits="one")
    with pytest.raises(UserError, match=r"put what each picture was made of into a column 'source'"):
        assemble.assemble(run_of(edit, photos, tmp_path, "adapter.targets=attention", "data.ignore=[region]"))


def test_what_cannot_be_shown_or_drawn_is_refused_before_the_first_step(photos, tmp_path):
    painting = save_tiny(tmp_path / "painting", edits="inpaint")
    for more, message in (
        (["preview.prompts=[a]"], r"draws nothing from words alone: set preview\.prompts=\[\]"),
        (["objective=dreambooth"], r"draws nothing from words alone: set objective\.prior=none"),
    ):
        with pytest.raises(UserError, match=message):
            assemble.assemble(run_of(painting, photos, tmp_path, *more))
    plain = save_tiny(tmp_path / "plain")
    with pytest.raises(UserError, match=r"a column 'region', where a model paints .* data\.ignore=\[region\]"):
        assemble.assemble(run_of(plain, photos, tmp_path))
    Image.new("L", (16, 16)).save(photos / "region" / "1.png")
    with pytest.raises(UserError, match=r"1 regions without a white pixel"):
        assemble.assemble(run_of(painting, photos, tmp_path))
