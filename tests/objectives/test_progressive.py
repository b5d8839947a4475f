"""Progressive distillation: targets that one step makes of two, in closed form, whatever the network predicts."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model
from tiny_online import SCHEDULES, Drawing, Gaussian, batch_of, gradient, tools_of

from visiontune.diffusion.dynamics import DDIM
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError
from visiontune.objectives.progressive import Config, Progressive, build, doubled, truncated_snr_weight

every = pytest.mark.parametrize("prediction", SCHEDULES)


def objective(**options) -> Progressive:
    return build(Config(**{"steps": 4, "updates": 4, **options}))


def begun(model, made):
    tools = tools_of(model=model)
    made.setup(model, tools)
    return tools


def in_order(seen, rows: int):
    """The states of each row from noise on."""
    found = seen[(seen.t.double() - 10_000 * (torch.arange(len(seen.t)) // seen.of_row)).argsort(descending=True)]
    return [value.view(rows, -1, *value.shape[1:]) for value in (found.x, found.target)]


@every
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_one_step_with_the_target_leads_where_two_of_the_teacher_do(prediction, scale):
    model, made = Drawing(prediction), objective(cfg_scale=scale)
    model.move(0.3)
    tools = begun(model, made)
    before = model.delta.clone()
    batch = batch_of(1, 3)
    begin, end = model.chain(4, model.latent_shape())
    expected = rollout(
        model,
        model.embed(batch.prompts),
        guidance=NO_GUIDANCE if scale == 1 else CFG(scale=scale),
        chain=doubled(begin, end),
        start=Start(generator=tools.generators(batch)),
        keep=Keep(history=True),
    )
    model.move(0.5, seed=1)  # the student moves on, and its teacher stays
    (seen,) = made.collect(model, batch, tools)
    x, target = in_order(seen, 3)
    torch.testing.assert_close(x, expected.latents[:, :-1:2])
    for i, (t, t_next) in enumerate(zip(begin, end, strict=True)):
        reached, _ = transition(model.schedule, target[:, i], x[:, i], t.expand(3), t_next.expand(3), DDIM())
        torch.testing.assert_close(reached, expected.latents[:, 2 * i + 2], rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.delta, before)


@torch.no_grad()
def test_the_target_of_a_flow_is_the_mean_of_two_velocities():
    """x_n = x + (m - t) v_1 + (n - m) v_2 with m in the middle, so that p = (v_1 + v_2) / 2."""
    model, made = Gaussian(), objective()
    tools = tools_of(model=None, parameters={"mean": model.mean}, refresh=lambda: None)
    made.setup(model, tools)
    (seen,) = made.collect(model, batch_of(1, 2), tools)
    begin, end = model.chain(4, model.latent_shape())
    x, target = in_order(seen, 2)
    for i, (t, n) in enumerate(zip(begin.double(), end.double(), strict=True)):
        m = (t + n) / 2
        first = model.predict(x[:, i].double(), t.expand(2), None)
        second = model.predict(x[:, i] + (m - t) / 1000 * first, m.expand(2), None)
        torch.testing.assert_close(target[:, i].double(), (first + second) / 2, rtol=1e-4, atol=1e-5)


@every
def test_the_loss_is_weighed_by_the_error_in_x_0_that_an_error_of_the_prediction_is(prediction):
    schedule = SCHEDULES[prediction]
    t = torch.tensor([20, 400, 700])
    pred, x = (torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    wrong = pred + 0.1
    in_x_0 = (schedule.to_x_0(wrong, x, t) - schedule.to_x_0(pred, x, t)).square().flatten(1).mean(1)
    expected = schedule.snr(t).clamp(min=1).double() * in_x_0 / 0.01
    torch.testing.assert_close(truncated_snr_weight(schedule, t).double(), expected, rtol=1e-4, atol=1e-6)
    assert truncated_snr_weight(Schedule.flow(), torch.tensor([0.0, 1000.0])).tolist() == [1.0, 1.0]


@every
def test_a_student_that_predicts_the_targets_has_no_loss_and_its_gradient_is_of_the_weighted_square(prediction):
    model, made = Drawing(prediction), objective(updates=2)
    tools = begun(model, made)
    model.move(0.2)
    with torch.no_grad():
        (seen,) = made.collect(model, batch_of(1, 3), tools)
    losses = [made.update(model, [seen], part, tools) for part in range(2)]
    found = gradient(model) / 2
    pred = model.predict(seen.x, seen.t, seen.cond)
    weight = truncated_snr_weight(model.schedule, seen.t)
    loss = (weight * (pred - seen.target).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, model.delta)[0])
    assert sum(float(one.total) for one in losses) / 2 == pytest.approx(float(loss.detach()))
    done = type(seen)(x=seen.x, t=seen.t, cond=seen.cond, target=pred.detach(), of_row=seen.of_row)
    assert float(made.update(model, [done], 0, tools).total) < 1e-12
    gradient(model)


def test_steps_are_cut_in_the_middle_and_stay_whole():
    begin, end = doubled(torch.tensor([751, 501, 251, 1]), torch.tensor([501, 251, 1, -249]))
    assert begin.tolist() == [751, 626, 501, 376, 251, 126, 1, 0] and end.tolist()[1::2] == [501, 251, 1, -249]
    assert begin.dtype == torch.int64 and end.tolist()[:-1] == begin.tolist()[1:]
    flow = doubled(torch.tensor([1000.0, 400.0]), torch.tensor([400.0, 0.0]))
    assert flow[0].tolist() == [1000.0, 700.0, 400.0, 200.0] and flow[1].tolist() == [700.0, 400.0, 200.0, 0.0]


def test_a_step_that_goes_nowhere_asks_for_nothing():
    schedule, x = SCHEDULES["eps"], torch.ones(1, 1, 2, 2, 2)
    assert not objective().leading(schedule, x, x, torch.tensor([0]), torch.tensor([-1])).any()


def test_the_header_says_in_what_steps_and_by_what_guidance_it_is_drawn():
    assert objective().facts() == {"few_steps": json.dumps({"steps": 4, "scheduler": "model"})}
    assert json.loads(objective(cfg_scale=3.0).facts()["distilled_guidance"]) == {"cfg_scale": 3.0}


def test_noise_and_models_that_are_told_their_guidance_are_refused():
    with pytest.raises(UserError, match="two steps with noise lead to no one place"):
        objective(dynamics={"name": "ddim", "eta": 1.0}).check(Drawing(), None)
    with pytest.raises(UserError, match="steps are halved at one strength: distil that one first"):
        objective().check(tiny_model("flux"), None)
    with pytest.raises(ValueError, match="updates must be at most steps"):
        Config(steps=2, updates=3)
