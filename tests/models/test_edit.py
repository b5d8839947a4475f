"""Models that edit a picture by an instruction: guidance of two scales, dropout, and runs that show them sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import save_tiny, tiny_model

from visiontune import assemble, models
from visiontune.assemble.build import build
from visiontune.cli import main as cli
from visiontune.config import load_run
from visiontune.core import Condition, Request
from visiontune.data.base import Config, Sample, source
from visiontune.data.loader import BatchSampler
from visiontune.data.picks import Pick
from visiontune.data.rows import Rows
from visiontune.data.transforms import fitted
from visiontune.diffusion.guidance import EditCFG
from visiontune.errors import UserError
from visiontune.guidance.stack import guidance_of
from visiontune.models.expand import expand_input
from visiontune.objectives.base import condition_of

SIZE = (16, 16)


@pytest.fixture
def photos(tmp_path):
    """Two pictures, each with an instruction and what it was made of."""
    (tmp_path / "photos" / "source").mkdir(parents=True)
    for number, words in enumerate(("a red circle", "a blue square on the left")):
        rng = np.random.default_rng(number)
        for place in ("", "source"):
            pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / place / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(words)
    return tmp_path / "photos"


def sample(photos, caption="a red circle", number=0):
    sources = {
        "image": source("image", photos / f"{number}.png"),
        "source": source("source", photos / f"source/{number}.png"),
    }
    return Sample(id=str(number), sources=sources, caption=caption)


def rows_of(model, photos, tmp_path, **options):
    return Rows(model, [sample(photos)], Config(root=str(photos), buckets=False, **options), tmp_path / "cache")


def run_of(folder, photos, tmp_path, *more):
    given = {
        "out": tmp_path, "name": "run", "model.source": folder, "data.root": photos, "train.steps": 2, "judge": "none",
        "train.batch_size": 2, "objective": "denoising", "data.resolution": 16, "preview.prompts": "[]",
        "adapter.rank": 2, "adapter.targets": "attention", "data.buckets": "false",
    }  # fmt: skip
    return load_run("personalise/lora", [*(f"{key}={value}" for key, value in given.items()), *more])


def told(words: float, shown: float) -> Condition:
    return Condition(
        tokens=torch.full((1, 2, 3), words, dtype=torch.float64),
        extra={"channels": torch.full((1, 4, 2, 2), shown, dtype=torch.float64)},
    )


def test_guidance_is_by_words_and_by_the_picture():
    """The equation, and the scales at which it is a prediction of one kind."""
    x, t = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.tensor([500])

    def alone(x, t, cond):
        return x * (cond.tokens.mean((1, 2)) + 3 * cond.extra["channels"].mean((1, 2, 3)))[:, None, None, None]

    c, s, b = (alone(x, t, told(*one)) for one in ((2.0, 5.0), (0.5, 5.0), (0.5, 0.0)))
    for words, picture in ((7.5, 1.5), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        guidance = EditCFG(scale=words, image_scale=picture)
        found = guidance(alone, x, t, t / 1000, told(2.0, 5.0), told(0.5, 9.0))
        torch.testing.assert_close(found, b + picture * (s - b) + words * (c - s))
    torch.testing.assert_close(
        EditCFG(scale=1.0, image_scale=1.0)(alone, x, t, t / 1000, told(2.0, 5.0), told(0.5, 9.0)), c
    )


def test_scales_that_its_pipeline_does_not_take_are_refused():
    model, plain = tiny_model("sd", edits="instruct"), tiny_model("sd")
    assert guidance_of(model, 3.0, None, 2.0) == EditCFG(scale=3.0, image_scale=2.0)
    assert guidance_of(model, 3.0, None) == EditCFG(scale=3.0, image_scale=1.5)
    with pytest.raises(UserError, match=r"is guided by scales above 1, not by 0\.5: set 1 for none"):
        model.guidance(0.5)
    for one, scale in ((model, 1.0), (plain, 3.0)):
        with pytest.raises(
            UserError, match=r"image_cfg_scale guides models of InstructPix2Pix, at a cfg_scale above 1"
        ):
            guidance_of(one, scale, None, 2.0)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_until_it_is_trained_an_editing_model_predicts_what_it_did(family):
    plain, editing = tiny_model(family), expand_input(tiny_model(family), "edit")
    x, t = torch.randn(1, *plain.latent_shape()), torch.tensor([300])
    shown = editing.read([Request(prompt="a circle", pictures=(Image.new("RGB", SIZE, "red"),))])
    assert torch.equal(editing.predict(x, t, shown), plain.predict(x, t, plain.embed(["a circle"])))
    weight = editing.pipe.unet.conv_in.weight.requires_grad_()
    editing.predict(x, t, shown).square().mean().backward()
    assert weight.shape[1] == 8 and weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0


def test_the_verb_writes_what_the_stock_pipeline_opens(tmp_path, capsys):
    save_tiny(tmp_path / "plain")
    assert cli.main(["expand", str(tmp_path / "plain"), str(tmp_path / "editing"), "--for", "edit"]) == 0
    assert "StableDiffusionInstructPix2PixPipeline with 8 input channels" in capsys.readouterr().out
    assert DiffusionPipeline.from_pretrained(tmp_path / "editing").unet.config.in_channels == 8
    model = models.load(str(tmp_path / "editing"))
    assert model.edits and not model.paints
    for purpose in ("paint", "edit"):
        with pytest.raises(UserError, match=r"edits pictures already: train it as it is"):
            expand_input(model, purpose)


def test_rows_are_shown_what_the_pipeline_shows(photos, tmp_path):
    """The channels of a row are those of a request with the same picture: the mean, and not in the latents' scale."""
    model = tiny_model("sd", edits="instruct")
    batch = rows_of(model, photos, tmp_path).collate([Pick(index=0, size=SIZE, seed=7)])
    picture = fitted(Image.open(photos / "source" / "0.png"), SIZE)
    wanted = model.read([Request(prompt="a red circle", pictures=(picture,))], size=SIZE)
    found = condition_of(model, batch)
    torch.testing.assert_close(found.extra["channels"], wanted.extra["channels"], rtol=0, atol=1e-5)
    assert torch.equal(found.tokens, wanted.tokens) and "shown" not in batch.data


def test_sources_are_hidden_from_rows_as_channels_of_zero_or_as_no_references(photos, tmp_path):
    picks = [Pick(index=0, size=SIZE), Pick(index=0, size=SIZE, hide=True)]
    model = tiny_model("sd", edits="instruct")
    channels = condition_of(model, rows_of(model, photos, tmp_path, source_dropout=0.1).collate(picks)).extra[
        "channels"
    ]
    assert channels[0].any() and not channels[1].any()
    model = tiny_model("flux", edits="kontext")
    rows = rows_of(model, photos, tmp_path, source_dropout=0.1)
    assert [len(shown) for shown in condition_of(model, rows.collate(picks)).references] == [1, 0]


def test_words_and_picture_are_dropped_alone_and_together_equally_often(photos, tmp_path):
    """Of 0.1 and 0.1 a twentieth each has no words, no picture, neither. What names a side is not mirrored."""
    rows = rows_of(
        tiny_model("sd", edits="instruct"), photos, tmp_path, caption_dropout=0.1, source_dropout=0.1, flip=True
    )
    picks = BatchSampler(rows, 20_000, seed=0).plan(0)
    kinds = np.array([[p.drop, p.hide] for p in picks])
    shares = [np.mean((kinds == kind).all(1)) for kind in ([1, 0], [0, 1], [1, 1])]
    assert np.abs(np.array(shares) - 0.05).max() < 3 * (0.05 * 0.95 / 20_000) ** 0.5
    assert abs(np.mean([p.flip for p in picks]) - 0.5) < 0.02
    for caption, mirrored in (("a star left of it", False), ("the RIGHT one", False), ("bright leftovers", True)):
        rows.samples[0] = sample(photos, caption)
        assert any(p.flip for p in BatchSampler(rows, 64, seed=0).plan(0)) == mirrored
    with pytest.raises(UserError, match=r"source_dropout and half of data\.caption_dropout are more than the whole"):
        Config(root="x", caption_dropout=0.5, source_dropout=0.9)


@pytest.mark.parametrize("edits", ["one", "several"])
def test_words_that_see_are_made_of_a_rows_caption_and_source(photos, tmp_path, edits):
    model = tiny_model("qwen_image", edits=edits)
    rows = rows_of(model, photos, tmp_path)
    for _ in range(2):  # made, then read back
        found = rows.collate([Pick(index=0, size=SIZE), Pick(index=0, size=SIZE, drop=True)]).cond
        picture = fitted(Image.open(photos / "source" / "0.png"), SIZE)
        for row, words in enumerate(("a red circle", "")):
            wanted = model.words([Request(prompt=words, pictures=(picture,))])
            count = wanted.tokens.shape[1]
            torch.testing.assert_close(found.tokens[row, :count], wanted.tokens[0])
            assert not found.mask[row, count:].any()
        rows = rows_of(model, photos, tmp_path)
    folder = save_tiny(tmp_path / "edit", "qwen_image", edits=edits)
    trainer = build(run_of(folder, photos, tmp_path, "train.parts=[denoiser]"), cache_dir=tmp_path / "cache")
    batch = trainer.rows.batch(0)
    assert trainer.objective.loss(trainer.model, batch, trainer.lender.tools(0)).total.isfinite()
    with pytest.raises(
        UserError, match=r"reads the pictures of its prompts, and runs that train it do not show it any"
    ):
        build(run_of(folder, photos, tmp_path, "train.parts=[denoiser,text]"), cache_dir=tmp_path / "cache")


def test_the_recipe_leaves_an_editing_model_and_pictures_of_before_and_after(photos, tmp_path):
    given = {
        "out": tmp_path, "name": "run", "model.source": save_tiny(tmp_path / "plain"), "data.root": photos,
        "train.steps": 2, "train.warmup": 1, "train.batch_size": 2, "preview.steps": 2, "data.resolution": 16,
        "train.trackers": "[]", "preview.prompts": "['a circle']", "preview.pictures": f"[{photos / '0.png'}]",
    }  # fmt: skip
    folder = assemble.assemble(load_run("edit/instruct", [f"{key}={value}" for key, value in given.items()])).fit()
    made, plain = models.load(str(folder)), models.load(str(tmp_path / "plain"))
    assert made.edits and made.denoiser.conv_in.weight[:, 4:].any()
    assert "pipeline_tag: image-to-image" in (tmp_path / "run" / "README.md").read_text()
    assert not torch.equal(made.denoiser.conv_in.weight[:, :4], plain.denoiser.conv_in.weight)
    with Image.open(tmp_path / "run" / "samples" / "before_after.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 6 * 128  # what is shown and two seeds, of three prompts, twice


def test_what_cannot_be_shown_is_refused_before_the_first_step(photos, tmp_path):
    plain, editing = save_tiny(tmp_path / "plain"), save_tiny(tmp_path / "editing", edits="instruct")
    painting, mask = save_tiny(tmp_path / "painting", edits="inpaint"), tmp_path / "m.png"
    here = f"preview.pictures=[{photos / '0.png'}]"
    Image.new("L", (24, 16), 255).save(mask)
    for folder, more, message in (
        (plain, ["preview.samples=2", "data.ignore=[source]"], r"preview\.samples: model .* reads no pictures"),
        (
            plain,
            ["data.source_dropout=0.1", "data.ignore=[source]"],
            r"hides a column 'source', which the data have not",
        ),
        (plain, ["model.expand=edit"], r"by `visiontune expand .* FOLDER --for edit`, and train the adapter"),
        (editing, ["preview.prompts=[a]"], r"draws nothing from words alone: set preview\.prompts=\[\]"),
        (editing, ["preview.prompts=[a]", "preview.pictures=[no.png]"], r"no\.png"),
        (painting, ["preview.prompts=[a]", here, "data.ignore=[source]"], r"^preview: .* reads a picture and a mask"),
        (
            editing,
            ["preview.prompts=[a]", here, f"preview.masks=[{mask}]"],
            r"^preview: .* reads no mask: leave it out",
        ),
        (editing, ["preview.prompts=[a]", "preview.pictures=[no.png, b.png]"], r"pictures names 2 files for 1 prompts"),
        (editing, ["preview.samples=1", "preview.image_cfg_scale=2", "preview.cfg_scale=1"], r"at a cfg_scale above 1"),
    ):
        with pytest.raises(UserError, match=message):
            build(run_of(folder, photos, tmp_path, *more), cache_dir=tmp_path / "cache")
