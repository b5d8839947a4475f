"""Blocks that rest in the main memory: the same bits, one block at a time, and nothing computed with what rests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from contracts.declared import declared, turn
from resting import Watched, largest
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from visiontune import adapters, assemble, config, plugin
from visiontune.adapters import _layers
from visiontune.adapters.base import whole_base
from visiontune.assemble import folder, parts, resources
from visiontune.errors import UserError
from visiontune.estimate import measure, size
from visiontune.models import quantise
from visiontune.models._offload import Offloaded
from visiontune.ops.memory import stored

CHECKPOINTED = {"gradient_checkpointing": True}


class Part(nn.Module):
    """A layer of each kind that adapters know in a denoiser; [b, n, 12] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.conv = nn.LayerNorm(12), nn.Linear(12, 12), nn.Conv1d(12, 12, 1)

    def forward(self, x):
        return x + self.conv(torch.tanh(self.linear(self.norm(x))).mT).mT


class Net(nn.Module):
    """Parts that are recomputed one by one, between layers that are not."""

    _no_split_modules = ("Part",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
        self.parts = nn.ModuleList(Part() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False) if torch.is_grad_enabled() else part(x)
        return self.last(x)


def inputs(device="cpu"):
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).to(device)


def net(method=None, options=None):
    """A frozen net, and an adapter on it that has learnt something."""
    made = Net().requires_grad_(False)
    if method is None:
        return made, None
    targets = [
        name for name, layer in made.named_modules() if isinstance(layer, plugin.load("adapters", method).LAYERS)
    ]
    found = adapters.attach(made, method, targets=targets, **options or {})
    turn(found)
    return made, found


def steps(made, found):
    """Two steps of gradient descent, and what the net then gives with the adapter and without."""
    seen, trained = [], [p for p in found.parameters() if p.requires_grad]
    for step in range(2):
        torch.manual_seed(step)
        out = made(inputs())
        out.square().mean().backward()
        seen += [out.detach(), *(p.grad.clone() for p in trained if p.grad is not None)]
        found.before_step(step)
        with torch.no_grad():
            for p in trained:
                p.sub_(0 if p.grad is None else 0.1 * p.grad)
        found.after_step((step + 1) / 2)
        found.zero_grad()
    with torch.no_grad():
        seen.append(made(inputs()))
        with found.disable():
            seen.append(made(inputs()))
    return seen


def equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


CASES = [
    pytest.param(method, options, id=f"{method}-{'-'.join(map(str, options.values()))}")
    for method, contract in declared().items()
    for options in (contract.options, *contract.variants)
]


@pytest.mark.filterwarnings("ignore:the Neumann series")
@pytest.mark.parametrize(("method", "options"), CASES)
def test_every_adapter_trains_over_blocks_that_rest_or_is_refused(method, options, monkeypatch):
    made, found = net(method, options)
    resting = Offloaded(made, "unet", "net")
    if whole_base(found.config) or found.plans:
        given = {"model": {"offload": "block"}, "adapter": {"name": method, **options}, "train": CHECKPOINTED}
        run = config.parse_run({"name": "run", "data": "pocket/bumble", **given})
        with pytest.raises(UserError, match=rf"model\.offload: adapter '{method}' (chooses|looks).*take lora"):
            parts.check_offload(run)
            resources.offload(run, SimpleNamespace(), found)
        return
    with Watched(resting) as watched:
        seen = steps(made, found)
    assert equal(seen, steps(*net(method, options)))
    assert not watched.read and watched.now == 0
    # What guards measure is computed where the adapter is, so that each weight is copied there first.
    monkeypatch.setattr(_layers, "whole", torch.clone)
    with Watched(resting) as watched:
        for name in found.layers:
            found.change(name)
    assert not watched.read


def test_what_an_adapter_does_to_weights_that_rest_is_seen():
    """The reason for one refusal, and that the test above can fail."""
    made, found = net("sara", declared()["sara"].options)
    with Watched(Offloaded(made, "unet", "net")) as watched:
        steps(made, found)
    assert watched.read


def test_all_but_the_blocks_is_on_the_device_with_the_adapter():
    made, found = net("lora", {"rank": 2})
    resting = Offloaded(made, "unet", "net")
    values = [tensor.clone() for tensor in resting.tensors()]
    resting.to("meta")
    found.to("meta")
    made(inputs("meta")).sum().backward()
    assert {p.grad.device.type for p in found.parameters()} == {"meta"}
    assert {p.device.type for layer in (made.first, made.last) for p in layer.parameters()} == {"meta"}
    assert {p.device.type for p in made.parts.parameters()} == {"cpu"}
    assert {found.change(name)[0].device.type for name in found.layers} == {"meta"}
    assert equal(resting.tensors(), values)


def test_without_recomputation_results_are_right_and_copies_stay_for_the_backward_pass():
    made, _ = net()
    made.forward = lambda x: made.last(nn.Sequential(*made.parts)(made.first(x)))
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(made(x).square().sum(), x)
    resting = Offloaded(made, "unet", "net")
    with Watched(resting) as watched:
        out = made(x).square().sum()
        assert watched.now > largest(resting)
        assert equal(torch.autograd.grad(out, x), expected)


def test_a_block_that_fails_goes_home():
    made, _ = net()
    weight = made.parts[0].linear.weight
    Offloaded(made, "unet", "net")
    with pytest.raises(RuntimeError, match="normalized_shape"):
        made.parts[0](torch.zeros(1, 1, 11))
    assert made.parts[0].linear.weight is weight


def test_weights_that_are_tied_in_a_block_are_brought_once():
    made, _ = net()
    for part in made.parts:
        part.other = nn.Linear(12, 12, bias=False)
        part.other.weight = part.linear.weight
    resting = Offloaded(made, "unet", "net")
    with Watched(resting) as watched, torch.no_grad():
        made(inputs())
    assert watched.most == largest(resting)
    assert all(part.other.weight is part.linear.weight for part in made.parts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_are_moved_as_codes(kind):
    pytest.importorskip("torchao")

    def coded():
        made = Net().requires_grad_(False)
        quantise(made, kind, rank=2)
        found = adapters.attach(made, "lora", targets=["linear"], rank=2)
        turn(found)
        return made, found

    made, found = coded()
    resting = Offloaded(made, "unet", "net")
    assert equal(steps(made, found), steps(*coded()))
    seen = []
    made.parts[0].linear.register_forward_pre_hook(lambda layer, _: seen.extend(stored(layer.weight)))
    resting.to("meta")
    found.to("meta")
    made(inputs("meta")).sum().backward()
    assert len(seen) > 2 and {part.device.type for part in seen} == {"meta"}
    assert {part.device.type for tensor in resting.tensors() for part in stored(tensor)} == {"cpu"}


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("offload") / "sd3", "sd3")


def recipe(base, out, *words):
    content = {
        "name": "run",
        "out": str(out),
        "model": str(base),
        "adapter": {"name": "lora", "rank": 2},
        "data": {"root": "pocket/bumble", "resolution": 16},
        "train": {"steps": 2, "batch_size": 2, "ema": 0.5, "trackers": [], "device": "cpu", **CHECKPOINTED},
        "preview": {"prompts": ["a red circle"], "steps": 1},
        "judge": "none",
    }
    return config.parse_run(config.apply(content, words))


def test_a_run_with_pictures_is_the_same_run(base, tmp_path):
    plain = load_file(assemble.train(recipe(base, tmp_path / "plain")))
    trainer = assemble.assemble(recipe(base, tmp_path / "rested", "model.offload=block"))
    resting = trainer.model.offloaded["transformer"]
    with Watched(resting) as watched:
        found = load_file(trainer.fit())
    assert not watched.read and watched.most == largest(resting)
    assert found.keys() == plain.keys() and equal(list(found.values()), list(plain.values()))
    # One that began on a large device goes on with a small one.
    folder.check_folder(recipe(base, tmp_path / "plain", "model.offload=block", "train.resume=true"))


def test_the_estimate_is_of_the_device_and_says_what_rests(base, tmp_path):
    plain, rested = (measure(recipe(base, tmp_path, "preview={}", *words)) for words in ([], ["model.offload=block"]))
    assert rested.parameter_bytes + rested.resting_bytes == plain.parameter_bytes and rested.total == plain.total
    assert 0 < rested.peak_bytes < plain.peak_bytes - rested.resting_bytes / 4
    assert f"in main memory: blocks of {size(rested.resting_bytes)}" in rested.text()
    assert "in main memory" not in plain.text()
    assert any("this run computes on the CPU" in line for line in rested.said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=none"], "adapter=none trains them all: choose an adapter"),
        (["train.gradient_checkpointing=false"], r"set train\.gradient_checkpointing=true"),
        (["model.compile=true"], r"set model\.compile to false"),
        (["model.quantize=nf4"], r"set model\.quantize to int8 or fp8"),
        (["adapter=sara"], "adapter 'sara' chooses among the base's weights"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_the_model_is_looked_for(words, message, tmp_path):
    with pytest.raises(UserError, match=rf"model\.offload.*{message}"):
        measure(recipe("nowhere/to-be-found", tmp_path, "model.offload=block", *words))


def test_a_network_without_blocks_of_its_own_is_refused():
    model = tiny_model("amused")
    with pytest.raises(UserError, match=r"the transformer of 'tiny' \(UVit2DModel\) names no blocks"):
        Offloaded(model.denoiser, "transformer", "tiny")


@pytest.mark.gpu
def test_on_a_gpu_weights_come_from_pinned_memory_and_go_again(base, tmp_path):
    plain = load_file(assemble.train(recipe(base, tmp_path / "plain", "train.device=auto")))
    trainer = assemble.assemble(recipe(base, tmp_path / "rested", "train.device=auto", "model.offload=block"))
    resting = trainer.model.offloaded["transformer"]
    assert all(tensor.is_pinned() for tensor in resting.tensors())
    assert {p.device.type for p in trainer.parameters.values()} == {"cuda"}
    found = load_file(trainer.fit())
    assert all(tensor.is_pinned() for tensor in resting.tensors())
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.gpu
def test_on_a_gpu_the_peak_falls_by_the_blocks_that_rest(base, tmp_path):
    words = ["train.device=auto", "preview={}"]
    plain, rested = (measure(recipe(base, tmp_path, *words, *more)) for more in ([], ["model.offload=block"]))
    assert plain.parameter_bytes - rested.parameter_bytes == rested.resting_bytes
    assert rested.peak_bytes < plain.peak_bytes - rested.resting_bytes / 4
