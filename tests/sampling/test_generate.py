"""Generation into a folder: complete, resumable after any kill, the same on several processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import apart
from tiny import save_tiny, tiny_model

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.files import Lock
from visiontune.models import load as load_model
from visiontune.ops.threads import Threads
from visiontune.sampling import drawing
from visiontune.sampling import generate as module
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.sources import base_of
from visiontune.schema import from_mapping
from visiontune.signals import Interrupted

PROMPTS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny-sd"))


def _config(folder: Path, out: Path, **options: object) -> SampleConfig:
    given = {"model": str(folder), "out": str(out), "prompts": PROMPTS, "seeds": 2, "steps": 2, "batch_size": 4}
    return from_mapping(SampleConfig, {**given, "device": "cpu", **options})


def _rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def _bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def _pixels(file: Path) -> bytes:
    with Image.open(file) as read:
        return read.tobytes()


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert generate(_config(folder, out)) == out / "manifest.jsonl"
    return out


def test_every_image_once_with_a_line_and_a_grid(finished: Path) -> None:
    rows = _rows(finished)
    names = [f"{i:05d}_seed{s}.png" for i in range(3) for s in range(2)]
    assert [row["file"] for row in rows] == names
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in PROMPTS for s in range(2)]
    assert all(row["settings"]["steps"] == 2 for row in rows)
    assert sorted(_bytes(finished)) == sorted([*names, "manifest.jsonl", "grid.png"])
    with Image.open(finished / "grid.png") as sheet:
        # Three rows of two 128-pixel cells.
        assert sheet.width > 256 and sheet.height > 384


def test_images_are_those_of_the_library_function(finished: Path) -> None:
    prompts, seeds = [p for p in PROMPTS for _ in range(2)], [0, 1] * 3
    expected = module.images(tiny_model("sd"), prompts, seeds, steps=2, batch_size=4)
    for row, image in zip(_rows(finished), expected, strict=True):
        with Image.open(finished / row["file"]) as read:
            np.testing.assert_array_equal(np.asarray(read), image)


def test_a_finished_folder_costs_nothing(folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _bytes(finished)
    monkeypatch.setattr("visiontune.sampling.drawing.images", lambda *_, **__: pytest.fail("sampled again"))
    monkeypatch.setattr("visiontune.models.load", lambda *_, **__: pytest.fail("loaded the model"))
    generate(_config(folder, finished))
    assert _bytes(finished) == before


def test_resume_fills_every_kind_of_gap_bit_for_bit(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    whole = _bytes(finished)
    lines = whole["manifest.jsonl"].splitlines(keepends=True)
    for i in (0, 1, 2, 4):
        (out / _rows(finished)[i]["file"]).write_bytes(whole[_rows(finished)[i]["file"]])
    # Image 0 lost its line, the file of line 3 is gone, line 4 was cut, image 5 was never made.
    (out / "manifest.jsonl").write_bytes(lines[1] + lines[2] + lines[3] + lines[4][:-30])
    (out / ".00002_seed1.77.tmp.png").write_bytes(b"half")
    kept = (out / "00000_seed1.png").stat().st_mtime_ns
    generate(_config(folder, out))
    assert _bytes(out) == whole
    assert (out / "00000_seed1.png").stat().st_mtime_ns == kept


def test_adding_prompts_and_seeds_keeps_what_is_there(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(_config(folder, out, prompts=PROMPTS[:1], seeds=1, batch_size=1))
    kept = (out / "00000_seed0.png").stat().st_mtime_ns
    generate(_config(folder, out))
    assert (out / "00000_seed0.png").stat().st_mtime_ns == kept
    assert [row["file"] for row in _rows(out)] == [row["file"] for row in _rows(finished)]


def test_other_settings_in_the_same_folder_are_refused(folder: Path, finished: Path) -> None:
    before = _bytes(finished)
    with pytest.raises(UserError) as caught:
        generate(_config(folder, finished, steps=3, cfg_scale=7.5, format="webp"))
    for words in ("steps was 2 and is 3", "cfg_scale was 4.0 and is 7.5", "format was 'png' and is 'webp'"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"prompts\[0\] was 'a red circle' and is 'x'"):
        generate(_config(folder, finished, prompts=["x", *PROMPTS[1:]]))
    assert _bytes(finished) == before


def test_what_guides_in_the_place_of_the_scale_is_not_given_beside_it(folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"guidance": [{"cfg": 3}], "cfg_scale": 5.0}, "guidance has cfg, which takes the place of cfg_scale"),
        ({"guidance": [{"pog": 3}]}, r"guidance\[0\].name: 'pog' is not one of the guidance; did you mean 'pag'"),
    ):
        with pytest.raises(UserError, match=message):
            generate(_config(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_other_weights_under_the_same_name_are_refused(folder: Path, tmp_path: Path) -> None:
    mine, out = shutil.copytree(folder, tmp_path / "mine"), tmp_path / "out"
    generate(_config(mine, out, prompts=PROMPTS[:1], seeds=1))
    generate(_config(mine, out, prompts=PROMPTS[:1], seeds=1))
    next(mine.rglob("*.safetensors")).touch()
    with pytest.raises(UserError, match="model_files was"):
        generate(_config(mine, out, prompts=PROMPTS[:1], seeds=2))


def test_webp_holds_the_same_pixels(folder: Path, finished: Path, tmp_path: Path) -> None:
    generate(_config(folder, tmp_path, format="webp", sheet=0))
    assert not (tmp_path / "grid.png").exists()
    for row in _rows(finished):
        with (
            Image.open(finished / row["file"]) as png,
            Image.open((tmp_path / row["file"]).with_suffix(".webp")) as webp,
        ):
            np.testing.assert_array_equal(np.asarray(webp.convert("RGB")), np.asarray(png))


def _adapter(path: Path, seed: int = 0, **metadata: str) -> Path:
    made = adapters.attach({"unet": tiny_model("sd").denoiser}, "lora", targets=["to_q", "to_v"])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    return made.save(path, metadata)


def test_adapters_scale_trigger_and_retraining(folder: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _adapter(run / "adapter.safetensors", trigger="sks", class_noun="circle")
    first = {"adapter": str(run), "prompts": ["a [Trigger] [class]"], "negative_prompt": "no [TRIGGER]", "seeds": 1}
    generate(_config(folder, tmp_path / "a", **first))
    row = _rows(tmp_path / "a")[0]
    assert row["prompt"] == "a sks circle" and row["settings"]["negative_prompt"] == "no sks"
    generate(_config(folder, tmp_path / "plain", adapter=str(run)))
    generate(_config(folder, tmp_path / "zero", adapter=[str(run)], adapter_scale=0.0))
    images = {n: _pixels(tmp_path / n / "00000_seed0.png") for n in ("plain", "zero")}
    base = _pixels(finished / "00000_seed0.png")
    assert images["plain"] != base
    assert images["zero"] == base
    _adapter(run / "adapter.safetensors", seed=1)
    with pytest.raises(UserError, match="adapter was"):
        generate(_config(folder, tmp_path / "plain", adapter=str(run)))
    with pytest.raises(UserError, match=r"has \[Trigger\], and no word is known"):
        generate(_config(folder, tmp_path / "b", **first))
    with pytest.raises(UserError, match="there is no adapter"):
        generate(_config(folder, tmp_path / "b", adapter=str(tmp_path)))


def test_adapters_with_strengths_of_their_own_draw_as_in_python(folder: Path, tmp_path: Path) -> None:
    files = [_adapter(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1)]
    given = [{"file": str(files[0]), "scale": 0.7}, {"file": str(files[1]), "scale": -0.4}]
    one = {"prompts": PROMPTS[:1], "seeds": 1}
    generate(_config(folder, tmp_path / "both", adapter=given, **one))
    model = load_model(str(folder))
    for i, (file, scale) in enumerate(zip(files, (0.7, -0.4), strict=True)):
        adapters.load(model.networks(), file, name=str(i)).scale = scale
    expected = module.images(model, PROMPTS[0], 0, steps=2)[0]
    with Image.open(tmp_path / "both" / "00000_seed0.png") as read:
        np.testing.assert_array_equal(np.asarray(read), expected)
    recorded = _rows(tmp_path / "both")[0]["settings"]["adapter"]
    assert [(row["file"], row["scale"]) for row in recorded] == [(str(files[0]), 0.7), (str(files[1]), -0.4)]
    with pytest.raises(UserError, match=r"adapter was .*0\.7.* and is .*0\.8"):
        generate(_config(folder, tmp_path / "both", adapter=[{**given[0], "scale": 0.8}, given[1]], **one))
    pictures = {_pixels(tmp_path / "both" / "00000_seed0.png")}
    for name, adapter, more in (
        ("ones", [str(file) for file in files], {}),
        ("one", {"file": str(files[0]), "scale": 0.7}, {}),
        ("half", given, {"adapter_scale": 0.5}),
    ):
        generate(_config(folder, tmp_path / name, adapter=adapter, **more, **one))
        pictures.add(_pixels(tmp_path / name / "00000_seed0.png"))
    assert len(pictures) == 4
    assert "scale" not in _rows(tmp_path / "ones")[0]["settings"]["adapter"][0]
    for wrong, message in (
        ({"scale": 1.0}, "adapter.file is missing"),
        ([{"file": "a", "size": 2}], "size is not an option"),
    ):
        with pytest.raises(UserError, match=message):
            _config(folder, tmp_path, adapter=wrong)


def test_without_a_model_an_adapter_is_drawn_with_on_the_one_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    path = _adapter(tmp_path / "adapter.safetensors", base_model=str(folder))
    generate(_config(folder, tmp_path / "named", adapter=str(path)))
    generate(_config(folder, tmp_path / "found", adapter=[str(path)], model=None))
    assert _rows(tmp_path / "found")[0]["settings"] == _rows(tmp_path / "named")[0]["settings"]
    assert _bytes(tmp_path / "found")["00000_seed0.png"] == _bytes(tmp_path / "named")["00000_seed0.png"]
    assert base_of(_config(folder, tmp_path, model=None)) == "pocket/sd"
    nameless = _adapter(tmp_path / "nameless.safetensors")
    with pytest.raises(UserError, match="does not say what it was trained on: name the base with model="):
        base_of(_config(folder, tmp_path, model=None, adapter=str(nameless)))


def test_the_number_of_threads_is_tried_once_and_told_to_a_run_that_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = torch.get_num_threads()
    tried: list[object] = []

    def choose(self: Threads, work: Callable[[], object]) -> int:
        tried.append(work())
        torch.set_num_threads(usual + 1)
        return usual + 1

    monkeypatch.setattr(Threads, "choose", choose)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    generate(_config(folder, tmp_path / "few"))
    assert not tried and {row["threads"] for row in _rows(tmp_path / "few")} == {usual}
    monkeypatch.setattr("visiontune.sampling.drawing.WORTH_TRYING", 1)
    generate(_config(folder, tmp_path / "many"))
    assert len(tried) == 1 and {row["threads"] for row in _rows(tmp_path / "many")} == {usual + 1}
    assert torch.get_num_threads() == usual
    # What is drawn later is drawn as the rest was, without another trial.
    kept = _rows(tmp_path / "few")[:-1]
    (tmp_path / "few" / "manifest.jsonl").write_text("".join(json.dumps({**row, "threads": 1}) + "\n" for row in kept))
    torch.set_num_threads(2)
    try:
        generate(_config(folder, tmp_path / "few"))
    finally:
        torch.set_num_threads(usual)
    assert len(tried) == 1 and _rows(tmp_path / "few")[-1]["threads"] == 1


def test_two_runs_do_not_draw_into_one_folder(folder: Path, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "out")
    lock.hold()
    with pytest.raises(UserError, match="out is being written to by process"):
        generate(_config(folder, tmp_path / "out"))
    lock.release()
    generate(_config(folder, tmp_path / "out"))
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_given_model_gets_its_adapters_taken_off_again(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("sd")
    path = _adapter(tmp_path / "adapter.safetensors")
    generate(_config(folder, tmp_path / "out", adapter=str(path)), model)
    assert not adapters.attached(model.networks())
    assert _rows(tmp_path / "out")[0]["settings"]["model"] == "tiny-sd"


def test_a_full_disk_is_the_users_error_and_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Image.Image.save

    def filling(self: Image.Image, path: Path, **options: Any) -> None:
        if path.name == "00001_seed0.png":
            raise OSError(28, "No space left on device")
        write(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", filling)
    with pytest.raises(UserError, match=r"00001_seed0\.png cannot be written: No space.*run the same command again"):
        generate(_config(folder, tmp_path))
    # Those behind it may have been written meanwhile.
    files = {row["file"] for row in _rows(tmp_path)}
    assert {"00000_seed0.png", "00000_seed1.png"} <= files and "00001_seed0.png" not in files
    assert all((tmp_path / file).is_file() for file in files)
    monkeypatch.undo()
    generate(_config(folder, tmp_path))
    assert len(_rows(tmp_path)) == 6


def test_bad_options(tmp_path: Path) -> None:
    for options, words in [
        ({"steps": 0}, "steps must be"),
        ({"seeds": 0}, "names no seed"),
        ({"seeds": []}, "names no"),
    ]:
        with pytest.raises(UserError, match=words):
            _config(tmp_path, tmp_path, **options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        generate(_config(tmp_path, tmp_path / "file"))


def test_two_processes_leave_no_gap_no_duplicate_and_the_same_bits(folder: Path, tmp_path: Path) -> None:
    # Batches of two give three batches: rank 0 has two of them, rank 1 one.
    one, two = tmp_path / "one", tmp_path / "two"
    generate(_config(folder, one, batch_size=2))
    configs = (_config(folder, two, batch_size=2), _config(folder, two, batch_size=2, steps=3))
    assert apart("sampling.generate_worker:two", tmp_path, *(json.dumps(vars(c)) for c in configs)) == [0, 0]
    assert _bytes(two) == _bytes(one)
    logs = [(tmp_path / f"log{rank}").read_text().splitlines() for rank in range(2)]
    names = [row["file"] for row in _rows(one)]
    assert sorted(logs[0][:-1]) == [*names[:2], *names[4:], "grid.png"]
    assert sorted(logs[1][:-1]) == names[2:4]
    # A refusal is every process's, and none is left waiting for another.
    assert all("steps was 2 and is 3" in log[-1] for log in logs)


def test_what_a_process_that_died_left_is_made_by_another_number_of_them(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    generate(_config(folder, one, batch_size=2, score=["brightness"]))
    options = json.dumps(vars(_config(folder, two, batch_size=2, score=["brightness"], workers=1)))
    assert apart("sampling.generate_worker:one_dies", options) == [1, -signal.SIGKILL]
    kept = {path: path.stat().st_mtime_ns for path in two.glob("0*.png")}
    listed = [line for path in two.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    assert 4 <= len(listed) < 6
    generate(_config(folder, two, batch_size=2, score=["brightness"]))
    assert _bytes(two) == _bytes(one)
    names = [json.loads(line)["file"] for line in listed]
    assert all(kept[two / name] == (two / name).stat().st_mtime_ns for name in names)


def test_kill_at_any_moment_then_run_again(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = json.dumps(vars(_config(folder, out)))
    assert apart("sampling.generate_worker:killed", options) == [-signal.SIGKILL]
    done = _rows(out)
    assert 1 <= len(done) < 6
    for path in out.glob("0*.png"):
        Image.open(path).load()
    generate(_config(folder, out))
    assert _bytes(out) == _bytes(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_batch_and_the_same_call_goes_on(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    draw, out = drawing.images, tmp_path / "out"

    def signalled(*given: Any, **options: Any) -> np.ndarray:
        os.kill(os.getpid(), number)
        return draw(*given, **options)

    monkeypatch.setattr(drawing, "images", signalled)
    with pytest.raises(Interrupted, match="after 4 of 6 images") as stop:
        generate(_config(folder, out))
    assert stop.value.status == 128 + number
    assert pickle.loads(pickle.dumps(stop.value)).status == 128 + number
    assert len(_rows(out)) == 4
    monkeypatch.undo()
    for name in (".00004_seed0.77.tmp.png", ".grid.77.tmp.png", ".manifest.77.tmp.jsonl"):
        (out / name).mkdir()
        (out / name / name[1:]).write_bytes(b"half")
    mine = [out / ".my_seedlings.77.tmp.txt", out / ".notes.tmp.png"]
    for path in mine:
        path.write_text("mine")
    generate(_config(folder, out))
    for path in mine:
        assert path.read_text() == "mine"
        path.unlink()
    assert _bytes(out) == _bytes(finished)
