"""Starting an adapter from a trained file: the same function, in another rank too, or one line that says why not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from visiontune.adapters import attach, start
from visiontune.errors import UserError


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.first = nn.Embedding(20, 12), nn.Linear(12, 10)
        self.second = nn.Conv1d(10, 6, 3, padding=1, groups=2)
        self.double()

    def forward(self, ids):
        return self.second(torch.tanh(self.first(self.words(ids))).mT)


IDS = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
EVERYTHING = ["words", "first", "second"]


def adapted(method="lora", targets=EVERYTHING, seed=0, std=0.0, **options):
    net = Net(seed)
    adapters = attach({"unet": net}, method, targets=list(targets), **options)
    with torch.no_grad():
        for i, p in enumerate(adapters.parameters()):
            p.add_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net, adapters


def saved(tmp_path, **options):
    net, adapters = adapted(std=0.4, **options)
    return net, adapters, adapters.save(tmp_path / "broad.safetensors")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 4, "targets": EVERYTHING}),
        ("lora", {"rank": 4, "dora": True}),
        ("oft", {"block_size": 3}),
        ("sara", {"budget": 0.3}),
        ("one_bit", {"rank": 4}),
        ("r_amt", {}),
    ],
)
def test_the_same_options_start_with_the_same_function(method, options, tmp_path):
    options = {"targets": ["first", "second"], **options}
    net, _, path = saved(tmp_path, method=method, **options)
    fresh, adapters = adapted(method, **options)
    assert not torch.allclose(fresh(IDS), net(IDS))
    start(adapters, path)
    assert torch.equal(fresh(IDS), net(IDS))
    fresh(IDS).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters())


@pytest.mark.parametrize("more", [{}, {"alpha": 3.0}, {"rslora": True, "alpha": 8.0}, {"dora": True}])
def test_a_greater_rank_changes_nothing_and_has_room(more, tmp_path):
    dora = {"dora": True} if "dora" in more else {}
    targets = EVERYTHING[1:] if dora else EVERYTHING
    net, _, path = saved(tmp_path, rank=2, alpha=5.0, targets=targets, **dora)
    grown, adapters = adapted(rank=6, targets=targets, **more)
    fresh = adapters.adapters()["unet.first"].down[2:].clone()
    start(adapters, path)
    torch.testing.assert_close(grown(IDS), net(IDS))
    first = adapters.adapters()["unet.first"]
    assert torch.equal(first.down[2:], fresh) and not first.up[:, 2:].any()
    grown(IDS).square().sum().backward()
    assert first.up.grad[:, 2:].any()


@pytest.mark.parametrize("more", [{}, {"alpha": 1.5}])
def test_a_smaller_rank_is_the_best_approximation(more, tmp_path):
    _, broad, path = saved(tmp_path, rank=5, alpha=10.0)
    _, adapters = adapted(rank=2, **more)
    start(adapters, path)
    for layer in adapters.layers:
        before, after = broad.change(layer)[0], adapters.change(layer)[0]
        groups = 2 if layer == "unet.second" else 1
        for b, a in zip(before.chunk(groups), after.chunk(groups), strict=True):
            u, s, v = torch.linalg.svd(b.flatten(1), full_matrices=False)
            assert s[2] > 0.01 * s[0]
            torch.testing.assert_close(a.flatten(1), u[:, :2] * s[:2] @ v[:2])


def test_a_smaller_rank_that_is_more_than_a_layer_has(tmp_path):
    net, _, path = saved(tmp_path, rank=9)
    shrunk, adapters = adapted(rank=7)
    start(adapters, path)
    # Six outputs in two groups have three singular values each.
    before, after = net.second, shrunk.second
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "s2ft", "targets": EVERYTHING[1:]}, "holds the adapter 'lora', not 's2ft'"),
        ({"targets": ["first"]}, "'unet.second' and 0 more layers .* set targets to"),
        ({"seed": 1}, "trained on other base weights .* start from an adapter of this base"),
        ({"dora": True}, "dora=false"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message, tmp_path):
    _, _, path = saved(tmp_path, targets=EVERYTHING[1:])
    _, adapters = adapted(**{"targets": EVERYTHING[1:], **options})
    with pytest.raises(UserError, match=message) as caught:
        start(adapters, path)
    assert "\n" not in str(caught.value)


def test_other_methods_want_the_options_of_the_file(tmp_path):
    _, _, path = saved(tmp_path, method="oft", targets=["first"], block_size=4)
    _, adapters = adapted("oft", targets=["first"], block_size=2)
    with pytest.raises(UserError, match="block_size=4, not 2: set block_size to it"):
        start(adapters, path)


def test_broad_training_helps_few_samples():
    """Related tasks: those seen before differ from the new one in little of a common change."""
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(10, 2, generator=rng).double() @ torch.randn(2, 12, generator=rng).double()
    few, many = (torch.randn(n, 12, generator=rng).double() for n in (3, 500))
    new = common + 0.1 * torch.randn(10, 12, generator=rng)

    def train(net, adapters, x, y):
        optimizer = torch.optim.Adam(adapters.parameters(), 2e-2)
        for _ in range(150):
            optimizer.zero_grad()
            (net.first(x) - y).square().mean().backward()
            optimizer.step()
        return float((net.first(many) - many @ new.T).square().mean().detach())

    net, adapters = adapted(targets=["first"], rank=4)
    train(net, adapters, many, many @ common.T)
    started = train(net, adapters, few, few @ new.T)
    other, fresh = adapted(targets=["first"], rank=4)
    assert started < 0.2 * train(other, fresh, few, few @ new.T)


def test_files_of_a_started_run_stand_alone(tmp_path):
    net, _, path = saved(tmp_path, rank=2)
    _, adapters = adapted(rank=3)
    start(adapters, path)
    tensors = load_file(adapters.save(tmp_path / "subject.safetensors"))
    assert tensors["unet.first.up"].shape == (10, 3)
    assert net(IDS).isfinite().all()
