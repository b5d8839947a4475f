"""AutoLoRA: the gradient through the inner step, what the search keeps, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contracts.declared import Declared, count_lora
from torch import Tensor, nn

from visiontune.adapters import attach, autolora, load
from visiontune.adapters._evidence import Evidence
from visiontune.adapters.autolora import Bilevel, Config, Terms, search
from visiontune.errors import UserError

CONTRACT = {"autolora": Declared(count_lora, {"rank": 2}, plan_options={})}

K = 4


class Net(nn.Module):
    """A grouped convolution and two linear layers in a row, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.one, self.two = nn.Conv2d(4, 8, 3, groups=2), nn.Linear(8, 10), nn.Linear(10, 6)
        self.idle = nn.Linear(3, 3)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.conv(image).mean((2, 3)))))


NAMES = ("conv", "one", "two")


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, 5, 5, generator=rng).double(), torch.randn(5, 6, generator=rng).double()


def losses(net: nn.Module, count: int = 4):
    return [lambda i=i: F.mse_loss(net(batch(i)[0]), batch(i)[1]) for i in range(count)]


def bilevel(net: nn.Module, moved: bool = True) -> tuple[Bilevel, list]:
    """The search's parameters on ``net`` and its losses, away from the start."""
    adapters = attach(net, "autolora", targets=NAMES, rank=K, alpha=6.0)
    terms = {}
    torch.manual_seed(1)
    for name, slot in adapters.adapters().items():
        terms[name] = Terms(Config(rank=K, alpha=6.0), net.get_submodule(name))
        slot.put(terms[name])
        if moved:
            with torch.no_grad():
                for p in terms[name].parameters():
                    p.add_(0.5 * torch.randn_like(p))
    return Bilevel(terms, lambda t: t), losses(net)


def test_terms_are_weighed_by_the_softmax_on_both_paths():
    net = Net()
    level, _ = bilevel(net)
    for name in NAMES:
        layer, term = net.get_submodule(name), level.terms[name]
        x = torch.randn(2, 4, 5, 5).double() if name == "conv" else torch.randn(3, layer.in_features).double()
        weights = term.logits.exp() / term.logits.exp().sum()
        groups = getattr(layer, "groups", 1)
        down, up = term.down.view(groups, K, -1), (term.up * weights).view(groups, -1, K)
        changed = layer.weight + 6 / K * torch.cat([u @ d for u, d in zip(up, down, strict=True)]).view(
            layer.weight.shape
        )
        expected = layer._conv_forward(x, changed, layer.bias) if name == "conv" else F.linear(x, changed, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(term.weight(layer.weight, 1.0), changed)


@pytest.mark.parametrize("unrolled", [True, False])
def test_the_outer_gradient_against_finite_differences(unrolled, monkeypatch):
    monkeypatch.setattr(autolora, "STEP", 1e-4)
    net = Net()
    level, (train, held, *_) = bilevel(net)
    start = [p.detach().clone() for p in level.factors]
    slope = level.gradients(train, level.factors)
    count = sum(g.numel() for g in slope)
    lr = 0.05
    rate = lr * count**0.5 / sum(float(g.square().sum()) for g in slope) ** 0.5
    found = level.step(train, held, lr, unrolled)
    after = [w - rate * g for w, g in zip(start, slope, strict=True)]
    for p, expected in zip(level.factors, after, strict=True):
        torch.testing.assert_close(p.detach(), expected)

    def outer() -> float:
        """The held-out loss after the inner step, from the start and at the present logits."""
        level.put(start)
        inner = level.gradients(train, level.factors) if unrolled else slope
        level.put([w - rate * g for w, g in zip(start, inner, strict=True)])
        with torch.no_grad():
            return float(held())

    eps, error, through = 1e-5, 0.0, 0.0
    first = level.gradients(held, level.logits) if unrolled else found
    for logits, gradient, plain in zip(level.logits, found, first, strict=True):
        for j in range(K):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    logits[j] += sign * eps
                values.append(outer())
                with torch.no_grad():
                    logits[j] -= sign * eps
            slope_j = (values[0] - values[1]) / (2 * eps)
            error = max(error, abs(slope_j - float(gradient[j])))
            through = max(through, abs(float(gradient[j] - plain[j])))
    size = max(float(g.abs().max()) for g in found)
    assert error < 1e-5 * size
    # What the inner step adds is no small matter here.
    assert (through > 0.02 * size) == unrolled


def test_the_default_step_is_short_enough():
    level, (train, held, *_) = bilevel(Net())
    start = [p.detach().clone() for p in level.factors]
    coarse = level.step(train, held, 0.05, True)
    level.put(start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autolora, "STEP", 1e-4)
        fine = level.step(train, held, 0.05, True)
    for a, b in zip(coarse, fine, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_terms_of_no_less_than_the_mean_weight_are_kept(k):
    term = Terms(Config(rank=k), nn.Linear(8, 8))
    assert term.kept() == k
    with torch.no_grad():
        term.logits[0] += 1.0
    assert term.kept() == 1


def test_symmetric_terms_stay_near_equal():
    """Orthonormal terms, white inputs, a target that is the same for each of them, one loss for both levels."""
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    x, target = torch.eye(6).double(), net[0].weight.detach().T + torch.eye(6).double()
    given = [lambda: F.mse_loss(net(x), target)] * 2
    slot = attach(net, "autolora", targets=["0"], rank=6).adapters()["0"]
    term = Terms(Config(rank=6), net[0])
    slot.put(term)
    with torch.no_grad():
        term.down.copy_(torch.linalg.qr(torch.randn(6, 6).double())[0])
    search(Config(rank=6, lr=0.05, search_steps=20), {"0": term}, Evidence({"0": net[0]}, given))
    assert float(given[0]().detach()) < 0.9 / 6
    assert float((6 * term.logits.detach().softmax(0) - 1).abs().max()) < 0.03


def test_terms_that_help_are_kept():
    """Two of the terms see what is missing, the others see inputs that are right already."""
    net = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    base = net[0].weight.detach().clone()
    missing = torch.zeros(6, 6).double()
    missing[0, 0] = missing[1, 1] = 2.0
    xs = [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    given = [lambda x=x: F.mse_loss(net(x), x @ (base + missing).T) for x in xs]
    for unrolled in (True, False):
        slot = attach(net, "autolora", targets=["0"], rank=6, name=str(unrolled)).adapters()["0"]
        term = Terms(Config(rank=6), net[0])
        slot.put(term)
        with torch.no_grad():
            term.down.copy_(torch.eye(6))
        config = Config(rank=6, lr=0.05, search_steps=40, unrolled=unrolled)
        search(config, {"0": term}, Evidence({"0": net[0]}, given))
        assert term.kept() == 2
        assert term.logits.topk(2).indices.sort().values.tolist() == [0, 1]
        with torch.no_grad():
            term.up.zero_()


def prepared(net: nn.Module, **options):
    torch.manual_seed(2)
    adapters = attach(net, "autolora", targets=NAMES, rank=K, lr=0.03, search_steps=12, **options)
    adapters.prepare(losses(net))
    return adapters


def ranks(adapters) -> list[int]:
    return [slot.inner.up.shape[1] for slot in adapters.adapters().values()]


@pytest.mark.parametrize("unrolled", [True, False])
def test_training_starts_anew_from_the_base(unrolled):
    net, plain, calls = Net(), Net(), 0
    with_count = losses(net)

    def counted(loss):
        def call() -> Tensor:
            nonlocal calls
            calls += 1
            return loss()

        return call

    torch.manual_seed(2)
    adapters = attach(net, "autolora", targets=NAMES, rank=K, lr=0.03, search_steps=5, alpha=6.0, unrolled=unrolled)
    adapters.prepare([counted(loss) for loss in with_count])
    assert calls == 5 * (4 if unrolled else 2)
    assert torch.equal(net(batch(8)[0]), plain(batch(8)[0]))
    slots = adapters.adapters().values()
    assert all(1 <= rank <= K for rank in ranks(adapters))
    assert len(set(ranks(adapters))) > 1 or ranks(adapters)[0] < K
    assert {slot.inner.strength for slot in slots} == {6 / K}
    assert all(set(slot.tensors()) == {"down", "up"} and not slot.inner.up.any() for slot in slots)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(net.parameters(), plain.parameters(), strict=True))


def test_processes_sum_their_gradients():
    level, (loss, *_) = bilevel(Net())
    both = Bilevel(level.terms, lambda t: 2 * t)
    for parameters in (level.logits, level.factors):
        for one, two in zip(level.gradients(loss, parameters), both.gradients(loss, parameters), strict=True):
            torch.testing.assert_close(two, 2 * one)


def test_the_ranks_come_back_from_a_file(tmp_path):
    net, fresh = Net(), Net()
    adapters = prepared(net)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    loaded = load(fresh, adapters.save(tmp_path / "a.safetensors"))
    assert ranks(loaded) == ranks(adapters)
    assert torch.equal(fresh(batch(4)[0]), net(batch(4)[0]))


def test_a_layer_without_a_part_in_the_loss_is_named():
    net = Net()
    adapters = attach(net, "autolora", targets=["one", "two", "idle"], rank=2)
    with pytest.raises(UserError, match="layer 'idle' takes no part in the loss"):
        adapters.prepare(losses(net))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batches": 1}, "batches must be at least 2"), ({"dora": True}, "dora does not go with planned adapters")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        attach(Net(), "autolora", targets=NAMES, **options)
