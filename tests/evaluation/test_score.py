"""Scoring of folders."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from visiontune.errors import UserError
from visiontune.evaluation.score import build_rewards, read_folder, score
from visiontune.rewards.base import as_reward
from visiontune.rewards.loading import load
from visiontune.sampling.writer import write_image


def _red(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


def _length(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
    return torch.tensor([float(len(p)) for p in prompts])


REWARDS = {"red": as_reward(_red, "red"), "length": as_reward(_length, "length")}


def _fill(folder: Path, reds: list[int], side: int = 8) -> Path:
    for i, red in enumerate(reds):
        write_image(folder / f"{i}.png", np.full((side + 8 * (i % 2), side, 3), (red, 0, 0), np.uint8))
        (folder / f"{i}.txt").write_text("p" * (i + 1) + "\n")
    return folder


def test_scores_stay_with_their_images_over_batches_and_sizes(tmp_path: Path) -> None:
    result = score(_fill(tmp_path, [0, 51, 102, 153, 255]), REWARDS, batch_size=2)
    assert [item.path.name for item in result.items] == [f"{i}.png" for i in range(5)]
    assert result.values["red"] == pytest.approx([0, 0.2, 0.4, 0.6, 1.0])
    assert result.values["length"] == [1, 2, 3, 4, 5]
    summary = result.summary()["length"]
    assert (summary["mean"], summary["min"], summary["max"], summary["images"]) == (3, 1, 5, 5)
    assert summary["std"] == pytest.approx(2.5**0.5)
    assert summary["sem"] == pytest.approx(0.5**0.5)


def test_manifest_prompts_win_and_reach_the_reward_as_meta(tmp_path: Path) -> None:
    _fill(tmp_path, [0, 0])
    rows = [{"file": f"{i}.png", "prompt": "long prompt", "seed": i} for i in (1, 0)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def seed(images: torch.Tensor, prompts: list[str], meta: list[dict]) -> list[int]:
        return [m["seed"] for m in meta]

    result = score(tmp_path, {"seed": as_reward(seed, "seed")})
    assert [(item.path.name, item.prompt) for item in result.items] == [
        ("1.png", "long prompt"),
        ("0.png", "long prompt"),
    ]
    assert result.values["seed"] == [1, 0]


def test_table_json_and_csv_hold_the_same_numbers(tmp_path: Path) -> None:
    result = score(_fill(tmp_path / "in", [255, 0]), REWARDS)
    lines = result.table().splitlines()
    assert lines[0].split() == ["reward", "images", "mean", "std", "min", "max"]
    assert lines[1].split() == ["red", "2", "0.5000", "0.7071", "0.0000", "1.0000"]
    written = json.loads(result.write(tmp_path / "s.json").read_text())
    assert written["summary"]["red"]["mean"] == 0.5
    assert written["images"][0] == {"file": "0.png", "prompt": "p", "red": 1.0, "length": 1.0}
    with result.write(tmp_path / "s.csv").open() as file:
        assert [row["red"] for row in csv.DictReader(file)] == ["1.0", "0.0"]
    with pytest.raises(UserError, match=r"\.json or \.csv"):
        result.write(tmp_path / "s.xlsx")


def _on_bright_images(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
    if (images[:, 0].mean((1, 2)) > 0.5).any():
        raise ValueError("too red\nfor me")
    return images[:, 0].mean((1, 2))


def _nan_for_black(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
    red = images[:, 0].mean((1, 2))
    return torch.where(red == 0, torch.nan, red)


def test_a_reward_that_fails_on_some_images_loses_no_other_score(tmp_path: Path) -> None:
    picky = {"picky": as_reward(_on_bright_images, "picky"), "nan": as_reward(_nan_for_black, "nan")}
    wrong = {"wrong": as_reward(lambda images, *_: images.mean(1), "wrong")}
    folder = _fill(tmp_path / "in", [255, 51, 0, 102])
    result = score(folder, {**picky, **wrong, **REWARDS}, batch_size=4)
    assert result.values["red"] == pytest.approx([1, 0.2, 0, 0.4])
    assert result.values["picky"][1:] == pytest.approx([0.2, 0, 0.4]) and np.isnan(result.values["picky"][0])
    assert [np.isnan(v) for v in result.values["nan"]] == [False, False, True, False]
    assert sorted(result.complaints()) == [
        "no score of 'nan' for 1 of 4 images; first 2.png: reward 'nan' is not finite "
        "for 1 of 1 images (first: image 0)",
        "no score of 'picky' for 1 of 4 images; first 0.png: reward 'picky', called with (images, prompts, "
        "meta), raised ValueError: too red for me (test_score.py, line 82)",
        "no score of 'wrong' for 4 of 4 images; first 0.png: reward 'wrong' returned shape [2, 8, 8]; "
        "it must be one score an image, [2]",
    ]
    assert result.summary()["picky"]["images"] == 3 and result.summary()["picky"]["max"] == pytest.approx(0.4)
    written = json.loads(result.write(tmp_path / "s.json").read_text())
    assert written["images"][0]["picky"] is None and written["summary"]["wrong"]["mean"] is None
    with result.write(tmp_path / "s.csv").open() as file:
        assert [row["nan"] == "" for row in csv.DictReader(file)] == [False, False, True, False]
    assert "wrong        0          -" in result.table()


def test_an_image_that_cannot_be_decoded_loses_its_own_scores_alone(tmp_path: Path) -> None:
    _fill(tmp_path, [255, 51, 102])
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:-30])
    result = score(tmp_path, REWARDS)
    assert result.values["red"][:2] == pytest.approx([1, 0.2]) and np.isnan(result.values["red"][2])
    assert [line.split(";")[0] for line in result.complaints()] == [
        "no score of 'red' for 1 of 3 images",
        "no score of 'length' for 1 of 3 images",
    ]


def test_a_groupwise_reward_sees_all_images_of_a_prompt_whatever_the_batch_size(tmp_path: Path) -> None:
    for i, (red, prompt) in enumerate([(0, "a"), (255, "b"), (255, "a"), (255, "b"), (255, "a")]):
        write_image(tmp_path / f"{i}.png", np.full((8, 8, 3), red, np.uint8))
        (tmp_path / f"{i}.txt").write_text(prompt)
    result = score(tmp_path, ["diversity", "brightness"], batch_size=1)
    assert result.values["diversity"] == pytest.approx([1, 0, 0.5, 0, 0.5])
    assert result.values["brightness"] == pytest.approx([0, 1, 1, 1, 1])
    assert not result.failures


def test_the_terms_of_a_mix_have_columns(tmp_path: Path) -> None:
    mix = {"name": "mix", "terms": [{"reward": "brightness", "weight": -2}, "jpeg"]}
    result = score(_fill(tmp_path, [0, 255, 102]), {"mix": load(mix, name="mix")}, batch_size=2)
    assert list(result.values) == ["mix", "mix/brightness", "mix/jpeg"]
    total = [-2 * b + j for b, j in zip(result.values["mix/brightness"], result.values["mix/jpeg"], strict=True)]
    assert result.values["mix"] == pytest.approx(total)


def test_rewards_are_built_from_specs_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Config:\n    scale: float = 2.0\n"
        "def build(config):\n    return lambda images, prompts, meta: [config.scale] * len(images)\n"
    )
    built = build_rewards(["oracle", {"name": "oracle", "subject": "bumble"}, str(tmp_path / "mine.py")])
    assert list(built) == ["oracle", "oracle(subject=bumble)", "mine"]
    assert built["mine"](torch.zeros(1, 3, 2, 2), [""]).tolist() == [2.0]
    with pytest.raises(UserError, match="oracle is named twice"):
        build_rewards(["oracle", "oracle"])
    with pytest.raises(UserError, match="did you mean 'oracle'"):
        build_rewards(["oracel"])


def test_pictures_and_captions_are_read_as_for_training(tmp_path: Path) -> None:
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4], halves[4:] = (255, 0, 0), (0, 0, 255)
    exif, clear = Image.Exif(), Image.fromarray(halves).convert("RGBA")
    exif[ExifTags.Base.Orientation] = 3
    clear.putalpha(0)
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "deep.tga.png")
    Image.fromarray(halves).save(tmp_path / "c.tga")
    (tmp_path / "._turned.png").write_bytes(b"of a file system")
    for name, ending in (("turned", "txt"), ("clear", "TXT"), ("deep.tga", "txt"), ("c", "caption")):
        (tmp_path / f"{name}.{ending}").write_bytes(b"\xef\xbb\xbfa  red square\r\n")

    def corner(images: torch.Tensor, prompts: list[str], meta: object) -> torch.Tensor:
        assert set(prompts) == {"a red square"}
        return images[:, 0, 0, 0] + 10 * images[:, 2, 0, 0]

    result = score(tmp_path, {"corner": as_reward(corner, "corner")})
    scores = dict(zip([item.path.name for item in result.items], result.values["corner"], strict=True))
    assert scores == pytest.approx({"c.tga": 1, "clear.png": 11, "deep.tga.png": 11 * 78 / 255, "turned.png": 10})
    (tmp_path / "c.caption").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.caption' is not UTF-8 text"):
        score(tmp_path, REWARDS)
    (tmp_path / "c.caption").write_text("x")
    (tmp_path / "alone.txt").write_text("x")
    with pytest.raises(UserError, match=r"1 images of .*: alone\.png: each has a caption but is absent"):
        score(tmp_path, REWARDS)


def test_folders_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        read_folder(tmp_path / "gone")
    with pytest.raises(UserError, match="no images in"):
        read_folder(tmp_path)
    _fill(tmp_path, [0, 0])
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1 images of .*: 1\.png: each has no \.txt"):
        read_folder(tmp_path)
    (tmp_path / "1.txt").write_text("b")
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png is not a readable image"):
        score(tmp_path, REWARDS)
    (tmp_path / "manifest.jsonl").write_text('{"file": "9.png", "prompt": "a"}\n')
    with pytest.raises(UserError, match=r"9\.png: each is in the manifest but absent"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="no rewards"):
        score(tmp_path, {})


def test_pictures_that_are_not_scored_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "grid.png", "more/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    assert [item.path.name for item in read_folder(tmp_path)] == ["a.png"]
    assert "1 pictures" in caplog.text and "lie deeper, or are no files: more/b.png" in caplog.text
    caplog.clear()
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "x"}\n')
    assert [item.path.name for item in read_folder(tmp_path)] == ["a.png"]
    assert "2 pictures" in caplog.text and "not in its manifest: c.png, more/b.png" in caplog.text
