"""Adapter files that are not what they should be: whatever reads them says so in one line, and soon."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visiontune.adapters import attach, attached, load, read_header, start
from visiontune.errors import UserError

DEEP = "[" * 100_000


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})


@pytest.fixture
def good(net, tmp_path) -> Path:
    made = attach(net, "lora", targets=["to_q", "to_k"], rank=2)
    for parameter in made.parameters():
        parameter.data.normal_()
    path = made.save(tmp_path / "good.safetensors", {"trigger": "sks"})
    made.detach()
    return path


def _raw(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(path: Path, header: str | bytes, body: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    return path


def _changed(good: Path, **changes: Any) -> Path:
    """A copy whose metadata has other entries; ``None`` as a class leaves one out."""
    header, body = _raw(good)
    metadata = {**header["__metadata__"], **changes}
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not Ellipsis}
    return _write(good.with_name("bad.safetensors"), json.dumps(header), body)


READERS = {
    "load": lambda net, path: load(net, path),
    "start": lambda net, path: start(attach(net, "lora", targets=["to_q", "to_k"], rank=2), path),
    "header": lambda net, path: read_header(path),
}
REQUIRED = ("method", "config", "layers", "targets", "base_hash", "base_sample")
MALFORMED = [
    *((name, {name: ...}, f"has no '{name}'") for name in REQUIRED),
    *((f"{name}=null", {name: "null"}, name) for name in (*REQUIRED[1:], "base_error")),
    *((f"{name}=5", {name: "5"}, name) for name in (*REQUIRED[1:], "base_error")),
    *((f"{name} not JSON", {name: "{"}, "not JSON") for name in ("config", "layers", "base_sample", "base_error")),
    *((f"{name} deep", {name: DEEP}, "nests too deep") for name in ("config", "targets", "base_sample")),
    *((f"{key} is no text", {key: value}, f"'{key}' is not text") for key, value in (("trigger", 5), ("config", None))),
    ("no layers", {"layers": "[]"}, "layers"),
    ("numbers for layers", {"layers": "[1, 2]"}, "layers"),
    ("a layer twice", {"layers": '["to_q", "to_q"]'}, "layers"),
    ("sample of other layers", {"base_sample": '{"to_q": [1.0]}'}, "nothing of the layer 'to_k'"),
    ("sample of text", {"base_sample": '{"to_q": ["a"], "to_k": [1.0]}'}, "base_sample"),
    ("sample not finite", {"base_sample": '{"to_q": [NaN], "to_k": [1.0]}'}, "base_sample"),
    ("sample too great", {"base_sample": '{"to_q": [1e300], "to_k": [1.0]}'}, "base_sample"),
    ("infinite error", {"base_error": '{"to_q": Infinity}'}, "base_error"),
    ("negative error", {"base_error": '{"to_q": -1}'}, "base_error"),
    *((f"format {text}", {"visiontune_format": text}, "is no number") for text in ("abc", "", "-1", "٣", "9" * 5000)),
    ("no format", {"visiontune_format": ...}, "not a visiontune adapter"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("changes", "words"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED])
def test_a_malformed_header_is_one_line_wherever_it_is_read(net, good, reader, changes, words) -> None:
    path = _changed(good, **changes)
    with pytest.raises(UserError, match=words) as error:
        READERS[reader](net, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "header",
    [
        "null",
        "[]",
        "5",
        "{}",
        '{"__metadata__": null}',
        '{"__metadata__": 5}',
        "{",
        DEEP,
        '{"a":' * 9999,
        b'{"\xff": 1}',
    ],
)
def test_a_header_that_is_none_is_one_line(net, good, reader, header) -> None:
    path = _write(good.with_name("bad.safetensors"), header, b"")
    with pytest.raises(UserError, match=r"not a visiontune adapter|not JSON|not UTF-8|nests too deep") as error:
        READERS[reader](net, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "long", "absent"])
def test_what_is_no_file_is_one_line(net, good, reader, kind) -> None:
    path = good.with_name("other" if kind != "long" else "k" * 3000)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match="adapter file"):
        READERS[reader](net, path)


@pytest.mark.parametrize("reader", ["load", "start"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["to_q.down"].fill_(float("nan")), r"not finite \('to_q.down'\)"),
        (lambda t: t["to_k.up"][0].fill_(float("inf")), r"not finite \('to_k.up'\)"),
        (lambda t: t.pop("to_q.down"), "to_q.down|'down'"),
        (lambda t: [t.pop("to_q.down"), t.pop("to_q.up")], "to_q|'down'|'up'"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor without an adapter, '.?extra'"),
        (lambda t: t.update({"to_q.extra": torch.zeros(1)}), "tensor without an adapter, 'to_q.extra'"),
        (lambda t: t.update({"to_q.down": torch.zeros(7, 7)}), "to_q|shape"),
        (lambda t: t.update({"to_q.down": torch.zeros(2, 8, dtype=torch.int64)}), "torch.int64"),
        (lambda t: t.update({"to_q.down": torch.zeros(2, 8, dtype=torch.complex64)}), "torch.complex64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(net, good, reader, change, words) -> None:
    header, tensors = _raw(good)[0]["__metadata__"], load_file(good)
    change(tensors)
    save_file(tensors, path := good.with_name("bad.safetensors"), header)
    with pytest.raises(UserError, match=words) as error:
        READERS[reader](net, path)
    assert "\n" not in str(error.value)
    assert reader == "start" or not attached(net)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"rank": 10**9}),
        ("lora", {"rank": 10**30}),
        ("lora", {"rank": 16384}),
        ("mosa", {"rank": 10**9, "experts": 3}),
        ("mos", {"rank": 10**8}),
        ("oft", {"block_size": 10**9}),
        ("triadapt", {"max_rank": 10**9}),
        ("peft", {"method": "LoHa", "options": {"r": 10**9}}),
    ],
)
def test_options_that_ask_for_more_than_the_file_holds_are_refused_before_it_is_made(
    net, good, method, config, monkeypatch
) -> None:
    """A rank of 10^9 would be 32 GB for each factor; one that an option may have is still more than the file has."""
    monkeypatch.setattr("visiontune.adapters._bounded._SLACK", 0)
    with pytest.raises(UserError) as error:
        load(net, _changed(good, method=method, config=json.dumps(config)))
    expected = "ask for far more than it holds" if config.get("rank") == 16384 else "must be|holds|not an option|cannot"
    assert re.search(expected, str(error.value))
    assert not attached(net)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern", "exclude_modules"])
def test_a_header_brings_no_regular_expressions(net, good, pattern) -> None:
    options = {"method": "Lora", "options": {pattern: {"(((.*)*)*)*x": 1}}}
    with pytest.raises(UserError, match=f"{pattern} is not an option"):
        load(net, _changed(good, method="peft", config=json.dumps(options)))


def test_a_file_of_the_first_version_opens(net, good) -> None:
    header, tensors = _raw(good)[0]["__metadata__"], load_file(good)
    # It wrote the entries in another order, and no error of layers that were not quantised.
    save_file(tensors, old := good.with_name("old.safetensors"), dict(sorted(header.items(), reverse=True)))
    assert "base_error" not in header
    made = load(copy.deepcopy(net), old)
    assert all(torch.equal(made.tensors()[name], value) for name, value in tensors.items())


def test_a_target_that_would_be_matched_for_ever_is_refused(net) -> None:
    net["a" * 60] = nn.Linear(8, 8)
    with pytest.raises(UserError, match="takes too long"):
        attach(net, "lora", targets="(a|aa)+[^a]")
