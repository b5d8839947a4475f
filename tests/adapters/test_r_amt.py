"""R-AMT: binary masks on frozen weights, their straight-through gradient, and one bit a weight in the file."""

from __future__ import annotations

import pytest
import torch
from contracts.declared import Declared
from safetensors.torch import load_file
from torch import nn

from visiontune import config
from visiontune.adapters import attach, load
from visiontune.errors import UserError
from visiontune.training.optim import make_schedule

CONTRACT = {"r_amt": Declared(lambda module, options: module.weight.numel(), straight_through=True)}

X = torch.randn(6, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masked(spread: float = 0.01, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(11, 7)).double()
    adapters = attach({"unet": net}, "r_amt", targets=["0"], **options)
    mask = adapters.adapters()["unet.0"]
    with torch.no_grad():
        mask.score.add_(spread * torch.randn(mask.score.shape, generator=torch.Generator().manual_seed(2)))
    return net, adapters, mask


def test_entries_are_kept_whole_or_left_out():
    net, adapters, mask = masked()
    left_out = mask.score <= 5e-3
    assert 0 < int(left_out.sum()) < left_out.numel()
    expected = net[0].weight.masked_fill(left_out, 0.0)
    assert torch.equal(adapters.weight("unet.0"), expected)
    assert torch.equal(net(X), nn.functional.linear(X, expected, net[0].bias))
    y = net(X)
    assert torch.equal(net.eval()(X), y)
    adapters.merge()
    assert torch.equal(net(X), y)


def test_a_scale_leaves_a_part_of_what_is_left_out():
    net, adapters, mask = masked()
    adapters.scale = 0.25
    expected = torch.where(mask.kept(), net[0].weight, 0.75 * net[0].weight)
    torch.testing.assert_close(adapters.weight("unet.0"), expected)


def test_the_gradient_of_a_score_is_the_weights_times_the_weight():
    net, _, mask = masked()
    net(X).pow(3).sum().backward()
    w = net[0].weight.masked_fill(~mask.kept(), 0.0).detach().requires_grad_()
    nn.functional.linear(X, w, net[0].bias).pow(3).sum().backward()
    torch.testing.assert_close(mask.score.grad, w.grad * net[0].weight)
    assert mask.score.grad[~mask.kept()].abs().min() > 0, "what is left out can come back"


@pytest.mark.parametrize("loss_scale", [1.0, 256.0])
def test_the_norm_is_part_of_the_loss(loss_scale):
    net, adapters, mask = masked(norm=0.3)
    (loss_scale * net(X).sum()).backward()
    plain = mask.score.grad.clone()
    score = mask.score.detach().clone().requires_grad_()
    (loss_scale * 0.3 * score.norm()).backward()
    adapters.before_step(0, loss_scale)
    torch.testing.assert_close(mask.score.grad, plain + score.grad)


def test_the_norm_leaves_parameters_without_a_gradient_alone():
    _, adapters, mask = masked()
    adapters.before_step()
    assert mask.score.grad is None


def test_a_file_holds_a_bit_for_each_weight(tmp_path):
    net, adapters, mask = masked()
    path = adapters.save(tmp_path / "a.safetensors")
    saved = load_file(path)
    assert {key: (t.dtype, t.numel()) for key, t in saved.items()} == {"unet.0.kept": (torch.uint8, 10)}
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(11, 7)).double()
    loaded = load({"unet": other}, path)
    assert torch.equal(other(X), net(X))
    # As near to the threshold as at the start, on either side: training can go on.
    gaps = (loaded.adapters()["unet.0"].score - 5e-3).abs()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 5e-3))
    assert torch.equal(loaded.adapters()["unet.0"].kept(), mask.kept())


def test_spoilt_weights_are_found():
    rng = torch.Generator().manual_seed(0)
    x, good = torch.randn(256, 20, generator=rng), torch.randn(12, 20, generator=rng)
    spoilt = torch.rand(good.shape, generator=rng) < 0.05
    good = good.masked_fill(spoilt, 0.0)
    net = nn.Linear(20, 12, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.where(spoilt, 3.0, good))
    adapters = attach(nn.Sequential(net), "r_amt", targets=["0"])
    optimizer = torch.optim.Adam(adapters.parameters(), 3e-4)
    for _ in range(60):
        optimizer.zero_grad()
        (net(x) - x @ good.T).square().mean().backward()
        adapters.before_step()
        optimizer.step()
    left_out = ~adapters.adapters()["0"].kept()
    assert left_out[spoilt].all()
    assert not left_out[~spoilt & (good.abs() > 0.3)].any()


@pytest.mark.filterwarnings("error")
def test_a_run_that_left_nothing_out_says_so_at_its_end():
    _, adapters, mask = masked(spread=0.0)
    with torch.no_grad():
        mask.score[2, 3] = 0.006
    adapters.after_step(0.99)
    with pytest.warns(UserWarning, match=r"no score fell from 0\.01 below 0\.006, .* 0\.005; raise train\.lr"):
        adapters.after_step(1.0)
    with torch.no_grad():
        mask.score[2, 3] = 0.005
    adapters.after_step(1.0)


def test_scores_can_cross_the_threshold_within_the_recipe():
    run = config.load_run("personalise/r_amt")
    score = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([score], run.train.lr)
    schedule = make_schedule(optimizer, run.train)
    way = 0.0
    for _ in range(run.train.steps):
        way += schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
    # Adam moves a score by about the rate a step at most, and by much less where its gradients disagree.
    assert way > 2 * (run.adapter["initial"] - run.adapter["threshold"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"initial": 1e-3}, "initial must be above threshold"), ({"norm": -1.0}, "norm must be a number from 0")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        masked(**options)
