"""Masks of nouns: one picture of bits, cut as the picture is, and read of metadata.jsonl."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.data import segments, transforms
from visiontune.data.base import Config
from visiontune.data.preflight import preflight
from visiontune.data.readers import read
from visiontune.errors import UserError
from visiontune.pocket.oracle import read as seen

COLUMNS = ("image", "segments")


def masks(count: int = 3, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray((rng.random(size) > 0.8).astype(np.uint8) * 255) for _ in range(count)]


def test_bits_are_masks_that_may_overlap():
    made = masks()
    found = segments.planes(torch.from_numpy(np.array(segments.packed(made)))[None], 3)
    assert torch.equal(found, torch.stack([torch.from_numpy(np.array(mask) > 127) for mask in made]))
    assert (found.sum(0) > 1).any()
    blank = Image.new("L", (16, 24))
    assert segments.empty(segments.packed([made[0], blank]), ["cat", "sofa"]) == ["sofa"]
    assert segments.planes(torch.tensor([[[2**30]]], dtype=torch.int32), 31)[30].all()
    with pytest.raises(ValueError, match="of one size, 31 at most"):
        segments.packed([made[0], Image.new("L", (8, 8))])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("centering", [(0.5, 0.5), (0.0, 1.0)])
def test_bits_are_cut_as_their_picture_is(flip, centering):
    """A mask of blocks of latents: any of it in a latent counts, and more would not be there."""
    blocks = (np.random.default_rng(1).random((6, 4)) > 0.5).astype(np.uint8).repeat(4, 0).repeat(4, 1) * 255
    picture = Image.fromarray(blocks)
    cut = {"flip": flip, "centering": centering}
    theirs = transforms.to_mask(picture, (16, 16), 4, **cut)
    ours = segments.to_latents(segments.packed([picture]), (16, 16), 4, **cut)
    assert torch.equal(ours, theirs.round().int()) and ours.dtype == torch.int32
    dot = np.zeros((16, 16), np.uint8)
    dot[5, 6] = 255
    assert segments.to_latents(segments.packed([Image.fromarray(dot)]), (16, 16), 4)[0].nonzero().tolist() == [[1, 1]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "masks").mkdir()
    for i, mask in enumerate(masks(2)):
        Image.new("RGB", mask.size).save(tmp_path / f"{i}.png")
        mask.save(tmp_path / "masks" / f"{i}.png")

    def write(*nouns, key="segments"):
        lines = [{"file_name": f"{i}.png", "text": "a cat on a sofa", key: own} for i, own in enumerate(nouns)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Config(root=str(tmp_path), columns={} if key == "segments" else {"segments": key})

    return write


@pytest.mark.parametrize("key", ["segments", "attn_list"])
def test_nouns_and_their_masks_are_read_of_metadata(folder, key):
    both = [["sofa", "masks/1.png"], ["cat", "masks/0.png"]]
    config = folder([["cat", "masks/0.png"], ["sofa", None]], both, key=key)
    one, other = read(config, COLUMNS)
    assert (one.nouns, other.nouns) == (("cat",), ("sofa", "cat"))
    preflight([one, other])
    assert np.array_equal(np.array(other.sources["segments"].open()) & 1, np.array(masks(2)[1]) > 127)
    assert other.sources["segments"].size() == (24, 16) and one.sources["segments"].digest()


@pytest.mark.parametrize(
    ("nouns", "message"),
    [
        ([["cat", "masks/0.png"]], "has no masks of nouns for 1.png"),
        ("cat", "line 1: 'segments' is no list of nouns"),
        ([["cat"]], "is no list of nouns"),
        ([["cat", "masks/0.png"], ["cat", "masks/1.png"]], "each noun once"),
        ([["cat", "../other.png"]], "other.png"),
    ],
)
def test_what_is_no_list_of_nouns_is_one_line(folder, nouns, message):
    config = folder(nouns, [["cat", None]])
    with pytest.raises(UserError, match=message):
        read(config, COLUMNS)


def test_masks_that_are_blank_or_missing_or_not_of_their_picture_are_named(folder, tmp_path):
    config = folder([["cat", "masks/0.png"]], [["cat", "masks/1.png"]])
    Image.new("L", (16, 24)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"1 masks of nouns without a white pixel .*: 0\.png \(cat\)"):
        preflight(read(config, COLUMNS))
    Image.new("L", (16, 16), 255).save(tmp_path / "masks" / "0.png")
    with pytest.raises(UserError, match=r"another shape than their image .*: 0\.png"):
        preflight(read(config, COLUMNS))
    (tmp_path / "masks" / "0.png").unlink()
    with pytest.raises(UserError, match=r"unreadable images .*: 0\.png \(segments\)"):
        preflight(read(config, COLUMNS))


def test_without_the_column_its_masks_are_not_left_out_in_silence(folder):
    config = folder([["cat", "masks/0.png"]], [["cat", "masks/1.png"]])
    with pytest.raises(UserError, match="masks"):
        read(config)
    with pytest.raises(UserError, match="has no masks of nouns"):
        read(folder([], []), COLUMNS)


def test_objects_of_the_pocket_world_are_where_the_oracle_finds_them():
    found = read(Config(root="pocket/scenes"), COLUMNS)[:8]
    for sample in found:
        assert all(noun in sample.caption for noun in sample.nouns)
        bits = np.array(sample.sources["segments"].open())
        for one in seen(np.asarray(sample.sources["image"].open())):
            noun = f"{one.thing.color} {one.thing.shape}"
            mask = bits >> sample.nouns.index(noun) & 1 > 0
            assert (mask & one.mask).sum() > 0.9 * one.mask.sum(), sample.caption
