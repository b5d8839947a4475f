from __future__ import annotations

import pytest
import torch

from visiontune.data.cache import Cache, key
from visiontune.errors import UserError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(1.5).bfloat16()}


class Maker:
    calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return TENSORS


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_values_and_types_come_back_and_are_made_once(cache):
    make = Maker()
    for _ in range(3):
        got = cache.get("k1", make)
        assert got.keys() == TENSORS.keys()
        assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in TENSORS.items())
    assert make.calls == 1
    assert [p.name for p in cache.folder.rglob("*") if p.is_file()] == ["k1.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "text"])
def test_a_damaged_file_is_made_again(cache, damage):
    make = Maker()
    cache.get("k1", make)
    path = cache.path("k1")
    sound = path.read_bytes()
    flipped = sound[:-2] + bytes([sound[-2] ^ 1]) + sound[-1:]
    path.write_bytes({"truncated": sound[:-9], "flipped bit": flipped, "empty": b"", "text": b"hello"}[damage])
    assert torch.equal(cache.get("k1", make)["a"], TENSORS["a"])
    assert make.calls == 2
    assert path.read_bytes() == sound


def test_what_was_used_last_is_kept_in_memory_up_to_its_size(tmp_path):
    """Three entries of 400 bytes where 1000 are kept: of a, b, a, c the one used longest ago goes."""
    cache = Cache(tmp_path, memory=1000)
    values = {name: {"x": torch.full((100,), float(i))} for i, name in enumerate("abc")}
    for name in "abac":
        cache.get(name, lambda name=name: values[name])
    for name in "abc":
        cache.path(name).unlink()
    again = Maker()
    found = {name: cache.get(name, again) for name in "ac"}
    assert again.calls == 0 and all(torch.equal(found[name]["x"], values[name]["x"]) for name in "ac")
    cache.get("b", again)
    assert again.calls == 1
    big = Cache(tmp_path / "big", memory=100)
    big.get("a", lambda: values["a"])
    big.path("a").unlink()
    assert torch.equal(big.get("a", again)["a"], TENSORS["a"]) and again.calls == 2


def test_nothing_is_left_behind_when_encoding_or_writing_fails(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        cache.get("k1", fail)
    monkeypatch.setattr("visiontune.data.cache.save_file", fail)
    with pytest.raises(UserError, match=r"cannot be written: No space left.*free some space"):
        cache.get("k1", Maker())
    assert not [p for p in cache.folder.rglob("*") if p.is_file()]


def test_a_key_depends_on_every_part_and_its_name():
    parts = {"image": "abc", "size": (64, 64), "flip": False}
    assert key(**parts) == key(**dict(reversed(parts.items())))
    others = [{**parts, "image": "abd"}, {**parts, "size": (64, 96)}, {**parts, "flip": True}, {**parts, "new": 1}]
    assert len({key(**p) for p in [parts, *others]}) == 5
