"""Identities of the implicit policies, the old policy and its files, and the gradient against one graph."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_model
from tiny_online import PROMPTS, SCHEDULES, Drawing, batch_of, brightness, gradient, most_held, tools_of

from visiontune import adapters
from visiontune.core import Condition
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.objectives._old import follow, old_policy
from visiontune.objectives.base import Tools
from visiontune.objectives.nft import Config, build, implicit
from visiontune.rewards.base import as_reward
from visiontune.schema import from_mapping
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

GROUP = 4
OPTIONS = {"group": GROUP, "steps": 3}


def values(prediction, rows=5, seed=0):
    """Arguments of `errors` in float64, the prediction a leaf."""
    rng = torch.Generator().manual_seed(seed)
    pred, old, x_0, eps = torch.randn(4, rows, 2, 3, 3, generator=rng, dtype=torch.float64)
    schedule, t = SCHEDULES[prediction], torch.arange(rows) * 150 + 100
    x_t = schedule.add_noise(x_0, eps, t)
    optimality = torch.rand(rows, generator=rng, dtype=torch.float64)
    return schedule, pred.requires_grad_(), old, x_0, eps, x_t, t, optimality


def slope(objective, schedule, pred, *rest):
    return torch.autograd.grad(objective.errors(schedule, pred, *rest).sum(), pred)[0] * pred[0].numel()


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
def test_the_two_policies_average_to_the_old_one(beta):
    pred, old = torch.randn(2, 3, 2, dtype=torch.float64)
    good, bad = implicit(pred, old, beta)
    torch.testing.assert_close((good + bad) / 2, old)
    torch.testing.assert_close(good - old, beta * (pred - old))


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gradient_at_the_old_policy_and_optimum(prediction, beta):
    objective = build(Config(beta=beta, normalise=False))
    schedule, pred, old, x_0, eps, x_t, t, r = values(prediction)
    target, signed = schedule.target(x_0, eps, t), (2 * r - 1).view(-1, 1, 1, 1)
    at_old = old.clone().requires_grad_()
    found = slope(objective, schedule, at_old, old, x_0, eps, x_t, t, r)
    torch.testing.assert_close(found, 2 * beta * signed * (old - target))
    best = (old + signed / beta * (target - old)).requires_grad_()
    assert slope(objective, schedule, best, old, x_0, eps, x_t, t, r).abs().max() < 1e-12
    assert slope(objective, schedule, pred, old, x_0, eps, x_t, t, r).abs().max() > 0.1


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize("normalise", [True, False])
def test_a_picture_neither_good_nor_bad_leaves_the_old_policy_alone(prediction, normalise):
    objective = build(Config(beta=0.5, normalise=normalise))
    schedule, _, old, *rest, r = values(prediction)
    at_old = old.clone().requires_grad_()
    assert slope(objective, schedule, at_old, old, *rest, torch.full_like(r, 0.5)).abs().max() < 1e-12
    assert slope(objective, schedule, at_old, old, *rest, torch.full_like(r, 0.6)).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_a_certainly_good_picture_with_beta_one_is_plain_denoising(prediction):
    schedule, pred, old, x_0, eps, x_t, t, r = values(prediction)
    found = build(Config(normalise=False)).errors(schedule, pred, old, x_0, eps, x_t, t, torch.ones_like(r))
    expected = (pred - schedule.target(x_0, eps, t)).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_normalised_errors_are_those_of_the_implied_pictures(prediction):
    """Whatever the network predicts; the divisor is a constant of the gradient."""
    objective = build(Config(beta=0.4, advantage_range=3.0))
    schedule, pred, old, x_0, eps, x_t, t, r = values(prediction)
    alpha, sigma = (v.view(-1, 1, 1, 1).double() for v in (schedule.alphas[t], schedule.sigmas[t]))
    clean = {
        "eps": lambda v: (x_t - sigma * v) / alpha,
        "x0": lambda v: v,
        "v": lambda v: alpha * x_t - sigma * v,
        "flow": lambda v: x_t - sigma * v,
    }[prediction]
    expected, slopes = 0, 0
    for weight, v, sign in ((r, 0.4 * pred + 0.6 * old, 1), (1 - r, 1.4 * old - 0.4 * pred, -1)):
        error = clean(v) - x_0
        divisor = error.detach().abs().flatten(1).mean(1)
        expected = expected + 3.0 / 0.4 * weight * error.square().flatten(1).mean(1) / divisor
        scale = {"eps": -sigma / alpha, "x0": torch.ones_like(alpha), "v": -sigma, "flow": -sigma}[prediction]
        slopes = slopes + 3.0 / 0.4 * (weight / divisor).view(-1, 1, 1, 1) * 2 * error * scale * sign * 0.4
    torch.testing.assert_close(objective.errors(schedule, pred, old, x_0, eps, x_t, t, r), expected)
    torch.testing.assert_close(slope(objective, schedule, pred, old, x_0, eps, x_t, t, r), slopes)


def test_optimality_is_the_distance_from_the_prompts_mean_in_deviations_of_all():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    model = Drawing()
    lent = tools_of(lambda images, prompts, meta: rewards, model=model)
    collected = build(Config(group=2, steps=1, advantage_range=2.0)).collect(model, batch_of(2, 2), lent)
    away = 1 / (2 * 2.0 * float(rewards.std(unbiased=False)))
    assert collected.optimality.tolist() == pytest.approx([0.5 - away, 0.5 + away, 0.5, 0.5])
    assert float(collected.terms["flat_groups"]) == 0.5


# ---------------------------------------------------------------------------------------------------- old policy


def test_the_old_policy_follows_at_the_distance_of_d():
    model = Drawing()
    lent = tools_of(model=model)
    model.move()
    follow(lent, 0.9)
    first = model.delta.detach().clone()
    assert torch.equal(lent.state["old"]["delta"], first), "the first is a copy whatever d"
    model.move(seed=1)
    assert torch.equal(lent.state["old"]["delta"], first)
    follow(lent, 1.0)
    assert torch.equal(lent.state["old"]["delta"], first)
    follow(lent, 0.25)
    torch.testing.assert_close(lent.state["old"]["delta"], 0.25 * first + 0.75 * model.delta.detach())
    follow(lent, 0.0)
    torch.testing.assert_close(lent.state["old"]["delta"], model.delta.detach())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"decay_rate": 0}, [0, 0, 0]),
        ({}, [0, 0.1, 0.5]),
        ({"decay_start": 75, "decay_rate": 0.0075, "decay_max": 0.999}, [0, 0.1875, 0.999]),
    ],
)
def test_d_grows_with_the_rollouts(config, expected):
    assert [build(Config(**config)).decay(k) for k in (0, 100, 1000)] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["lora", "oft", "boft", "sara", "svfit", "dense"])
def test_real_adapters_change_places_with_their_old_values(method):
    model = tiny_model("sd")
    chosen = {"oft": {"block_size": 4}, "boft": {"block_size": 4, "factors": 1}, "sara": {"budget": 0.1}}
    found = adapters.attach({"unet": model.denoiser}, method, targets=["to_q"], **chosen.get(method, {})).eval()
    lent = Tools(reward=None, reference=found.disable, parameters=dict(found.named_parameters()), refresh=found.refresh)
    cond = model.embed(["a red circle"])
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])

    @torch.no_grad()
    def predict():
        return model.predict(x, t, cond)

    def move(seed):
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in found.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=rng))

    move(0)
    then = predict()
    follow(lent, 0)
    move(1)
    now = predict()
    assert not torch.equal(now, then)
    for _ in range(2):
        with old_policy(lent):
            assert torch.equal(predict(), then)
        assert torch.equal(predict(), now)
    held = {name: value.clone() for name, value in lent.state["old"].items()}
    model.predict(x, t, cond).square().sum().backward()
    torch.optim.SGD(found.parameters(), lr=0.1).step()
    assert all(torch.equal(value, held[name]) for name, value in lent.state["old"].items())
    assert not torch.equal(predict(), now)


# -------------------------------------------------------------------------------------------------- whole updates


def by_hand(model, objective, collected, part, lent):
    """The loss of one update as one graph."""
    t, eps = objective.noised(model, collected, part, lent)
    total = 0
    for k in range(t.shape[1]):
        x_t = model.schedule.add_noise(collected.x_0, eps[:, k], t[:, k]).to(collected.x_0)
        pred = model.predict(x_t, t[:, k], collected.cond)
        own = model.delta.detach().clone()
        with torch.no_grad():
            model.delta.data = lent.state["old"]["delta"]
            old = model.predict(x_t, t[:, k], collected.cond)
            model.delta.data = own
            with model.disable():
                base = model.predict(x_t, t[:, k], collected.cond)
        given = collected.x_0, eps[:, k], x_t, t[:, k], collected.optimality
        total = total + objective.errors(model.schedule, pred, old, *given).mean() / t.shape[1]
        total = total + objective.config.kl_weight * (pred - base).square().mean() / t.shape[1]
    return total


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_an_update_is_the_gradient_of_one_graph(prediction, micro_batch):
    model = Drawing(prediction)
    options = {**OPTIONS, "beta": 0.7, "kl_weight": 0.3, "timestep_count": 2, "micro_batch": micro_batch}
    objective, lent = build(Config(**options)), tools_of(model=model, scale=4.0)
    model.move()
    collected = objective.collect(model, batch_of(GROUP, 2), lent)
    assert 0 < collected.optimality.min() < 0.5 < collected.optimality.max() < 1
    model.move(seed=1)
    loss = objective.update(model, collected, 1, lent)
    found = gradient(model)
    total = by_hand(model, objective, collected, 1, lent)
    total.backward()
    torch.testing.assert_close(found, 4 * gradient(model), rtol=1e-9, atol=1e-11)
    assert float(loss.total) == pytest.approx(total.item(), rel=1e-5)
    assert float(loss.terms["moved"]) > 0 and float(loss.terms["kl"]) > 0


def test_every_update_has_noise_of_its_own_and_each_timestep_once():
    model = Drawing()
    objective, lent = build(Config(**OPTIONS)), tools_of(model=model)
    collected = objective.collect(model, batch_of(GROUP, 1), lent)
    t, eps = objective.noised(model, collected, 0, lent)
    assert t.shape == (4, 3) and all(sorted(row) == sorted(collected.timesteps.tolist()) for row in t.tolist())
    again, other = objective.noised(model, collected, 0, lent), objective.noised(model, collected, 1, lent)
    assert torch.equal(eps, again[1]) and not torch.equal(eps, other[1])
    assert not torch.equal(eps[0], eps[1])


def test_the_rollout_is_the_old_policys():
    model = Drawing()
    objective, lent = build(Config(**OPTIONS, decay_rate=1.0, decay_max=1.0)), tools_of(model=model)
    first = objective.collect(model, batch_of(GROUP, 1), lent)
    model.move()
    same = objective.collect(model, batch_of(GROUP, 1), tools_of(model=model, state=lent.state, index=0))
    assert not torch.equal(same.x_0, first.x_0), "with d = 0 it has come along"
    held = lent.state["old"]["delta"].clone()
    model.move(seed=1)
    objective.collect(model, batch_of(GROUP, 1), tools_of(model=model, state=lent.state, index=1))
    assert torch.equal(lent.state["old"]["delta"], held)
    assert model.refreshed > 0


def test_two_ranks_take_the_gradient_of_one():
    model = Drawing()
    objective = build(Config(**OPTIONS))
    lent = tools_of(model=model)
    whole = objective.collect(model, batch_of(GROUP, 2), lent)
    single = objective.update(model, whole, 0, lent)
    expected = gradient(model)
    seen = [[], []]
    for rank in (0, 1):
        local = tools_of(model=model, gather=lambda value, rank=rank: seen[rank].append(value) or value)
        objective.collect(model, batch_of(GROUP, 1, rank=rank, world=2), local)
    halves = []
    for rank in (0, 1):
        calls = iter(zip(*seen, strict=True))
        both = tools_of(model=model, rank=rank, world=2, gather=lambda value, calls=calls: torch.cat(next(calls)))
        part = objective.collect(model, batch_of(GROUP, 1, rank=rank, world=2), both)
        torch.testing.assert_close(part.optimality, whole.optimality[4 * rank : 4 * rank + 4])
        objective.update(model, part, 0, both)
        halves.append(gradient(model))
        torch.testing.assert_close(part.terms["reward_std"], single.terms["reward_std"])
    torch.testing.assert_close((halves[0] + halves[1]) / 2, expected, rtol=1e-9, atol=1e-12)


def test_memory_does_not_grow_with_the_timesteps():
    def held(steps):
        model = Drawing()
        objective, lent = build(Config(**OPTIONS | {"steps": steps})), tools_of(model=model)
        collected = objective.collect(model, batch_of(GROUP, 1), lent)
        return most_held(lambda: objective.update(model, collected, 0, lent))

    assert held(9) == held(3) > 0


def test_equal_rewards_say_nothing_and_are_counted():
    model = Drawing()
    lent = tools_of(model=model, reward=lambda images, prompts, meta: torch.ones(len(images)))
    objective = build(Config(**OPTIONS, kl_weight=0.0))
    collected = objective.collect(model, batch_of(GROUP, 2), lent)
    loss = objective.update(model, collected, 0, lent)
    assert gradient(model).abs().max() < 1e-12
    assert float(loss.terms["flat_groups"]) == 1 and float(loss.terms["kl"]) == 0


class Bandit:
    """Pictures of one value per prompt: the velocity is that of a learnt x_0 for every x_t."""

    device = torch.device("cpu")
    schedule = Schedule.flow()

    def __init__(self):
        self.mean = torch.nn.Parameter(torch.zeros(1))

    def predict(self, x_t, t, cond):
        # The ideal velocity where x_0 is N(mean, 1).
        sigma = (t / 1000).view(-1, 1, 1, 1)
        variance = (1 - sigma) ** 2 + sigma**2
        clean = self.mean + (1 - sigma) / variance * (x_t - (1 - sigma) * self.mean)
        eps = sigma / variance * (x_t - (1 - sigma) * self.mean)
        return eps - clean

    def latent_shape(self):
        return 1, 1, 1

    def chain(self, steps, shape):
        return self.schedule.timesteps(steps)

    def guidance(self, scale):
        return classifier_free(scale)

    def embed(self, prompts):
        return Condition(tokens=torch.zeros(len(prompts), 1, 1))

    def decode(self, latents):
        return torch.tanh(latents / 4).repeat(1, 3, 1, 1)


def above_half(images, prompts, meta=None):
    """Whether the latent was above 0.5, which `decode` and `pixels` make 0.562."""
    return (images.mean((1, 2, 3)) > 0.562).float()


def test_mass_moves_to_what_is_rewarded():
    model, seen = Bandit(), []
    parameters = {"mean": model.mean}
    optimizer = torch.optim.Adam([model.mean], lr=0.05)
    objective, state = build(Config(group=16, steps=4, kl_weight=0.0)), {}
    for index in range(40):
        lent = Tools(reward=above_half, reference=nullcontext, parameters=parameters, index=index, state=state)
        collected = objective.collect(model, batch_of(16, 2, step=index), lent)
        objective.update(model, collected, 0, lent)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((model.mean.item(), float(collected.terms["reward"])))
    means = [mean for mean, _ in seen[9::10]]
    assert means == sorted(means) and means[-1] > 0.7
    assert sum(r for _, r in seen[-10:]) > sum(r for _, r in seen[:10]) + 1


# --------------------------------------------------------------------------------------------------- whole runs


def trainer(out, **train):
    model = tiny_model("sd")
    torch.manual_seed(0)
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    options = {"steps": 4, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 2, "trackers": [], "device": "cpu"}
    return Trainer(
        model=model,
        adapters=found,
        objective=build(Config(group=4, steps=2, decay_rate=0.2, updates=2, micro_batch=2)),
        rows=PromptBatches(PROMPTS, 4, 4),
        train=TrainConfig(**options | train),
        out=out,
        reward=as_reward(brightness, "brightness"),
    )


def test_a_run_goes_on_with_its_old_policy(tmp_path):
    whole, first = trainer(tmp_path / "a"), trainer(tmp_path / "b", steps=2)
    whole.fit()
    first.fit()
    more = trainer(tmp_path / "b", resume=True)
    more.fit()
    for name, value in whole.parameters.items():
        assert torch.equal(more.parameters[name], value)
        assert torch.equal(more.lender.state["old"][name], whole.lender.state["old"][name])
    assert any(not torch.equal(whole.lender.state["old"][n], p) for n, p in whole.parameters.items())


def test_a_run_without_adapter_keeps_a_base_only_where_it_is_held_to_one(tmp_path):
    whole, copies = trainer(tmp_path), []
    for weight in (1e-4, 0):
        model = tiny_model("sd")
        built = build(Config(kl_weight=weight))
        options = {"rows": whole.rows, "train": whole.train, "out": tmp_path, "reward": whole.lender.reward}
        run = Trainer(**options, model=model, adapters=None, objective=built)
        with torch.no_grad():
            model.denoiser.conv_in.bias.add_(1)
            with run.lender.tools(0).reference():
                copies.append(model.denoiser.conv_in.bias.clone())
    base = tiny_model("sd").denoiser.conv_in.bias
    assert torch.equal(copies[0], base) and torch.equal(copies[1], base + 1)


def test_what_cannot_work_is_refused():
    model = Drawing()
    with pytest.raises(UserError, match="for flow models"):
        build(Config(dynamics="flow-ode")).check(model, object())
    for wrong in ({"group": 1}, {"timestep_count": 11}, {"beta": 0}, {"decay_max": 2}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            from_mapping(Config, wrong)
