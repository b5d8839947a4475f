"""Grids: every cell is drawn as it would be alone, and their X/Y plots."""

from __future__ import annotations

import json
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_tiny, tiny_model

from visiontune import adapters
from visiontune.config import load_sample
from visiontune.errors import UserError
from visiontune.models import load as load_model
from visiontune.sampling import outlook
from visiontune.sampling.cells import cells
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.manifest import plan
from visiontune.sampling.pipeline import images
from visiontune.sampling.sheets import plots
from visiontune.schema import from_mapping
from visiontune.view import samples

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("sd")


def _config(out: Path, grid: object, **options: object) -> SampleConfig:
    given = {"out": str(out), "prompts": PROMPTS, "seeds": 1, "batch_size": 2, "grid": grid}
    return from_mapping(SampleConfig, {**given, "device": "cpu", **options})


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def _adapter(path: Path, model: Any, seed: int) -> str:
    made = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    made.save(path)
    made.detach()
    return str(path)


def test_cells_are_the_product_in_the_order_that_loads_least(tmp_path: Path) -> None:
    grid = {"steps": [1, 2], "adapter": [None, "runs/dog", {"file": "runs/dog/adapter.safetensors", "scale": 0.5}]}
    found = cells(_config(tmp_path, grid))
    assert [(cell.config.adapter, cell.config.steps) for cell in found[:3]] == [(None, 1), (None, 2), ("runs/dog", 1)]
    assert [cell.name for cell in found] == ["a0t0", "a0t1", "a1t0", "a1t1", "a2t0", "a2t1"]
    assert [cell.at["adapter"] for cell in found] == ["none"] * 2 + ["dog"] * 2 + ["dog 0.5"] * 2
    assert [cell.config.grid for cell in found] == [None] * 6
    alone = cells(_config(tmp_path, None))
    assert [(cell.name, cell.at) for cell in alone] == [("", {})]


def test_a_grid_is_read_from_a_command(tmp_path: Path) -> None:
    words = ["grid.steps=[5, 10]", "grid.guidance=[null, [{pag: 2}]]", "grid.adapter=[null, runs/a, [runs/a, runs/b]]"]
    grid = load_sample("sample/prompts", words).grid
    assert grid is not None and grid.steps == [5, 10] and grid.guidance == [None, [{"pag": 2}]]
    assert grid.adapter == [None, "runs/a", ["runs/a", "runs/b"]]
    whole = load_sample("sample/prompts", ["grid={cfg_scale: [1, 2.5], plot: [cfg_scale, seed]}"]).grid
    assert whole is not None and whole.cfg_scale == [1.0, 2.5] and whole.plot == ["cfg_scale", "seed"]


def test_what_is_wrong_with_a_grid_is_one_line(model: Any, tmp_path: Path) -> None:
    for grid, message in (
        ({}, "it names no axis"),
        ({"steps": [1, 2, 1]}, "steps has a value twice"),
        ({"steps": [1, 2], "plot": ["steps", "cfg_scale"]}, "plot names 'cfg_scale', which is no axis here"),
        ({"steps": [1, 2], "plot": ["steps"]}, "plot must be two axes or three"),
        ({"step": [1]}, "grid.step is not an option of grid; did you mean 'steps'"),
        (16, "grid is now sheet"),
    ):
        with pytest.raises(UserError, match=message):
            _config(tmp_path / "out", grid)
    for options, message in (
        ({"grid": {"steps": [1, 2]}, "steps": 3}, "steps is given, and grid.steps takes its place"),
        (
            {"grid": {"guidance": [None, [{"cfg": 2}]], "cfg_scale": [1, 2]}},
            r"grid \(guidance cfg 2, cfg_scale 1\): guidance has cfg, which takes the place of cfg_scale",
        ),
        ({"grid": {"model": ["a", "b"]}}, "grid.model names models, and one is given already"),
        (
            {"grid": {"steps": [1, 2]}, "seeds": 300},
            "make 1200 pictures, which may be more than was meant: confirm=true",
        ),
    ):
        with pytest.raises(UserError, match=message):
            generate(_config(tmp_path / "out", **{"grid": None, **options}), model)
    assert not (tmp_path / "out").exists()


def test_each_cell_is_drawn_as_it_would_be_alone_and_adapters_are_read_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_adapter(tmp_path / f"{name}.safetensors", model, i) for i, name in enumerate("ab")]
    load, read = adapters.load, list[Path]()
    monkeypatch.setattr(adapters, "load", lambda nets, file, **named: [read.append(file), load(nets, file, **named)][1])
    grid = {"adapter": [None, *files], "adapter_scale": [0.5, 1.0], "steps": [1, 2]}
    said: list[str] = []
    # More than a cell has: a batch is of one cell.
    generate(_config(tmp_path / "out", grid, batch_size=3), model, said.append)
    assert [str(file) for file in read] == files and not adapters.attached(model.networks())
    assert said[0] == "grid: 3 of adapter x 2 of adapter_scale x 2 of steps x 2 prompts and 1 seeds make 24 pictures"
    assert said[1].endswith("on the disk")
    rows = _rows(tmp_path / "out")
    assert len(rows) == 24
    for row in rows:
        own = row["settings"]
        assert row["file"].startswith(f"{row['cell']}_")
        sets = [load(model.networks(), Path(one["file"])) for one in own["adapter"]]
        for one in sets:
            one.scale = own["adapter_scale"]
        expected = images(model, PROMPTS, 0, steps=own["steps"], batch_size=2)[row["index"]]
        for one in sets:
            one.detach()
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected)
        name = Path(own["adapter"][0]["file"]).stem if own["adapter"] else "none"
        assert row["at"] == {"adapter": name, "adapter_scale": f"{own['adapter_scale']:g}", "steps": str(own["steps"])}


def test_axes_grow_and_a_value_that_is_gone_is_refused(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(_config(out, {"steps": [1]}), model)
    kept = (out / "t0_00000_seed0.png").stat().st_mtime_ns
    for _ in range(2):
        generate(_config(out, {"steps": [1, 2]}), model)
    assert (out / "t0_00000_seed0.png").stat().st_mtime_ns == kept and len(_rows(out)) == 4
    with pytest.raises(UserError, match="its grid had steps 2, which is gone"):
        generate(_config(out, {"steps": [1]}), model)
    with pytest.raises(UserError, match="steps was 1 and is 2"):
        generate(_config(out, {"steps": [2, 1]}), model)
    with pytest.raises(UserError, match="its grid had steps 1, which is gone"):
        generate(_config(out, None), model)
    for one in samples.read(out)["pictures"]:
        assert one["at"]["steps"] in one["command"].partition("steps=")[2][:2]


def test_models_are_an_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [
        str(save_tiny(tmp_path / name, **options))
        for name, options in (("one", {}), ("two", {"prediction_type": "v_prediction"}))
    ]
    opened: list[str] = []
    models: list[weakref.ref[Any]] = []

    def opening(source: str, **named: Any) -> Any:
        assert all(one() is None for one in models), "two models are in memory"
        opened.append(source)
        made = load_model(source, **named)
        models.append(weakref.ref(made))
        return made

    monkeypatch.setattr("visiontune.models.load", opening)
    generate(_config(tmp_path / "out", {"model": folders, "steps": [1, 2]}))
    assert opened == folders
    rows = _rows(tmp_path / "out")
    assert {row["at"]["model"] for row in rows} == {"one", "two"}
    for row in rows:
        expected = images(
            load_model(row["settings"]["model"]), PROMPTS, 0, steps=row["settings"]["steps"], batch_size=2
        )
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected[row["index"]])


def test_a_grid_does_not_mix_models_unasked(model: Any, tmp_path: Path) -> None:
    made = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    file = made.save(tmp_path / "a.safetensors", {"base_model": "somebody/else"})
    made.detach()
    with pytest.raises(UserError, match="with different models, pocket/sd and somebody/else: name one with model="):
        generate(_config(tmp_path / "out", {"adapter": [None, str(file)]}))


def test_plots_have_every_picture_once_at_its_place(tmp_path: Path) -> None:
    config = _config(tmp_path, {"cfg_scale": [1, 2], "steps": [1, 2, 3]})
    found = cells(config)
    jobs = [job for i, cell in enumerate(found) for job in plan(PROMPTS, [5, 6], "png", cell.name, i)]
    pages = plots(["steps", "seed", "prompt"], jobs, found)
    assert [page.title for page in pages[:3]] == [
        "a red circle, cfg_scale 1",
        "a red circle, cfg_scale 2",
        "a blue square, cfg_scale 1",
    ]
    assert pages[1].columns == ["steps 1", "steps 2", "steps 3"] and pages[1].rows == ["seed 5", "seed 6"]
    assert pages[1].files[:4] == [f"c1t{i}_00000_seed5.png" for i in range(3)] + ["c1t0_00000_seed6.png"]
    assert sorted(file for page in pages for file in page.files if file) == sorted(job.file for job in jobs)
    # By default the first two axes, or one against the prompts.
    assert plots([], jobs, found)[0].rows == ["steps 1", "steps 2", "steps 3"]
    single = cells(_config(tmp_path, {"steps": [1, 2]}))
    jobs = [job for i, cell in enumerate(single) for job in plan(PROMPTS, [5], "png", cell.name, i)]
    (page,) = plots([], jobs, single)
    assert page.rows == PROMPTS and page.columns == ["steps 1", "steps 2"] and page.title == ""


def test_plots_follow_the_axes_that_are_asked_for_and_draw_nothing_anew(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(_config(out, {"steps": [1, 2], "cfg_scale": [1, 2]}), model)
    assert sorted(path.name for path in out.glob("plot_*")) == ["plot_000.png", "plot_001.png"]
    said: list[str] = []
    generate(
        _config(out, {"steps": [1, 2], "cfg_scale": [1, 2], "plot": ["steps", "prompt", "cfg_scale"]}),
        model,
        said.append,
    )
    assert len(list(out.glob("plot_*"))) == 2 and len(said) == 1
    for page, scale in enumerate("01"):
        with Image.open(out / f"plot_{page:03d}.png") as sheet:
            for x, y in ((0, 0), (1, 1)):
                with Image.open(out / f"c{scale}t{x}_0000{y}_seed0.png") as picture:
                    left, top = 164 + 132 * x, 16 + 16 + 4 + 132 * y
                    cell = sheet.crop((left, top, left + 128, top + 128)).resize(picture.size, Image.Resampling.NEAREST)
                    np.testing.assert_array_equal(np.asarray(cell), np.asarray(picture))
    generate(_config(out, {"steps": [1, 2], "cfg_scale": [1, 2], "plot": ["steps", "cfg_scale", "prompt"]}), model)
    assert len(list(out.glob("plot_*"))) == 2


def test_room_is_looked_for_ahead_and_time_is_told(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "free")
    monkeypatch.setattr(outlook.shutil, "disk_usage", lambda _: disk(2**10))
    with pytest.raises(UserError, match=r"2 pictures of 16x16 may take 1\.2 KiB, and .* has room for 1\.0 KiB"):
        generate(_config(tmp_path / "out", None, steps=1), model)
    monkeypatch.setattr(outlook, "WORTH_TRYING", 1)
    seconds = iter([5, 9])  # of one step and of three: 3 s around steps of 2 s
    monkeypatch.setattr(outlook, "_seconds", lambda *_: next(seconds))
    said: list[str] = []
    generate(_config(tmp_path / "out", {"steps": [1, 2]}, confirm=True), model, said.append)
    assert said[1] == "about 2.4 KiB on the disk, about 12 s by a trial"
