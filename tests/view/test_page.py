"""What a page says of runs and of folders of pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from visiontune.config import load_sample
from visiontune.errors import UserError
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.view import page, runs, samples


def data_of(file):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(found[1])


def pixels(uri):
    kind, _, coded = uri.partition(",")
    assert kind == "data:image/webp;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(coded))))


@pytest.fixture
def run(tmp_path):
    """A run's folder as one leaves it that is still going on."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: run\npreview:\n  prompts: [a red circle, a </script> star]\n")
    rows = [{"step": 1, "loss": 0.5, "nan": float("nan")}, {"step": 2, "loss": 0.25, "guard/alarms": 2.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "lo')
    for step in (0, 10):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for prompt in (0, 1):
            color = (step * 20, prompt * 100, 7)
            Image.new("RGB", (8, 8), color).save(place / f"{prompt:02d}_seed3.png")
        Image.new("RGB", (8, 8)).save(place / "grid.png")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    terms = [{"cfg": 2}, {"reward": {"reward": "brightness", "scale": 10}}]
    options = {
        "prompts": ["a red circle", "it's <b>blue</b>"],
        "seeds": 2,
        "steps": 1,
        "device": "cpu",
        "guidance": terms,
    }
    generate(SampleConfig(**options, out=str(out), held_out="jpeg", negative_prompt="small"), tiny_model("sd"))
    return out


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(run):
    file = page.write([run])
    assert file == run / "index.html"
    (shown,) = data_of(file)["runs"]
    assert shown["metrics"] == {"loss": [[1, 0.5], [2, 0.25]], "guard/alarms": [[2, 2.0]]}
    assert shown["alarms"] == [{"step": 2, "alarms": "bounds of the guards broken: 2; see guards/step-000002"}]
    assert shown["prompts"] == ["a red circle", "a </script> star"]
    assert [one["step"] for one in shown["previews"]] == [0, 10]
    for at in shown["previews"]:
        assert [(one["prompt"], one["seed"]) for one in at["pictures"]] == [(0, 3), (1, 3)]
        for one in at["pictures"]:
            assert (pixels(one["src"]) == (at["step"] * 20, one["prompt"] * 100, 7)).all()
    assert shown["card"] is None and shown["beforeAfter"] is None


def test_texts_of_files_cannot_end_the_script(run):
    (run / "README.md").write_text("</script><script>alert(1)</script><!--")
    text = page.write([run]).read_text()
    assert text.count("</script>") == 2 and "alert(1)</script>" not in text
    assert data_of(run / "index.html")["runs"][0]["card"] == "</script><script>alert(1)</script><!--"
    named = run.rename(run.parent / "@DATA@<i>")
    text = page.write([named]).read_text()
    assert "<title>@DATA@&lt;i&gt;</title>" in text
    assert data_of(named / "index.html")["runs"][0]["name"] == "@DATA@<i>"


def test_pictures_have_their_scores_and_the_command_that_draws_them(drawn, tmp_path):
    scores = {"images": [{"file": "00000_seed1.png", "prompt": "a red circle", "oracle": 0.5}]}
    (drawn / "scores.json").write_text(json.dumps(scores))
    (folder,) = data_of(page.write([drawn], tmp_path / "page.html"))["samples"]
    rows = {row["file"]: row for row in map(json.loads, (drawn / "manifest.jsonl").read_text().splitlines())}
    assert [one["file"] for one in folder["pictures"]] == sorted(rows) and folder["missing"] == 0
    assert (tmp_path / folder["base"] / "00000_seed0.png").resolve() == (drawn / "00000_seed0.png").resolve()
    for one in folder["pictures"]:
        row = rows[one["file"]]
        assert one["scores"]["reward"] == row["guided"]["reward"][1]
        assert ("oracle" in one["scores"]) == (one["file"] == "00000_seed1.png")
        with Image.open(drawn / one["file"]) as picture:
            assert np.array_equal(pixels(one["src"]), np.array(picture))
        config = load_sample("sample/prompts", shlex.split(one["command"])[2:])
        assert config.prompts == [row["prompt"]] and config.seeds == [row["seed"]] and config.held_out == "jpeg"
        assert config.guidance == row["settings"]["guidance"] and config.negative_prompt == "small"
        assert config.steps == 1 and config.cfg_scale is None


def test_what_is_not_there_is_counted(drawn, tmp_path):
    for file in ("manifest.jsonl", "00001_seed0.png"):
        (tmp_path / file).write_bytes((drawn / file).read_bytes())
    shown = samples.read(tmp_path)
    assert shown["missing"] == 3 and [one["file"] for one in shown["pictures"]] == ["00001_seed0.png"]


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a training run nor pictures"):
        page.write([tmp_path])
    with pytest.raises(UserError, match="there is no folder"):
        page.write([tmp_path / "nowhere"])
    assert not runs.is_run(tmp_path) and not (tmp_path / "index.html").exists()


def test_scores_of_another_kind_are_refused(drawn, tmp_path):
    (tmp_path / "manifest.jsonl").write_bytes((drawn / "manifest.jsonl").read_bytes())
    (tmp_path / "scores.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="holds no scores of images"):
        samples.read(tmp_path)


def test_a_page_of_somebody_else_is_not_written_over(run):
    file = page.write([run])
    page.write([run])
    file.write_text("<html>my own</html>")
    with pytest.raises(UserError, match="is no page of visiontune: name another file with --out"):
        page.write([run])
    assert page.named(run).startswith("no page of it: ") and file.read_text() == "<html>my own</html>"


def test_more_pictures_than_a_page_should_hold_unasked_are_named_only(drawn, tmp_path, monkeypatch):
    (tmp_path / "manifest.jsonl").write_bytes((drawn / "manifest.jsonl").read_bytes())
    monkeypatch.setattr(page, "_MOST", 3)
    assert page.named(tmp_path) == f"visiontune view {tmp_path} shows them"
    assert not (tmp_path / "index.html").exists()
