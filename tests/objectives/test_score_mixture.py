"""Score-of-mixture distillation: its gradient, the critic and the judge, and that a student moves to its teacher."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from tiny import tiny_model
from tiny_online import PROMPTS, Drawing, Gaussian, batch_of, gradient, shifted_reference, tools_of
from tiny_rollout import SD
from torch.distributions import Normal

from visiontune.diffusion.guidance import CFG, guided
from visiontune.errors import UserError
from visiontune.objectives._critic import Judge
from visiontune.objectives.base import generator
from visiontune.objectives.score_mixture import Config, ScoreMixture, build

OPTIONS = {"steps": 2, "cfg_scale": 3.0, "critic_updates": 2, "critic_lr": 1e-2}


def objective(**options) -> ScoreMixture:
    return build(Config(**{**OPTIONS, **options}))


def begun(model, made, **changed):
    """Tools with the critic that a run starts with."""
    tools = tools_of(model=model, rng=generator("noise"), **changed)
    made.setup(model, tools)
    return tools


def moved(prediction="eps") -> Drawing:
    model = Drawing(prediction)
    model.move(0.3)
    return model


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("mixture", [False, True])
def test_the_gradient_in_a_picture_is_that_of_the_divergence(prediction, mixture):
    model, made = moved(prediction), objective(mixture=mixture, critic_updates=1)
    tools = begun(model, made, scale=4.0)
    critic = tools.state["critic"]
    with torch.no_grad():
        critic.values["delta"].add_(0.2)
        if mixture:
            critic.judge.last.bias.fill_(0.7)
    rows = batch_of(1, 3)
    collected = made.collect(model, rows, tools)
    loss = made.update(model, collected, 0, tools)
    found = gradient(model) / 4

    cond = model.embed(rows.prompts)
    x = made.generate(model, cond, rows, tools, "student")
    with torch.no_grad():
        seen = made._noised(model, x, cond, rows, tools, "student")
        with model.disable():
            teacher = guided(model, seen.x_t, seen.t, cond, None, CFG(scale=3.0))
        mu_p = model.schedule.to_x_0(teacher, seen.x_t, seen.t)
        student = model.delta.data
        model.delta.data = student + 0.2
        mu_q = model.schedule.to_x_0(model.predict(seen.x_t, seen.t, cond), seen.x_t, seen.t)
        model.delta.data = student
        a = made._skews(rows, tools, "student").double() if mixture else torch.ones(3)
        share = torch.sigmoid(0.7 + torch.log(a / (1 - a))) if mixture else torch.ones(3)
        size = (x - mu_p).abs().flatten(1).mean(1)
        towards = (share / (a * size)).view(-1, 1, 1, 1) * (mu_q - mu_p)
    (expected,) = torch.autograd.grad((towards * x).mean(), model.delta)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss.total, 0.5 * towards.square().mean(), check_dtype=False, rtol=1e-5, atol=1e-8)
    assert loss.terms["gap"] == pytest.approx(float(towards.abs().mean()), rel=1e-5)


def test_where_critic_and_teacher_agree_nothing_moves():
    model, made = Drawing(), objective(cfg_scale=1.0, critic_updates=1)
    tools = begun(model, made)
    made.update(model, made.collect(model, batch_of(1, 2), tools), 0, tools)
    assert not gradient(model).any()


def test_the_critic_learns_what_the_student_draws_and_leaves_the_student_as_it_is():
    model, made = moved(), objective(mixture=False, cfg_scale=1.0)
    tools = begun(model, made)
    critic, rows, before = tools.state["critic"], batch_of(1, 4), model.delta.detach().clone()
    watched = made._watched(model, made.collect(model, rows, tools)[0], tools, 0)
    fake = watched[0]

    def error():
        with torch.no_grad(), critic.as_model(tools):
            return float((model.predict(fake.x_t, fake.t, fake.cond) - fake.eps).square().mean())

    model.delta.grad = torch.full_like(model.delta, 7.0)
    first = error()
    losses = [critic.learn(tools, [lambda: (model.predict(fake.x_t, fake.t, fake.cond) - fake.eps).square().mean()])]
    for _ in range(30):
        critic.learn(tools, [lambda: made._criticism(model, critic, watched, len(rows))])
    assert losses[0] == pytest.approx(first)
    assert error() < 0.9 * first
    assert torch.equal(model.delta, before) and (model.delta.grad == 7).all()
    assert not model.last.weight.requires_grad


def test_a_step_whose_gradient_is_not_finite_is_not_made():
    model, made = moved(), objective(mixture=False)
    tools = begun(model, made)
    critic = tools.state["critic"]
    before = critic.values["delta"].detach().clone()
    critic.learn(tools, [lambda: model.delta.sum() * torch.inf])
    assert torch.equal(critic.values["delta"], before)


def test_the_judge_learns_the_share_of_the_mixture():
    """Of two normal distributions whose means are known to it: D is that of their densities."""
    judge = Judge(1, seed=0)
    ones, others, level = torch.full((128, 1, 2, 2), 0.5), torch.full((128, 1, 2, 2), -0.5), torch.full((128,), 0.5)
    optimizer, rng = torch.optim.Adam(judge.parameters(), lr=3e-3), generator("drawn")
    p, q = Normal(0.5, 1.0), Normal(-0.5, 1.0)
    for _ in range(200):
        a = torch.rand(128, generator=rng).clamp(1e-3, 1 - 1e-3)
        eps = torch.randn(128, 1, 2, 2, generator=rng)
        real, fake = (torch.sigmoid(judge(mean + eps, ones, others, level) + a.logit()) for mean in (0.5, -0.5))
        loss = (a * (1 - real).square() + (1 - a) * fake.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(128, 1, 2, 2, generator=rng)
    expected = (p.log_prob(x) - q.log_prob(x)).flatten(1).sum(1)
    with torch.no_grad():
        found = judge(x, ones, others, level)
    assert (found.sigmoid() - expected.sigmoid()).abs().mean() < 0.05
    assert torch.stack([found, expected]).corrcoef()[0, 1] > 0.95


def test_the_judge_takes_clips_frame_by_frame():
    judge, rng = Judge(2, seed=0), generator("clip")
    torch.nn.init.normal_(judge.last.weight, generator=rng)
    clips = [torch.randn(3, 2, 4, 6, 6, generator=rng) for _ in range(3)]
    level = torch.tensor([0.1, 0.5, 0.9])
    frames = torch.stack([judge(*(clip[:, :, f] for clip in clips), level) for f in range(4)])
    torch.testing.assert_close(judge(*clips, level), frames.mean(0))


@pytest.mark.parametrize("few", [1, 3])
def test_the_student_draws_as_the_stock_sampler_does(few):
    model, made = moved(), objective(few_steps=few)
    model.delta.data.zero_()
    rows = batch_of(1, 2)
    stock = LCMScheduler(**SD)
    stock.set_timesteps(few)
    assert torch.equal(made.chain(model)[0].cpu(), stock.timesteps)
    tools = begun(model, made)
    cond, seen = model.embed(rows.prompts), set()
    for key in range(12):
        last = int(torch.randint(few, (), generator=tools.shared(key)))
        own = tools.generators(rows, key)
        x = randn_tensor((2, *model.latent_shape()), generator=own)
        stock._step_index = None
        with torch.no_grad():
            for t in stock.timesteps[: last + 1]:
                out = stock.step(model.predict(x, t.expand(2), cond).float(), t, x, generator=own)
                x = out.prev_sample
            found = made.generate(model, cond, rows, tools, key)
        torch.testing.assert_close(found.float(), out.denoised, rtol=1e-4, atol=1e-4)
        seen.add(last)
    assert seen == set(range(few))


@pytest.mark.parametrize("mixture", [False, True])
def test_a_student_elsewhere_moves_to_the_teacher(mixture):
    model, made = Gaussian(), objective(mixture=mixture, cfg_scale=1.0, critic_updates=3, critic_lr=0.08)
    model.mean.data.fill_(1.0)
    tools = tools_of(
        rng=generator("noise"), parameters={"mean": model.mean}, reference=shifted_reference(model.mean, 0.0)
    )
    made.setup(model, tools)
    optimizer = torch.optim.Adam([model.mean], lr=0.08)
    for index in range(40):
        now = tools_of(**{**vars(tools), "index": index})
        optimizer.zero_grad()
        made.update(model, made.collect(model, batch_of(1, 16, PROMPTS), now), 0, now)
        optimizer.step()
    assert abs(float(model.mean.detach())) < 0.2


def test_samplers_are_told_how_to_draw():
    made = objective(few_steps=2)
    assert json.loads(made.facts()["few_steps"]) == {"steps": 2, "scheduler": "lcm"}
    assert json.loads(made.facts()["distilled_guidance"]) == {"cfg_scale": 3.0}
    flow = objective()
    flow.check(tiny_model("sd3"), None)
    assert json.loads(flow.facts()["few_steps"])["scheduler"] in tiny_model("sd3").samplers()


def test_what_is_told_its_guidance_is_refused():
    with pytest.raises(UserError, match="is told its guidance, and one strength of it is learnt here"):
        objective().check(tiny_model("flux"), None)
