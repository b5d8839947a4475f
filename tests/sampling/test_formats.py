"""What a picture says of itself in each format, and pictures in shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from tiny import tiny_model

from visiontune.config import load_sample
from visiontune.errors import UserError
from visiontune.sampling import metadata, shards
from visiontune.sampling.config import SampleConfig
from visiontune.sampling.generate import generate
from visiontune.sampling.metadata import Metadata
from visiontune.sampling.writer import write_image
from visiontune.schema import from_mapping
from visiontune.view import samples

SETTINGS = {
    "model": "/home/me/models/pocket, blue",
    "adapter": [{"file": "/home/me/runs/dog/adapter.safetensors", "sha256": "12"}],
    "steps": 25,
    "cfg_scale": 4.0,
    "scheduler": "euler",
    "negative_prompt": "bläulich",
}
TOLD = Metadata.of("ein Vogel 鳥, rot", 7, SETTINGS, (24, 16))
PARAMETERS = (
    "ein Vogel 鳥, rot\nNegative prompt: bläulich\n"
    'Steps: 25, Sampler: Euler, CFG scale: 4, Seed: 7, Size: 16x24, Model: "pocket, blue"'
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("sd")


def _config(out: Path, **options: object) -> SampleConfig:
    given = {"out": str(out), "prompts": ["a red circle", "a blue square"], "seeds": 3, "steps": 1, "batch_size": 2}
    return from_mapping(SampleConfig, {**given, "device": "cpu", **options})


def _noise(height: int = 24, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_png_says_what_it_was_made_with_where_readers_look(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", _noise(), metadata=TOLD)
    with Image.open(tmp_path / "a.png") as read:
        assert read.info["parameters"] == PARAMETERS
        np.testing.assert_array_equal(np.asarray(read), _noise())


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_others_say_it_in_exif(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a.{suffix}", _noise(), metadata=TOLD)
    with Image.open(tmp_path / f"a.{suffix}") as read:
        comment = read.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    # The encoding that EXIF names in the first eight bytes; programs write it big-endian.
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == PARAMETERS


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_everything_is_read_back_without_places(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / f"a.{suffix}", _noise(), metadata=TOLD)
    found = metadata.read(tmp_path / f"a.{suffix}")
    shared = {**SETTINGS, "model": "pocket, blue", "adapter": [{"file": "dog/adapter.safetensors", "sha256": "12"}]}
    assert found == {"prompt": "ein Vogel 鳥, rot", "seed": 7, "settings": shared}
    write_image(tmp_path / f"b.{suffix}", _noise())
    with pytest.raises(UserError, match="does not say what it was made with"):
        metadata.read(tmp_path / f"b.{suffix}")


def test_what_a_jpeg_has_no_room_for_is_left_out_and_the_text_stays(tmp_path: Path) -> None:
    for length, readable in ((30_000, True), (40_000, False)):
        long = Metadata.of("a" * 10, 0, {**SETTINGS, "guidance": "g" * length * 2}, (24, 16))
        write_image(tmp_path / "a.jpg", _noise(), metadata=long)
        with Image.open(tmp_path / "a.jpg") as read:
            assert ExifTags.Base.UserComment in read.getexif().get_ifd(ExifTags.IFD.Exif)
            assert (ExifTags.Base.ImageDescription in read.getexif()) == readable
    write_image(tmp_path / "b.jpg", _noise(), metadata=Metadata.of("a" * 40_000, 0, SETTINGS, (24, 16)))
    assert not Image.open(tmp_path / "b.jpg").getexif()


def test_quality_is_of_lossy_pictures(tmp_path: Path) -> None:
    y, x = np.mgrid[:48, :48]
    image = np.stack([x * 5, y * 5, (x + y) * 2], -1).astype(np.uint8)
    for suffix in ("jpg", "webp"):
        errors, sizes = [], []
        for quality in (20, 95):
            write_image(tmp_path / f"a.{suffix}", image, quality=quality)
            with Image.open(tmp_path / f"a.{suffix}") as read:
                errors.append(np.abs(np.asarray(read.convert("RGB"), np.int64) - image).mean())
            sizes.append((tmp_path / f"a.{suffix}").stat().st_size)
        assert 0 < errors[1] < errors[0] and sizes[1] > sizes[0]
        assert errors[1] < 3
    for format in ("png", "tar"):
        with pytest.raises(UserError, match=f"format is {format}, which loses nothing"):
            generate(_config(tmp_path, format=format, quality=90))


def test_a_run_writes_each_format_with_what_made_it(model: Any, tmp_path: Path) -> None:
    generate(_config(tmp_path / "png", seeds=1), model)
    generate(_config(tmp_path / "jpg", seeds=1, format="jpg", quality=80), model)
    rows = [json.loads(line) for line in (tmp_path / "jpg" / "manifest.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000_seed0.jpg", "00001_seed0.jpg"]
    found = metadata.read(tmp_path / "jpg" / "00001_seed0.jpg")
    assert found["prompt"] == "a blue square" and found["settings"] == rows[1]["settings"]
    assert found["settings"]["quality"] == 80
    generate(_config(tmp_path / "mute", seeds=1, metadata=False), model)
    with (
        Image.open(tmp_path / "mute" / "00000_seed0.png") as mute,
        Image.open(tmp_path / "png/00000_seed0.png") as told,
    ):
        assert mute.tobytes() == told.tobytes() and not mute.info and told.info


def test_shards_are_what_webdataset_reads_and_hold_the_same_files(model: Any, tmp_path: Path) -> None:
    generate(_config(tmp_path / "tar", format="tar", shard=4), model)
    generate(_config(tmp_path / "png", format="png"), model)
    out = tmp_path / "tar"
    assert sorted(_bytes(out)) == ["grid.png", "manifest.jsonl", "shard-000000.tar", "shard-000001.tar"]
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    names = [f"{i:05d}_seed{s}" for i in range(2) for s in range(3)]
    held: dict[str, bytes] = {}
    for shard, some in (("shard-000000.tar", names[:4]), ("shard-000001.tar", names[4:])):
        assert (out / shard).read_bytes()[257:263] == b"ustar\0"
        with tarfile.open(out / shard) as tar:
            infos = tar.getmembers()
            assert [info.name for info in infos] == [f"{name}.{kind}" for name in some for kind in ("png", "json")]
            assert {(info.mtime, info.uid, info.uname) for info in infos} == {(0, 0, "")}
            held |= {info.name: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]
    for row in rows:
        assert json.loads(held[row["file"].replace(".png", ".json")]) == row
        with Image.open(io.BytesIO(held[row["file"]])) as packed, Image.open(tmp_path / "png" / row["file"]) as png:
            assert packed.tobytes() == png.tobytes()
    shown = samples.read(out)
    assert len(shown["pictures"]) == 6 and shown["missing"] == 0
    assert load_sample("sample/prompts", ["format=tar", "shard=10"]).shard == 10


def test_shards_are_gone_on_with_bit_for_bit_wherever_a_kill_came(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    generate(_config(whole, format="tar", shard=4), model)
    before = _bytes(whole)

    class Killed(BaseException):
        pass

    # After the first shard, with its pictures still beside it.
    write, made = shards._write, []

    def dying(shard: Path, *given: Any) -> None:
        if made:
            raise Killed
        write(shard, *given)
        made.append(shard)

    monkeypatch.setattr(shards, "_write", dying)
    with pytest.raises(Killed):
        generate(_config(out, format="tar", shard=4), model)
    monkeypatch.undo()
    assert "shard-000000.tar" in _bytes(out) and "00001_seed2.png" in _bytes(out)
    (out / "00001_seed2.png").unlink()
    (out / "00000_seed0.png").write_bytes(shards.members(out)["00000_seed0.png"].read())
    generate(_config(out, format="tar", shard=4), model)
    assert _bytes(out) == before
    generate(_config(out, format="tar", shard=4), model)
    assert _bytes(out) == before
    # A lost shard is drawn again.
    (out / "shard-000000.tar").unlink()
    generate(_config(out, format="tar", shard=4), model)
    assert _bytes(out) == before


def test_a_shard_grows_at_its_end_alone(model: Any, tmp_path: Path) -> None:
    three = ["a red circle", "a blue square", "a green star"]
    generate(_config(tmp_path / "whole", format="tar", shard=4, prompts=three), model)
    generate(_config(tmp_path / "out", format="tar", shard=4), model)
    generate(_config(tmp_path / "out", format="tar", shard=4, prompts=three), model)
    whole, grown = (_bytes(tmp_path / name) for name in ("whole", "out"))
    assert [name for name in whole if whole[name] != grown[name]] == []
    before = _bytes(tmp_path / "out")
    with pytest.raises(UserError, match="holds other pictures than now belong there"):
        generate(_config(tmp_path / "out", format="tar", shard=4, prompts=three, seeds=[9, 0, 1, 2]), model)
    with pytest.raises(UserError, match="shard was 4 and is 5"):
        generate(_config(tmp_path / "out", format="tar", shard=5, prompts=three), model)
    assert _bytes(tmp_path / "out") == before
    (tmp_path / "out" / "shard-000001.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(UserError, match=r"no readable shard.*delete it, and its pictures are drawn again"):
        generate(_config(tmp_path / "out", format="tar", shard=4, prompts=three), model)
