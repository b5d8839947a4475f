"""What every adapter method has to satisfy on every kind of layer that it supports.

A new method is picked up by its file name; its test file declares it (`contracts.declared`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from contracts.declared import declared, declaring, turn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visiontune import plugin
from visiontune.adapters import AdapterSet, attach, attached, load, read_header
from visiontune.adapters._layers import NORMS, run
from visiontune.errors import UserError

# A few steps on tiny layers turn far; that the series then leaves the rotations is test_oft.py's matter.
pytestmark = pytest.mark.filterwarnings("ignore:the Neumann series")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "linear_many_tokens": (lambda: nn.Linear(12, 8, bias=False), (3, 12, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 5, 4)),
    "conv3x3": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "conv_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv_grouped": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), (2, 8, 5, 5)),
    "conv1x1_grouped": (lambda: nn.Conv2d(16, 6, 1, stride=2, padding=1, groups=2), (2, 16, 4, 4)),
    "layer_norm": (lambda: nn.LayerNorm(12), (2, 5, 12)),
    "group_norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 4)),
    "embedding": (lambda: nn.Embedding(9, 12, padding_idx=0), (2, 5)),
}

CASES = [
    pytest.param(method, options, kind, id=f"{method}-{'-'.join(map(str, options.values()))}-{kind}")
    for method, contract in declared().items()
    for options in (contract.options, *contract.variants)
    for kind, (make, _) in LAYERS.items()
    if isinstance(make(), plugin.load("adapters", method).LAYERS)
    if not (options.get("dora") and kind == "embedding")
]
# One layer kind is enough for what does not depend on the layer.
LINEAR = [case for case in CASES if case.values[2] == "linear"]


class Net(nn.Module):
    """One layer between two frozen maps, so that gradients pass through and into it."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.shape = LAYERS[kind]
        self.before = nn.Identity()
        self.layer = make()
        if isinstance(self.layer, NORMS):
            nn.init.normal_(self.layer.weight, std=0.3)
            nn.init.normal_(self.layer.bias, std=0.3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.before(x)))

    def input(self, seed: int = 1) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        if isinstance(self.layer, nn.Embedding):
            # Without the padding row, which takes part in no gradient.
            return torch.randint(1, 9, self.shape, generator=rng)
        return torch.randn(self.shape, generator=rng).to(self.layer.weight.dtype)


def _net(method: str, options: dict, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Net, AdapterSet]:
    net = Net(kind, dtype)
    return net, attach(net, method, targets="layer", **options)


def _moved(net: Net, adapters: AdapterSet) -> float:
    """The largest change of a weight or bias."""
    bias, before = adapters.bias("layer"), getattr(net.layer, "bias", None)
    moved = torch.zeros(()) if bias is None else (bias if before is None else bias - before).abs().max()
    return float(torch.maximum((adapters.weight("layer") - net.layer.weight).abs().max(), moved))


def _gradients(adapters: AdapterSet, loss: Callable[[], Tensor]) -> list[Tensor]:
    adapters.zero_grad()
    loss().backward()
    return [p.grad.clone() for p in adapters.parameters()]


def test_every_method_is_covered() -> None:
    for method in plugin.names("adapters"):
        assert len(files := declaring(method)) == 1, (
            f"declare {method!r} once: add CONTRACT = {{{method!r}: Declared(...)}} to tests/adapters/test_{method}.py "
            f"(tests/contracts/declared.py says what it holds); now it is in {' and '.join(files) or 'no test file'}"
        )


def by_columns(net: Net, x: torch.Tensor) -> torch.Tensor:
    """What a net gives whose weight lies column by column, as rotated ones do: some processors round otherwise then."""
    weight = net.layer.weight.data
    net.layer.weight.data = weight.mT.contiguous().mT
    found = net(x)
    net.layer.weight.data = weight
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_identity_at_init_is_bit_exact(method: str, options: dict, kind: str, dtype: torch.dtype) -> None:
    net = Net(kind, dtype)
    x = net.input()
    before = net(x)
    turned = by_columns(net, x) if kind.startswith("linear") else before
    adapters = attach(net, method, targets="layer", **options)
    found = net(x)
    assert torch.equal(found, before) or torch.equal(found, turned)
    with torch.no_grad():
        assert torch.equal(net(x), found)
    assert torch.equal(adapters.weight("layer"), net.layer.weight)


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_fast_path_is_the_weight_path(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind)
    turn(adapters)
    x = net.input()
    assert _moved(net, adapters) > 1e-3
    for scale in (1.0, 0.4):
        adapters.scale = scale
        x.requires_grad_(x.is_floating_point())
        slow = torch.autograd.grad(
            run(net.layer, x, adapters.weight("layer"), adapters.bias("layer")).pow(3).sum(),
            [*adapters.parameters(), *([x] if x.requires_grad else [])],
        )
        fast = torch.autograd.grad(
            net.layer(x).pow(3).sum(), [*adapters.parameters(), *([x] if x.requires_grad else [])]
        )
        expected = run(net.layer, x, adapters.weight("layer"), adapters.bias("layer"))
        torch.testing.assert_close(net.layer(x), expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(net.layer(x), expected, rtol=1e-10, atol=1e-12)
        # The backward pass that keeps rotated weights relies on orthogonality, which holds to rounding.
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# DoRA takes the length of its rows for constant in gradients, as its paper does.
@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [c for c in CASES if not c.values[1].get("dora") and not declared()[c.values[0]].straight_through],
)
def test_gradcheck(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind)
    turn(adapters)
    x = net.input().narrow(0, 0, 1)
    parameters = list(adapters.parameters())

    def f(*values: Tensor) -> Tensor:
        # gradcheck perturbs `values` in place, which are the parameters themselves, behind autograd's back.
        adapters.refresh()
        return net(x)

    assert torch.autograd.gradcheck(f, parameters, atol=1e-6)


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_merge_equals_unmerged_and_unmerge_restores(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind)
    turn(adapters)
    x, weight, bits = net.input(), net.layer.weight, net.layer.weight.detach().clone()
    bias, plain = getattr(net.layer, "bias", None), Net(kind)
    expected = net(x).detach()
    adapters.merge()
    assert not torch.equal(run(net.layer, x, net.layer.weight, getattr(net.layer, "bias", None)), plain.layer(x))
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    with adapters.disable():
        assert torch.equal(net.layer.weight, bits)
    assert adapters.merged
    adapters.scale = 0.5
    adapters.merge()
    merged = net(x)
    adapters.unmerge()
    assert net.layer.weight is weight
    assert getattr(net.layer, "bias", None) is bias
    assert torch.equal(weight, bits)
    torch.testing.assert_close(net(x), merged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_parameter_count(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind)
    assert adapters.parameter_count == declared()[method].count(net.layer, options)
    assert all(p.requires_grad for p in adapters.parameters())
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_base_is_untouched(method: str, options: dict, kind: str) -> None:
    net = Net(kind)
    x, keys, cls = net.input(), list(net.state_dict()), type(net.layer)
    state, before = copy.deepcopy(net.state_dict()), net(x)
    adapters = attach(net, method, targets="layer", **options)
    assert list(net.state_dict()) == keys
    assert isinstance(net.layer, cls)
    turn(adapters)
    assert not torch.equal(net(x), before)
    with adapters.disable():
        assert torch.equal(net(x), before)
    adapters.enabled = False
    assert torch.equal(net(x), before)
    adapters.enabled = True
    adapters.scale = 0.0
    torch.testing.assert_close(net(x), before)
    adapters.scale = 1.0
    _gradients(adapters, lambda: net(x).sum())
    adapters.merge()
    adapters.detach()
    assert type(net.layer) is cls
    assert torch.equal(net(x), before)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_save_and_load(method: str, options: dict, kind: str, tmp_path) -> None:
    net, adapters = _net(method, options, kind, torch.float32)
    turn(adapters)
    path = adapters.save(tmp_path / "adapter.safetensors", {"trigger": "sks"})
    header = read_header(path)
    assert (header["method"], header["targets"], header["layers"]) == (method, ["layer"], ["layer"])
    assert header["trigger"] == "sks"
    assert header["config"].items() >= options.items()
    fresh = Net(kind, torch.float32)
    loaded = load(fresh, path)
    x = net.input()
    assert torch.equal(fresh(x), net.eval()(x))
    assert not loaded.training

    half = Net(kind, torch.float16)
    load(half, path)
    other = Net(kind, torch.float32)
    with torch.no_grad():
        other.layer.weight.mul_(1.1)
    with pytest.raises(UserError, match=r"other base weights \(layer 'layer'"):
        load(other, path)
    assert not attached(other)
    assert load(other, path, allow_other_base=True).layers == ["layer"]


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_two_adapters_on_one_layer(method: str, options: dict, kind: str) -> None:
    net, lower = _net(method, options, kind)
    upper_method = "lora" if method != "lora" else "oft"
    if kind == "embedding":
        upper_method = "lora"
    if kind in ("layer_norm", "group_norm"):
        upper_method = "sara"
    upper = attach(net, upper_method, targets="layer", name="upper", **declared()[upper_method].options)
    turn(lower)
    turn(upper)
    x = net.input()
    expected = run(net.layer, x, upper.weight("layer"), upper.bias("layer"))
    torch.testing.assert_close(net.layer(x), expected, rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(net.layer(x).pow(3).sum(), [*lower.parameters(), *upper.parameters()])
    slow = torch.autograd.grad(expected.pow(3).sum(), [*lower.parameters(), *upper.parameters()])
    for a, b in zip(grads, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    with pytest.raises(UserError, match="merge 'default' first"):
        upper.merge()
    lower.merge()
    torch.testing.assert_close(net.layer(x), expected, rtol=1e-10, atol=1e-12)
    upper.merge()
    torch.testing.assert_close(net.layer(x), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="'upper' was merged after 'default'"):
        lower.unmerge()
    upper.unmerge()
    lower.unmerge()
    with upper.disable():
        alone = net.layer(x)
    upper.detach()
    assert torch.equal(net.layer(x), alone)
    torch.testing.assert_close(
        alone, run(net.layer, x, lower.weight("layer"), lower.bias("layer")), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_accumulation_over_steps(method: str, options: dict, kind: str) -> None:
    """Micro-batches give the gradient of their sum, at every optimiser step and not only at the first."""
    net, adapters = _net(method, options, kind)
    turn(adapters)
    xs = [net.input(seed) for seed in (3, 4, 5)]

    def whole_loss(net: Net) -> Tensor:
        return torch.stack([net(x).pow(2).sum() for x in xs]).sum()

    for step in range(2):
        whole = _gradients(adapters, functools.partial(whole_loss, net))
        adapters.zero_grad()
        for x in xs:
            net(x).pow(2).sum().backward()
        for p, g in zip(adapters.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
        fresh_net, fresh = _net(method, options, kind)
        fresh.load_state_dict(adapters.state_dict())
        for a, b in zip(_gradients(fresh, functools.partial(whole_loss, fresh_net)), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=f"stale at step {step}")
        torch.optim.SGD(adapters.parameters(), 0.01).step()
        adapters.after_step()


@pytest.mark.parametrize(
    ("method", "options", "kind", "first"),
    [
        *(pytest.param(*case.values, "checkpointed", id=case.id) for case in CASES),
        *(
            pytest.param(*case.values, first, id=f"{case.id}-{first}")
            for case in LINEAR
            for first in ("plain", "no_grad", "inference")
        ),
    ],
)
def test_checkpointing_gives_the_same_gradients(method: str, options: dict, kind: str, first: str) -> None:
    net, adapters = _net(method, options, kind)
    turn(adapters)
    x = net.input()
    fresh_net, fresh = _net(method, options, kind)
    fresh.load_state_dict(adapters.state_dict())
    expected = _gradients(fresh, lambda: fresh_net(x).pow(2).sum() + fresh_net(x).sum())
    # Whoever filled the cache, the graph must be there for training.
    if first == "plain":
        net(x)
    elif first in ("no_grad", "inference"):
        with torch.no_grad() if first == "no_grad" else torch.inference_mode():
            net(x)

    def loss() -> Tensor:
        one, two = (checkpoint(net, x, use_reentrant=False) for _ in range(2))
        return one.pow(2).sum() + two.sum()

    for _ in range(2):
        for a, b in zip(_gradients(adapters, loss), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", plugin.names("adapters"))
def test_no_option_is_called_as_one_that_every_adapter_has(method: str) -> None:
    options = {field.name for field in dataclasses.fields(plugin.load("adapters", method).Config)}
    assert not options & {"name", "targets", "start", "under"}


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_bf16_base_with_float32_masters(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind, torch.bfloat16)
    full_net = Net(kind, torch.float32)
    full_net.layer.load_state_dict(net.layer.state_dict())
    full = attach(full_net, method, targets="layer", **options)
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    turn(adapters)
    turn(full)
    for p, q in zip(full.parameters(), adapters.parameters(), strict=True):
        p.data.copy_(q.data)
    x = net.input()
    y = net(x)
    assert y.dtype == torch.bfloat16
    reference = full_net(x.float() if x.is_floating_point() else x)
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.05)
    grads = _gradients(adapters, lambda: net(x).float().sum())
    for g, h in zip(
        grads,
        _gradients(full, lambda: full_net(x.float() if x.is_floating_point() else x).sum()),
        strict=True,
    ):
        assert g.dtype == torch.float32
        assert (g - h).norm() <= 0.05 * h.norm() + 1e-3
    adapters.merge()
    assert torch.equal(net.layer.weight, full.weight("layer").bfloat16()), "merging rounds once, at the end"


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_autocast(method: str, options: dict, kind: str) -> None:
    """float32 base and masters under autocast: low precision inside, float32 gradients, no crash in the backward."""
    net, adapters = _net(method, options, kind, torch.float32)
    turn(adapters)
    x = net.input()
    expected = net(x).detach()
    adapters.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert kind in ("embedding", "layer_norm", "group_norm") or y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    # What low precision saw must not be what full precision gets.
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(("method", "options", "kind"), CASES)
def test_deepcopy_and_pickle_carry_the_adapters(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind)
    turn(adapters)
    x = net.input()
    expected = net(x).detach()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
        own = attached(twin)["default"]
        assert own is not adapters
        turn(own, seed=3)
        assert not torch.equal(twin(x), expected)
        own.detach()
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize(("method", "options", "kind"), LINEAR)
def test_changes_through_data_are_seen_after_a_step_and_a_mode_switch(method: str, options: dict, kind: str) -> None:
    """As when averaged weights are swapped in for a preview and out again."""
    net, adapters = _net(method, options, kind)
    x = net.input()
    before = net(x).detach()
    kept = [p.detach().clone() for p in adapters.parameters()]
    for p in adapters.parameters():
        p.data.copy_(p.data - 0.1)
    adapters.eval()
    assert not torch.equal(net(x), before)
    for p, k in zip(adapters.parameters(), kept, strict=True):
        p.data.copy_(k)
    adapters.train()
    assert torch.equal(net(x), before)
    for p in adapters.parameters():
        p.data.copy_(p.data - 0.1)
    adapters.refresh()
    changed = net(x)
    assert not torch.equal(changed, before)
    for p in adapters.parameters():
        p.data.copy_(p.data + 0.2)
    adapters.after_step()
    assert not torch.equal(net(x), changed)


@pytest.mark.parametrize(("method", "options", "kind"), LINEAR)
def test_training_lowers_a_loss(method: str, options: dict, kind: str) -> None:
    net, adapters = _net(method, options, kind, torch.float32)
    x = net.input()
    target = torch.tanh(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(7)))
    optimizer = torch.optim.AdamW(adapters.parameters(), 0.01, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = (net(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapters.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]
