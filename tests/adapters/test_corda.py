"""CorDA: which components it starts at, that the start is the base, and that the change is B A - B0 A0."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared, count_lora, full_rank, same_count
from torch import nn

from visiontune.adapters import attach
from visiontune.adapters.corda import Config, components
from visiontune.errors import UserError
from visiontune.weights.export import export


def _count(module: nn.Module, options: dict) -> int:
    return count_lora(module, {"rank": min(options["rank"], full_rank(module))})


CONTRACT = {
    "corda": Declared(
        _count,
        {"rank": 2, "alpha": 3.0},
        variants=({"rank": 20, "mode": "kpm", "root": True},),
        plan_variants=({"rank": 3, "mode": "kpm", "root": True},),
        budget=same_count,
    )
}

rng = torch.Generator().manual_seed(0)
W = torch.randn(7, 10, generator=rng, dtype=torch.float64)
X = torch.randn(40, 10, generator=rng, dtype=torch.float64) * torch.logspace(-1, 1, 10, dtype=torch.float64)
C = X.T @ X


def weighing(damping: float, root: bool) -> torch.Tensor:
    c = C / C.diagonal().mean() + damping * torch.eye(10)
    values, q = torch.linalg.eigh(c)
    return q * values.pow(0.5 if root else 1.0) @ q.T


def prepared(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 7)).double()
    with torch.no_grad():
        net[0].weight.copy_(W)
    adapters = attach({"unet": net}, "corda", targets=["0"], **{"rank": 3, **options})
    adapters.prepare([lambda x=x: net(x).sum() for x in X.split(10)])
    return net, adapters, adapters.adapters()["unet.0"]


@pytest.mark.parametrize("root", [False, True])
def test_all_components_make_up_the_weight(root):
    up, down = components(W, C, 7, Config(root=root))
    torch.testing.assert_close(up @ down, W)


@pytest.mark.parametrize("root", [False, True])
def test_ipm_keeps_and_kpm_removes_what_weighs_most_and_least(root):
    """The best and the least harmful approximation, by Eckart and Young, in the norm that F weighs."""
    f = weighing(0.01, root)
    values = torch.linalg.svdvals(W @ f)
    up, down = components(W, C, 3, Config(root=root, mode="ipm"))
    torch.testing.assert_close((W - up @ down).matmul(f).norm(), values[3:].norm())
    up, down = components(W, C, 3, Config(root=root, mode="kpm"))
    torch.testing.assert_close((up @ down @ f).norm(), values[-3:].norm())


def test_the_root_gives_the_least_error_of_the_outputs():
    def error(root: bool) -> torch.Tensor:
        up, down = components(W, C, 3, Config(root=root, damping=1e-9))
        return (X @ (W - up @ down).T).norm()

    best = torch.linalg.svdvals(X @ W.T)[3:].norm()
    torch.testing.assert_close(error(True), best, rtol=1e-6, atol=0)
    assert error(False) > 1.001 * best


def test_without_evidence_it_is_pissa():
    net = nn.Sequential(nn.Linear(10, 7)).double()
    adapter = attach(net, "corda", targets=["0"], rank=3, alpha=6.0).adapters()["0"]
    u, s, v = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)
    torch.testing.assert_close(2.0 * adapter.up0 @ adapter.down0, (u[:, :3] * s[:3]) @ v[:3])
    torch.testing.assert_close(adapter.up0.norm(dim=0), adapter.down0.norm(dim=1))
    identity, plain = (components(W, second, 3, Config()) for second in (torch.eye(10).double(), None))
    torch.testing.assert_close(identity[0] @ identity[1], plain[0] @ plain[1])


def test_the_start_depends_neither_on_alpha_nor_on_the_size_of_the_inputs():
    products = [a.config.strength * a.up0 @ a.down0 for a in (prepared(alpha=alpha)[2] for alpha in (1.0, 3.0, 12.0))]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])
    one, other = components(W, C, 3, Config()), components(W, 1e4 * C, 3, Config())
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_change_is_that_of_the_product(mode):
    net, adapters, adapter = prepared(mode=mode, alpha=6.0)
    assert torch.equal(net(X), nn.functional.linear(X, net[0].weight, net[0].bias))
    assert torch.equal(adapters.weight("unet.0"), W)
    with torch.no_grad():
        adapter.down.normal_(), adapter.up.normal_()
    before = adapter.up0 @ adapter.down0
    after = (adapter.up0 + adapter.up) @ (adapter.down0 + adapter.down)
    torch.testing.assert_close(adapters.weight("unet.0"), W + 2.0 * (after - before))
    down, up = adapters.low_rank("unet.0")
    assert up.shape[1] == 6
    torch.testing.assert_close(W + up @ down, adapters.weight("unet.0"))


def test_the_gradients_are_those_of_the_factors_themselves():
    """As if B A were trained beside a base without B0 A0."""
    net, _, adapter = prepared()
    net(X).square().sum().backward()
    a, b = (t.clone().requires_grad_() for t in (adapter.down0, adapter.up0))
    rest = W - (adapter.up0 @ adapter.down0)
    nn.functional.linear(X, rest + b @ a, net[0].bias).square().sum().backward()
    torch.testing.assert_close(adapter.down.grad, a.grad)
    torch.testing.assert_close(adapter.up.grad, b.grad)


def test_an_export_has_twice_the_rank_and_no_error(tmp_path):
    _, adapters, adapter = prepared()
    with torch.no_grad():
        adapter.down.normal_(), adapter.up.normal_()
    done = export(adapters, tmp_path / "x.safetensors", dtype=torch.float64)
    assert done.ranks == {"unet.0": 6} and done.worst < 1e-12


def test_fewer_inputs_than_dimensions_are_enough():
    few = X[:3]
    up, down = components(W, few.T @ few, 7, Config())
    torch.testing.assert_close(up @ down, W)
    none = components(W, torch.zeros(10, 10).double(), 7, Config())
    torch.testing.assert_close(none[0] @ none[1], W)


@pytest.mark.parametrize("w", [torch.zeros(7, 10).double(), W[:, :2] @ W[:2]], ids=["zero", "rank 2"])
def test_components_that_the_weight_lacks_can_still_be_trained(w):
    up, down = components(w, C, 7, Config(mode="kpm"))
    torch.testing.assert_close(up @ down, w)
    assert (down.norm(dim=1) > 1e-3).all()


def test_groups_weigh_their_own_inputs():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    net = nn.Sequential(layer)
    adapter = attach(net, "corda", targets=["0"], rank=2).adapters()["0"]
    x = torch.randn(2, 4, 6, 6).double() * torch.tensor([1.0, 2.0, 30.0, 4.0]).view(4, 1, 1)
    attached = layer.entries[0].owner
    attached.prepare([lambda: net(x).sum()])
    rows = nn.functional.unfold(x, 3).unflatten(1, (2, 18)).permute(1, 0, 3, 2).flatten(1, 2)
    for g in range(2):
        part = slice(3 * g, 3 * g + 3)
        up, down = components(layer.weight[part].detach().flatten(1), rows[g].T @ rows[g], 2, Config(rank=2))
        found = adapter.up0[part] @ adapter.down0[2 * g : 2 * g + 2].flatten(1)
        torch.testing.assert_close(found, up @ down)


def test_kpm_forgets_less_than_lora_at_the_same_loss():
    """Two tasks with inputs in different directions: the prior's are looked at, then the other task is learnt."""

    def forgotten(method: str, **options) -> float:
        rng = torch.Generator().manual_seed(5)
        net = nn.Sequential(nn.Linear(10, 10, bias=False)).double()
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(10, 10, generator=rng))
        old, new = (torch.randn(60, 10, generator=rng).double() for _ in range(2))
        old[:, 6:] *= 0.05
        goal = new @ torch.randn(10, 10, generator=rng).double()
        before = net(old).detach()
        torch.manual_seed(0)
        adapters = attach(net, method, targets=["0"], rank=4, **options)
        if adapters.plans:
            adapters.prepare([lambda: net(old).sum()])
        optimizer = torch.optim.Adam(adapters.parameters(), 0.02)
        start = float((net(new) - goal).square().mean().detach())
        for _ in range(2000):
            loss = (net(new) - goal).square().mean()
            if loss < 0.75 * start:
                return float((net(old) - before).square().mean().detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        raise AssertionError("not learnt")

    assert forgotten("corda", mode="kpm") < 0.7 * forgotten("lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"damping": 0.0}, "damping"), ({"mode": "x"}, "mode")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), "corda", targets=["0"], **options)
