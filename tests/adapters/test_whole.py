"""Layers that are changed as a whole beside a method: files, strength, merging, and who else may write them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.weights.export import export

HEADER = {"base_model": "tiny"}


class Net(nn.Module):
    """A layer that a method adapts, and one that a base does not have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 4)
        self.added: nn.Linear | None = nn.Linear(3, 4, bias=False)
        nn.init.zeros_(self.added.weight)

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return self.first(x) if self.added is None else self.first(x) + self.added(told)


X, TOLD = torch.ones(2, 6), torch.tensor([[1.0, 0, 0], [0, 2.0, 1]])


def attached(net: Net, method: str = "lora", **options):
    made = adapters.attach({"net": net}, method, targets="Linear", whole={"net.added": net.added}, **options)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    made.refresh()
    return made.eval()


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2}), ("oft", {"block_size": 2})])
def test_they_learn_whatever_the_method_and_come_back_from_a_file(method, options, tmp_path):
    net = Net()
    before = net(X, TOLD)
    made = attached(net, method, **options)
    assert made.layers == ["net.first"] and made.wholes() == ["net.added"]
    after = net(X, TOLD)
    assert not torch.equal(net(X, TOLD), net(X, 2 * TOLD)), "a method that multiplies could not move a zero"
    path = made.save(tmp_path / "a.safetensors", HEADER)
    assert adapters.read_header(path)["whole"] == ["net.added"]
    made.scale = 0.5
    half = made.change("net.added")[0]
    made.scale = 1.0
    torch.testing.assert_close(2 * half, made.change("net.added")[0])
    made.merge()
    torch.testing.assert_close(net(X, TOLD), after)
    made.detach()
    assert torch.equal(net(X, TOLD), before)
    again = adapters.load({"net": net}, path)
    assert torch.equal(net(X, TOLD), after) and again.digest() == adapters.load({"net": Net()}, path).digest()


def test_a_base_without_the_layer_and_files_of_other_tools_are_refused(tmp_path):
    net = Net()
    made = attached(net, rank=2)
    path = made.save(tmp_path / "a.safetensors", HEADER)
    for kind in ("diffusers", "peft"):
        with pytest.raises(UserError, match=r"no place for 'net.added', .* export as merged"):
            export(made, tmp_path / kind, kind, dtype=torch.float32)
    bare = Net()
    bare.added = None
    with pytest.raises(UserError, match=r"the base has no layer 'net.added'.* model.accept"):
        adapters.load({"net": bare}, path)


def test_a_start_with_or_without_them_fits_its_like_alone(tmp_path):
    net, other = Net(), Net()
    path = attached(net, rank=2).save(tmp_path / "with.safetensors", HEADER)
    found = adapters.attach({"net": other}, "lora", targets="Linear", whole={"net.added": other.added}, rank=2)
    adapters.start(found, path)
    assert torch.equal(found.change("net.added")[0], attached(Net(), rank=2).change("net.added")[0])
    plain = adapters.attach({"net": Net()}, "lora", targets=["first"], rank=2)
    with pytest.raises(UserError, match=r"'net.added' is trained as a whole either in .* set objective.w as it was"):
        adapters.start(plain, path)
