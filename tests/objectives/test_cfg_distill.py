"""CFG distillation: which states it learns from, what the teacher says of them, and its gradient."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model
from tiny_online import PROMPTS, SCHEDULES, Drawing, batch_of, gradient, tools_of

from visiontune.core import Batch
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, guided
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.objectives._distilled import Seen
from visiontune.objectives.base import generator
from visiontune.objectives.cfg_distill import CFGDistill, Config, build, jittered

OPTIONS = {"steps": 4, "updates": 4, "cfg_scale": 3.0}
ROLLED = ["teacher", "student"]
TEACHER = CFG(scale=3.0)


def objective(**options) -> CFGDistill:
    return build(Config(**{**OPTIONS, **options}))


def moved(prediction="eps") -> Drawing:
    model = Drawing(prediction)
    model.move(0.3)
    return model


def lent(model):
    return tools_of(model=model, rng=generator("noise"))


def collected(model, made) -> list[Seen]:
    with torch.no_grad():
        return made.collect(model, batch_of(1, 3), lent(model))


def in_order(seen: Seen) -> Seen:
    """States of each row from noise on."""
    rows = torch.arange(len(seen.t)) // seen.of_row
    return seen[(seen.t - 10_000 * rows).argsort(descending=True)]


def pictures(model, rows=3) -> Batch:
    return Batch(
        data={"image": torch.randn(rows, *model.latent_shape(), generator=generator("pictures"))},
        cond=None,
        prompts=list(PROMPTS[:rows]),
        weight=torch.ones(rows),
        prior=torch.zeros(rows, dtype=torch.bool),
        ids=[str(i) for i in range(rows)],
    )


@torch.no_grad()
def drawn(model, guidance, tools):
    batch = batch_of(1, 3)
    return rollout(
        model,
        model.embed(batch.prompts),
        guidance=guidance,
        chain=4,
        start=Start(generator=tools.generators(batch)),
        keep=Keep(history=True),
    )


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize("states", ROLLED)
def test_states_are_those_of_the_rollout_and_targets_the_base_guided(states, prediction):
    model = moved(prediction)
    (seen,) = collected(model, objective(states=states, jitter=False))
    if states == "teacher":
        with model.disable():
            expected = drawn(model, TEACHER, lent(model))
    else:
        expected = drawn(model, NO_GUIDANCE, lent(model))
    place = {int(1000 * t): i for i, t in enumerate(expected.timesteps)}
    order = torch.tensor([place[int(1000 * t)] for t in seen.t]).view(3, 4)
    assert torch.equal(order.sort(1).values, torch.arange(4).repeat(3, 1)) and len({*map(tuple, order.tolist())}) > 1
    torch.testing.assert_close(seen.x.view(3, 4, -1), expected.latents.flatten(2)[torch.arange(3)[:, None], order])
    with model.disable(), torch.no_grad():
        for x, t, row, target in zip(seen.x, seen.t, range(12), seen.target, strict=True):
            cond = model.embed([batch_of(1, 3).prompts[row // 4]])
            torch.testing.assert_close(target, guided(model, x[None], t[None], cond, None, TEACHER)[0])
            off = guided(model, x[None], t[None], seen.cond[row : row + 1], None, TEACHER)[0]
            torch.testing.assert_close(off, target)


@pytest.mark.parametrize("states", ROLLED)
def test_updates_share_out_all_states_and_their_gradients_are_of_the_mean_square(states):
    model, made = moved(), objective(states=states, updates=2)
    seen = collected(model, made)
    parts, losses = [], []
    for part in range(2):
        losses.append(made.update(model, seen, part, lent(model)))
        parts.append(gradient(model))
    (one,) = seen
    pred = model.predict(one.x, one.t, one.cond)
    whole = (pred - one.target).square().mean()
    (expected,) = torch.autograd.grad(whole, model.delta)
    torch.testing.assert_close(torch.stack(parts).mean(0), expected)
    assert sum(float(loss.total) for loss in losses) / 2 == pytest.approx(float(whole))
    assert float(losses[0].terms["error"]) == pytest.approx(float(losses[0].total))
    assert len({float(loss.total) for loss in losses}) == 2, "each update has states of its own"


def test_micro_batches_and_the_scale_of_a_loss_change_nothing_else():
    model = moved()
    found = []
    for size, scale in ((None, 1.0), (2, 1.0), (None, 8.0)):
        made = objective(states="student", micro_batch=size)
        tools = tools_of(model=model, rng=generator("noise"), scale=scale)
        loss = made.update(model, collected(model, made), 1, tools)
        found.append((gradient(model) / scale, loss.total, loss.terms["target"]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("states", [*ROLLED, "data"])
def test_a_student_that_does_what_the_teacher_does_has_no_loss(states):
    class Done(Drawing):
        def predict(self, x_t, t, cond):
            if not self.on:
                return super().predict(x_t, t, cond)
            with self.disable():
                away = self.embed(["small"] * len(cond))
                return guided(self, x_t, t, cond, away, TEACHER) + 0 * self.delta.sum()

    model, made = Done(), objective(states=states, negative_prompt="small")
    if states == "data":
        loss = made.loss(model, pictures(model), lent(model)).total
    else:
        loss = made.update(model, collected(model, made), 0, lent(model)).total
    assert float(loss) < 1e-24
    other = objective(states=states)
    if states == "data":
        assert float(other.loss(model, pictures(model), lent(model)).total) > 1e-3
    else:
        assert float(other.update(model, collected(model, other), 0, lent(model)).total) > 1e-3


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_of_pictures_the_noised_latents_are_learnt_from(prediction):
    model, made = moved(prediction), objective(states="data")
    batch = pictures(model)
    loss = made.loss(model, batch, lent(model))
    rng = generator("noise")
    x_0 = batch.data["image"]
    t = made.config.timesteps.draw(model, x_0.shape[1:], 3, rng)
    x_t = model.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=rng), t)
    with model.disable(), torch.no_grad():
        target = guided(model, x_t, t, model.embed(batch.prompts), None, TEACHER)
    pred = model.predict(x_t, t, model.embed(batch.prompts))
    torch.testing.assert_close(loss.total, (pred - target).square().mean())
    (found,) = torch.autograd.grad(loss.total, model.delta)
    (expected,) = torch.autograd.grad((pred - target).square().mean(), model.delta)
    torch.testing.assert_close(found, expected)


def test_a_teacher_that_remembers_is_learnt_along_its_own_rollouts():
    terms = [{"apg": {"scale": 3, "momentum": -0.5, "threshold": 1.0}}]
    model = moved()
    (with_it,) = map(in_order, collected(model, objective(jitter=False, cfg_scale=1, guidance=terms)))
    without = [{"apg": {"scale": 3, "momentum": 0.0, "threshold": 1.0}}]
    (alone,) = map(in_order, collected(model, objective(jitter=False, cfg_scale=1, guidance=without)))
    first = torch.arange(3) * 4
    torch.testing.assert_close(with_it.target[first], alone.target[first])
    assert (with_it.target[first + 1] - alone.target[first + 1]).abs().max() > 1e-4
    with pytest.raises(UserError, match="momentum"):
        objective(states="student", cfg_scale=1, guidance=terms).check(model, None)


def test_inner_steps_are_moved_together_and_the_ends_stay():
    start, end = torch.tensor([900, 600, 300, 0]), torch.tensor([-1])
    begin, ends = jittered(start, 0.5, end)
    assert begin.tolist() == [900, 750, 450, 150] and ends.tolist() == [750, 450, 150, -1]
    assert jittered(start, 0.0, end)[0].tolist() == start.tolist()
    whole = jittered(torch.tensor([9, 8, 7]), 0.99, end)[0]
    assert whole.tolist() == [9, 8, 7] and whole.dtype == start.dtype
    flow = jittered(torch.tensor([1000.0, 400.0]), 0.25, torch.tensor([-1.0]))[0]
    assert flow.tolist() == [1000.0, 550.0]


def test_what_was_distilled_is_written_down():
    terms = [{"rescale": 0.7}]
    told = json.loads(objective(guidance=terms).facts()["distilled_guidance"])
    assert told == {"cfg_scale": 3.0, "guidance": terms}
    told = json.loads(of_strengths().facts()["distilled_guidance"])
    assert told == {"w": [1.0, 8.0], "w_density": "uniform"}


# -- strengths that are told ------------------------------------------------------------------------------------------


def of_strengths(**options) -> CFGDistill:
    return build(Config(**{"steps": 4, "updates": 4, "w": [1.0, 8.0], **options}))


class Told(Drawing):
    """A student that makes what it is told, times `factor`, of both sides of the base."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def predict(self, x_t, t, cond):
        if not self.on:
            return super().predict(x_t, t, cond)
        w = self.factor * cond.extra["guidance"].double()[:, None, None, None]
        with self.disable():
            u, c = (self.predict(x_t, t, side) for side in (self.unconditional(len(cond)), cond))
        return (1 - w) * u + w * c + 0 * self.delta.sum()


@pytest.mark.parametrize("states", [*ROLLED, "data"])
def test_of_each_row_the_student_is_told_the_strength_that_its_teacher_has(states):
    """u and c are known of both, so the loss is 0, and with a strength that is off by a share the square of that."""

    def error(model) -> float:
        made = of_strengths(states=states)
        if states == "data":
            return float(made.loss(model, pictures(model), lent(model)).total)
        return sum(float(made.update(model, collected(model, made), i, lent(model)).total) for i in range(4)) / 4

    assert error(Told()) < 1e-11
    assert error(Told(1.1)) > 1e-4


@pytest.mark.parametrize("states", ROLLED)
def test_a_row_keeps_its_strength_from_step_to_step_and_its_targets_are_both_sides(states):
    model, made = moved(), of_strengths(states=states, jitter=False)
    (seen,) = collected(model, made)
    w = seen.cond.extra["guidance"].view(3, 4)
    assert torch.equal(w, w[:, :1].expand(3, 4)) and len({*w[:, 0].tolist()}) == 3
    assert ((w >= 1) & (w <= 8)).all()
    with model.disable(), torch.no_grad():
        for x, t, cond, target in zip(seen.x, seen.t, [seen.cond[i] for i in range(12)], seen.target, strict=True):
            u, c = (model.predict(x[None], t[None], one) for one in (model.unconditional(1), cond))
            torch.testing.assert_close(target, torch.cat([u, c]).to(target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("density", "other"), [("uniform", lambda w: 9 - w), ("log-uniform", lambda w: 8 / w)])
def test_each_state_is_learnt_at_the_strength_across_the_range_too(density, other):
    model, made = Heard(), of_strengths(w_density=density)
    seen = collected(model, made)
    states, own = seen[0].part(0, 4), seen[0].part(0, 4).cond.extra["guidance"]
    model.told.clear()
    found = made.update(model, seen, 0, lent(model))
    torch.testing.assert_close(torch.stack(model.told), torch.stack([own, other(own)]))
    u, c = states.target.double().unbind(1)
    with torch.no_grad():
        pred = model.predict(states.x, states.t, states.cond)
    wide = (own.double().view(-1, 1, 1, 1), other(own.double()).view(-1, 1, 1, 1))
    expected = torch.stack([(pred - u - w * (c - u)).square().mean() for w in wide]).mean()
    torch.testing.assert_close(found.total, expected, check_dtype=False)


class Heard(Drawing):
    """Keeps the strengths that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.move(0.3)
        self.told = []

    def predict(self, x_t, t, cond):
        if self.on and "guidance" in cond.extra:
            self.told.append(cond.extra["guidance"])
        return super().predict(x_t, t, cond)


def test_strengths_have_the_density_that_is_declared():
    quantiles = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    even = of_strengths(w=[2, 10])._strengths(quantiles)
    torch.testing.assert_close(even, torch.tensor([2.0, 4, 6, 10]).double())
    log = of_strengths(w=[1, 16], w_density="log-uniform")._strengths(quantiles)
    torch.testing.assert_close(log, torch.tensor([1.0, 2, 4, 16]).double())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"w": [8, 1]}, r"w must be \[least, most\], not \[8, 1\]: for one strength leave it out and set cfg_scale"),
        ({"w": [3, 3]}, "w must be"),
        ({"w": [3]}, "w must be"),
        ({"w": [0, 3], "w_density": "log-uniform"}, "log-uniform has no density"),
        ({"w": [1, 3], "cfg_scale": 5.0}, "cfg_scale has one of its own"),
        ({"w": [1, 3], "guidance": ["rescale"]}, "guidance has one of its own"),
    ],
)
def test_strengths_that_make_no_sense_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        Config(**options)


def test_a_model_that_is_told_its_guidance_is_no_base_unless_it_learns_that_now():
    model = tiny_model("sd")
    model.embed_guidance()
    of_strengths().check(model, None)
    model.blank = False
    for made in (of_strengths(), objective()):
        with pytest.raises(UserError, match="has guidance distilled into it already: train it as it is, or take one"):
            made.check(model, None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cfg_scale": 1.0}, "the teacher is not guided"),
        ({"cfg_scale": 1.0, "guidance": [{"cfg": 1}]}, "the teacher is not guided"),
        ({"states": "data", "cfg_scale": 1.0, "guidance": [{"apg": 3}]}, "momentum"),
    ],
)
def test_a_teacher_without_anything_to_teach_is_refused(options, told):
    with pytest.raises(UserError, match=told):
        objective(**options).check(Drawing(), None)


def test_more_updates_than_states_of_a_row_are_refused():
    with pytest.raises(ValueError, match="updates must be at most steps"):
        Config(steps=2, updates=3)
    Config(states="data", steps=2, updates=3)
