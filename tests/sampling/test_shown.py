"""Pictures and masks beside prompts, from the command line: what is drawn, at what size, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny, tiny_model

from visiontune.assemble import assemble
from visiontune.config import load_run
from visiontune.core import Request
from visiontune.errors import UserError
from visiontune.models import load
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.shown import read, size_for
from visiontune.schema import from_mapping


@pytest.fixture
def files(tmp_path):
    """Two pictures, a mask of them, one of another size, and one with nothing in it."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.uint8(255 * (np.indices((16, 16))[0] > 7))).save(tmp_path / "mask.png")
    Image.new("L", (16, 24), 255).save(tmp_path / "tall.png")
    Image.new("L", (16, 16), 0).save(tmp_path / "blank.png")
    return {file.stem: str(file) for file in tmp_path.glob("*.png")}


def drawn(folder, out, **options):
    given = {"model": str(folder), "out": str(out), "prompts": ["a red circle"], "steps": 2, "device": "cpu"}
    file = generate(from_mapping(SampleConfig, {**given, **options}))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return np.asarray(Image.open(out / rows[0]["file"])), rows[0]["settings"]


@pytest.mark.parametrize(
    ("family", "edits", "given"),
    [
        ("sd", "inpaint", {"pictures": "a", "mask": "mask"}),
        ("sd", "instruct", {"pictures": "a"}),
        ("flux", "kontext", {"pictures": ["b"]}),
        ("flux2", None, {"pictures": ["a", "b"]}),
    ],
)
def test_pictures_are_those_of_requests_from_python(files, tmp_path, family, edits, given):
    given = {k: [files[one] for one in v] if isinstance(v, list) else files[v] for k, v in given.items()}
    folder = save_tiny(tmp_path / "model", family, **({"edits": edits} if edits else {}))
    more = {"image_cfg_scale": 2.0} if edits == "instruct" else {}
    shown, settings = drawn(folder, tmp_path / "out", cfg_scale=3.0, **given, **more)
    model = load(str(folder))
    named = given["pictures"] if isinstance(given["pictures"], list) else [given["pictures"]]
    request = Request(
        prompt="a red circle",
        pictures=tuple(Image.open(file) for file in named),
        mask=Image.open(given["mask"]) if "mask" in given else None,
    )
    from visiontune.guidance.stack import guidance_of

    guidance = guidance_of(model, 3.0, None, more.get("image_cfg_scale"))
    wanted = model.draw([request], steps=2, guidance=guidance)[0]
    np.testing.assert_allclose(shown / 255, wanted, atol=1 / 255)
    assert len(settings["pictures"]) == len(named) and ("mask" in settings) == ("mask" in given)


def test_pictures_are_an_axis_of_a_grid(files, tmp_path):
    folder = save_tiny(tmp_path / "model", "flux2")
    axis = [files["a"], [files["b"], files["a"]]]
    given = {"model": str(folder), "out": str(tmp_path / "out"), "prompts": ["a red circle"], "steps": 1}
    file = generate(from_mapping(SampleConfig, {**given, "device": "cpu", "grid": {"pictures": axis}}))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["at"]["pictures"] for row in rows] == ["a", "b + a"]
    assert [len(row["settings"]["pictures"]) for row in rows] == [1, 2]
    one, two = (np.asarray(Image.open(tmp_path / "out" / row["file"])) for row in rows)
    assert (one != two).any()
    with pytest.raises(UserError, match=r"no\.png"):
        generate(from_mapping(SampleConfig, {**given, "grid": {"pictures": [str(tmp_path / "no.png")]}}))


def test_a_folder_is_of_one_picture_and_another_is_refused(files, tmp_path):
    folder = save_tiny(tmp_path / "model", edits="instruct")
    drawn(folder, tmp_path / "out", pictures=files["a"])
    Image.open(files["b"]).save(files["a"])
    with pytest.raises(UserError, match="pictures was"):
        drawn(folder, tmp_path / "out", pictures=files["a"])


def test_what_is_drawn_into_a_pictures_place_has_its_shape(files):
    wide = read([files["a"]])
    for family, options, expected in (("sd", {"edits": "instruct"}, (144, 256)), ("sd", {}, None), ("flux2", {}, None)):
        model = tiny_model(family, **options)
        model.resolution = 192
        shown = type(wide)(pictures=(Image.new("RGB", (100, 50)),))
        size = size_for(model, shown)
        assert size == (expected or (192, 192)) and size_for(model, read([])) == (192, 192)
        fitted = shown.fitted(model, size).pictures[0]
        assert fitted.size == ((size[1], size[0]) if expected else (100, 50))


def test_what_is_painted_on_a_canvas_is_its_right_panel(files, tmp_path):
    folder = save_tiny(tmp_path / "model", edits="inpaint")
    wide, hole = np.full((16, 32, 3), 128, np.uint8), np.zeros((16, 32), np.uint8)
    wide[:, :16], hole[:, 16:] = np.asarray(Image.open(files["a"])), 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    by_hand = {"pictures": str(tmp_path / "wide.png"), "mask": str(tmp_path / "hole.png"), "height": 16, "width": 32}
    whole, _ = drawn(folder, tmp_path / "whole", **by_hand)
    picture, settings = drawn(folder, tmp_path / "out", pictures=files["a"], canvas=True, height=16, width=16)
    assert settings["canvas"] is True and picture.shape == (16, 16, 3)
    assert np.array_equal(picture, whole[:, 16:])


def test_a_run_on_canvases_is_drawn_on_canvases(files, tmp_path):
    folder, data = save_tiny(tmp_path / "model", edits="inpaint"), tmp_path / "data"
    (data / "source").mkdir(parents=True)
    for name in ("a", "b"):
        Image.open(files[name]).save(data / f"{name}.png")
        Image.open(files["b"]).save(data / "source" / f"{name}.png")
    (data / "a.txt").write_text("paint it blue")
    (data / "b.txt").write_text("leave it")
    options = [f"model={folder}", f"data.root={data}", "data.resolution=16", f"out={tmp_path / 'runs'}"]
    options += ["train.steps=2", "train.batch_size=1", "train.warmup=0", "preview.samples=1", "preview.steps=2"]
    trainer = assemble(load_run("edit/canvas", options))
    assert trainer.rows.rows.buckets == {(16, 32): [0, 1]}
    adapter = trainer.fit()
    with Image.open(adapter.parent / "samples" / "step-000002" / "00_seed0.png") as preview:
        assert preview.width == 2 * preview.height
    shown = {"adapter": str(adapter), "pictures": files["a"], "height": 16, "width": 16}
    picture, _ = drawn(folder, tmp_path / "out", canvas=True, **shown)
    assert picture.shape == (16, 16, 3)
    with pytest.raises(UserError, match="trained on canvases of two panels: set canvas=true"):
        drawn(folder, tmp_path / "other", **{**shown, "mask": files["mask"]})


def test_a_run_on_canvases_wants_a_model_that_paints_and_one_picture_a_row(files, tmp_path):
    data = tmp_path / "data"
    (data / "source").mkdir(parents=True)
    for place in (data, data / "source"):
        Image.open(files["a"]).save(place / "a.png")
    (data / "a.txt").write_text("paint it blue")
    options = [f"data.root={data}", "data.resolution=16", f"out={tmp_path / 'runs'}", "preview.samples=0"]
    plain = save_tiny(tmp_path / "plain")
    with pytest.raises(UserError, match=r"data\.canvas is for models that paint into pictures"):
        assemble(load_run("edit/canvas", [*options, f"model={plain}"]))
    with pytest.raises(UserError, match=r"data\.canvas makes one picture of source and image, and objective=dreamcom"):
        assemble(load_run("edit/canvas", [*options, f"model={plain}", "objective={name: dreamcom}"]))


@pytest.mark.parametrize(
    ("options", "edits", "message"),
    [
        ({"pictures": "no"}, "instruct", r"no\.png"),
        ({"mask": "mask"}, "inpaint", r"mask\.png has no picture that it belongs to: name that too, in pictures"),
        (
            {"pictures": "a", "mask": "tall"},
            "inpaint",
            r"tall\.png is 16x24, and its picture .*a\.png 16x16: make it as",
        ),
        ({"pictures": "a", "mask": "blank"}, "inpaint", r"blank\.png has no white pixel, so nothing would be painted"),
        ({"pictures": "a"}, "inpaint", r"reads a picture and a mask beside each prompt: name .* pictures= and mask="),
        ({}, "instruct", r"reads a picture beside each prompt: name their files by pictures="),
        ({"pictures": "a", "mask": "mask"}, "instruct", "reads no mask: leave it out"),
        ({"pictures": "a"}, None, "reads no pictures: leave them out"),
        ({"pictures": "a", "paste": True}, "instruct", r"paste takes from one picture what lies outside of mask="),
        ({"pictures": "a", "mask": "mask", "canvas": True}, "inpaint", "canvas has one picture to show"),
        ({"pictures": "a", "canvas": True}, "instruct", "canvas is for models that paint into pictures"),
        ({"image_cfg_scale": 2.0}, None, "image_cfg_scale guides models of InstructPix2Pix"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(files, tmp_path, options, edits, message):
    folder = save_tiny(tmp_path / "model", **({"edits": edits} if edits else {}))
    files = {**files, "no": str(tmp_path / "no.png")}
    given = {key: files[value] if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        drawn(folder, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
