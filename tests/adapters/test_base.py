"""Targets, refusals, files and the life of an adapter set on a model of several components."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from visiontune import plugin
from visiontune.adapters import attach, attached, load, oft, read_header
from visiontune.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.to_out[0](self.norm(self.to_q(x) * self.to_k(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("to_q", ["blocks.0.to_q", "blocks.1.to_q"]),
        (["1.to_q", "0.to_k"], ["blocks.0.to_k", "blocks.1.to_q"]),
        ("to_out.0", ["blocks.0.to_out.0", "blocks.1.to_out.0"]),
        ("q", None),
        (r"blocks\.0\..*", ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_out.0"]),
        ("conv", ["conv"]),
        ("Conv2d", ["conv"]),
        ("mine", ["blocks.0.to_k", "blocks.1.to_k"]),
        ("rest", ["blocks.0.to_k"]),
        (
            "attention",
            [f"blocks.{i}.{n}" for i in range(2) for n in ("to_q", "to_k", "to_out.0")],
        ),
    ],
)
def test_targets(net, targets, expected) -> None:
    if expected is None:
        with pytest.raises(UserError, match="target 'q' matches no layer"):
            attach(net, "lora", targets=targets)
    else:
        presets = {"mine": ["to_k", "absent"], "rest": ["to_k", "-net:blocks.1.to_k"]}
        assert attach(net, "lora", targets=targets, presets=presets).layers == expected


def test_the_all_preset_takes_every_linear_and_convolution(net) -> None:
    expected = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert attach(net, "oft", targets="all").layers == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("to_qq", "matches no layer; did you mean 'to_q'"),
        (["to_q", "to_v"], "target 'to_v' matches no layer"),
        ("norm", "matches 'blocks.0.norm', a LayerNorm; this method adapts Linear"),
        ("*to_q", "target '\\*to_q' is no regular expression"),
    ],
)
def test_targets_that_match_nothing_are_refused(net, targets, message) -> None:
    with pytest.raises(UserError, match=message):
        attach(net, "oft", targets=targets)
    assert not attached(net)


def test_unknown_method_and_option(net) -> None:
    with pytest.raises(UserError, match="lora"):
        attach(net, "lorra", targets="to_q")
    with pytest.raises(UserError, match="rank"):
        attach(net, "lora", targets="to_q", rnk=3)


@pytest.mark.parametrize("target", ["linear1", "norm1"])
def test_layers_whose_forward_is_passed_by_are_refused(target) -> None:
    owner = nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)})
    with pytest.raises(UserError, match=rf"layer 'block\.{target}' cannot be adapted"):
        attach(owner, "dense", targets=target)


def test_patched_forward_and_max_norm_are_refused(net) -> None:
    net.conv.forward = net.conv.forward
    with pytest.raises(UserError, match="'conv' has a patched forward"):
        attach(net, "lora", targets="conv")
    table = nn.ModuleDict({"table": nn.Embedding(4, 4, max_norm=1.0)})
    with pytest.raises(UserError, match="max_norm"):
        attach(table, "lora", targets="table")


def test_components_prefix_names_and_parameters(net, tmp_path) -> None:
    text = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    parts = {"unet": net, "text_encoder": text}
    adapters = attach(parts, "oft", targets=["to_q", "q_proj"], block_size=4)
    assert adapters.layers == ["unet.blocks.0.to_q", "unet.blocks.1.to_q", "text_encoder.q_proj"]
    assert {n.partition(".")[0] for n, _ in adapters.named_parameters()} == {"unet", "text_encoder"}
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_(std=0.1)
    path = adapters.save(tmp_path / "a.safetensors")
    assert sorted(load_file(path)) == sorted(f"{layer}.v" for layer in adapters.layers)
    x, y = torch.randn(2, 3, 8), net(torch.ones(1, 1, 8))
    twin, twin_text = Net(), nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    adapters.detach()
    twin.load_state_dict(net.state_dict())
    twin_text.load_state_dict(text.state_dict())
    load({"unet": twin, "text_encoder": twin_text, "text_encoder_2": nn.Linear(1, 1)}, path)
    torch.testing.assert_close(twin(torch.ones(1, 1, 8)), y)
    assert not torch.equal(twin_text["q_proj"](x), text["q_proj"](x))
    with pytest.raises(UserError, match="match no layer of 'text_encoder'"):
        attach(parts, "oft", targets=["to_q"])


def test_names_must_differ_and_merged_sets_refuse_company(net) -> None:
    one = attach(net, "lora", targets="to_q")
    with pytest.raises(UserError, match="pass another name="):
        attach(net, "oft", targets="to_q")
    one.merge()
    with pytest.raises(UserError, match="unmerge it first"):
        attach(net, "oft", targets="to_q", name="two")
    one.unmerge()
    two = attach(net, "oft", targets="attention", name="two")
    assert attached(net) == {"default": one, "two": two}
    one.detach()
    assert attached(net) == {"two": two}
    assert type(net.blocks[0].to_q).__name__ == "AdaptedLinear"
    two.detach()
    assert type(net.blocks[0].to_q) is nn.Linear


def test_merging_leaves_shared_weights_alone() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    adapters, before = attach(net, "lora", targets="a"), net["b"].weight.detach().clone()
    torch.nn.init.normal_(next(p for n, p in adapters.named_parameters() if n.endswith("up")))
    adapters.merge()
    assert torch.equal(net["b"].weight, before)
    assert not torch.equal(net["a"].weight, before)
    adapters.unmerge()
    assert net["b"].weight is net["a"].weight


def test_a_cast_keeps_float32_masters_and_reaches_laid_aside_weights(net) -> None:
    adapters = attach(net, "oft", targets="to_q")
    adapters.merge()
    net.to(torch.bfloat16)
    adapters.unmerge()
    assert net.blocks[0].to_q.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    assert net(torch.ones(1, 2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_moving_the_model_moves_the_adapters(net, method) -> None:
    adapters = attach(net, method, targets="to_q")
    own = list(adapters.parameters())
    net.to("cuda", torch.bfloat16)
    assert all(a is b for a, b in zip(own, adapters.parameters(), strict=True))
    assert all((p.device.type, p.dtype) == ("cuda", torch.float32) for p in own)
    net(torch.ones(1, 2, 8, dtype=torch.bfloat16, device="cuda")).sum().backward()
    assert all(p.grad is not None for p in own)


def test_config_instance_and_header_round_trip(net, tmp_path) -> None:
    config = oft.Config(block_size=4, coft=True)
    adapters = attach(net, config, targets="to_q")
    path = adapters.save(tmp_path / "a.safetensors", {"trigger": "sks"})
    header = read_header(path)
    assert header["method"] == "oft"
    assert oft.Config(**header["config"]) == config
    assert (header["visiontune_format"], header["trigger"]) == (1, "sks")
    assert load(copy.deepcopy(net), path, name="again").config == config
    with pytest.raises(UserError, match="metadata 'method'"):
        adapters.save(path, {"method": "mine"})
    assert read_header(path) == header
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("as_config", [False, True])
def test_a_method_from_a_file(net, tmp_path, as_config) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from visiontune.adapters.lora import *\nfrom visiontune.adapters import lora\n"
        "class Config(lora.Config):\n    pass\n"
    )
    method = plugin.load("adapters", str(file)).Config(rank=2) if as_config else str(file)
    adapters = attach(net, method, targets="to_q", **({} if as_config else {"rank": 2}))
    path = adapters.save(tmp_path / "a.safetensors")
    again = load(copy.deepcopy(net), path, name="again", trust=[str(file)])
    assert again.parameter_count == adapters.parameter_count == 2 * 2 * 16


# A header's word for code: a file's path, a module on the import path, one beside the working folder, one of Python's.
FOREIGN = ("{folder}/evil.py", "evil.py", "evil", "evil_package.evil", "os", "visiontune.adapters.lora", "../lora", "")


@pytest.mark.parametrize("place", ["method", "config"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_has_no_code_run(net, tmp_path, monkeypatch, name, place) -> None:
    body = "from visiontune.adapters.lora import *\nopen('ran', 'w')\n"
    (tmp_path / "evil_package").mkdir()
    for file in (tmp_path / "evil.py", tmp_path / "evil_package" / "evil.py"):
        file.write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = attach(net, "lora", targets="to_q", rank=2).save(tmp_path / "a.safetensors")
    header, word = read_header(path), name.format(folder=tmp_path)
    changes = {"method": word} if place == "method" else {"config": {**header["config"], "name": word}}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (header | changes).items()}
    save_file(load_file(path), path, metadata)
    if place == "config":  # an option of that name must not take the place of the method
        assert load(copy.deepcopy(net), path, name="again").method == "lora"
    else:
        with pytest.raises(UserError, match="would run code from outside"):
            load(copy.deepcopy(net), path, name="again")
    assert not (tmp_path / "ran").exists()


def test_equal_adapters_are_equal_files(net, tmp_path) -> None:
    words = {"trigger": 'sks "ü" \\ \n \x01 \x7f \u2028', "z": "1", "a": "2", "modelspec.title": "t"}
    made = attach(net, "lora", targets="to_q", rank=2)
    first, second = (made.save(tmp_path / f"{i}.safetensors", dict(sorted(words.items(), reverse=i))) for i in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        assert list(file.metadata()) and file.metadata().items() >= words.items()
    length = int.from_bytes(first.read_bytes()[:8], "little")
    names = list(json.loads(first.read_bytes()[8 : 8 + length])["__metadata__"])
    assert names == sorted(names)
    assert load(copy.deepcopy(net), first, name="again").parameter_count == made.parameter_count


def test_a_trusted_file_is_the_readers_own_wherever_the_writers_lay(net, tmp_path) -> None:
    body = (
        "from visiontune.adapters import lora\nfrom visiontune.adapters.lora import *\nclass Config(lora.Config): ...\n"
    )
    for place in ("theirs", "mine"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "method.py").write_text(body)
    theirs, mine = tmp_path / "theirs" / "method.py", tmp_path / "mine" / "method.py"
    path = attach(net, str(theirs), targets="to_q", rank=2).save(tmp_path / "a.safetensors")
    theirs.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load(copy.deepcopy(net), path, name="again", trust=[str(mine)]).method == str(mine)
    with pytest.raises(UserError, match="allow it by trust"):
        load(copy.deepcopy(net), path, name="other", trust=["other.py", "lora"])
    assert not (tmp_path / "ran").exists()


def test_reading_a_header_does_not_import_torch(net, tmp_path) -> None:
    path = attach(net, "lora", targets="to_q").save(tmp_path / "a.safetensors")
    code = (
        "import sys; from visiontune.adapters import read_header; "
        f"assert read_header({str(path)!r})['method'] == 'lora'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_files_that_do_not_fit_are_refused(net, tmp_path) -> None:
    path = attach(net, "lora", targets="to_q", rank=2).save(tmp_path / "a.safetensors")
    tensors, header = load_file(path), read_header(path)

    def rewritten(tensors, **changes) -> Path:
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (header | changes).items()}
        save_file(tensors, tmp_path / "b.safetensors", metadata)
        return tmp_path / "b.safetensors"

    def bare() -> Net:
        torch.manual_seed(0)
        return Net()

    first = sorted(tensors)[0]
    with pytest.raises(UserError, match=f"has no tensor '{first}'"):
        load(fresh := bare(), rewritten({k: v for k, v in tensors.items() if k != first}))
    assert not attached(fresh)
    with pytest.raises(UserError, match=r"has a tensor without an adapter, 'extra\.up'"):
        load(bare(), rewritten({**tensors, "extra.up": torch.zeros(1)}))
    with pytest.raises(UserError, match="has shape"):
        load(bare(), rewritten({**tensors, first: torch.zeros(3, 3)}))
    with pytest.raises(UserError, match=r"no layer for 'blocks\.7\.to_q'"):
        sample = {layer: [0.0] for layer in ("blocks.7.to_q", "blocks.1.to_q")}
        load(bare(), rewritten(tensors, layers=[*sample], base_sample=sample))
    with pytest.raises(UserError, match="newer visiontune"):
        load(bare(), rewritten(tensors, visiontune_format="99"))
    with pytest.raises(UserError, match="no adapter file"):
        load(bare(), tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("not a safetensors file at all")
    with pytest.raises(UserError, match="not a visiontune adapter"):
        load(bare(), tmp_path / "text")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        load(bare(), path)


def test_loading_a_part_on_request(net, tmp_path) -> None:
    path = attach(net, "lora", targets="to_q").save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    half = Net()
    del half.blocks[1]
    with pytest.raises(UserError, match="no layer for"):
        load(half, path)
    with pytest.warns(UserWarning, match=r"no layer for 'blocks\.1\.to_q'"):
        assert load(half, path, strict=False).layers == ["blocks.0.to_q"]


@pytest.mark.parametrize("method", plugin.names("adapters"))
def test_no_option_has_a_name_that_recipes_use_themselves(method: str) -> None:
    fields = {field.name for field in dataclasses.fields(plugin.load("adapters", method).Config)}
    assert not fields & {"name", "targets", "start", "under"}
