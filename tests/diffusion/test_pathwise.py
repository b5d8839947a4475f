"""Reward gradients through the chain: finite differences, and three ways to compute them that must be one."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_model
from tiny_rollout import SD, TinyModel, noises, prompts, rolled, start
from torch.autograd.graph import saved_tensors_hooks

from visiontune.adapters import attach
from visiontune.diffusion.dynamics import CPS, DDIM, FlowODE, FlowSDE
from visiontune.diffusion.pathwise import backpropagate, end_gradient, into_conditions
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError

STEPS = 5
FAR = {"steps": STEPS, "cfg_scale": 3.0, "dynamics": DDIM(eta=0.6)}
WAYS = ("plain", "checkpointed", "deferred")


def loss(x):
    """A reward that treats no two values alike."""
    place = torch.linspace(0.5, 1.5, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return (torch.sin(x) * place).square().mean()


def options(grad_steps=STEPS, **changed):
    merged = {**FAR, "latents": start(), "grad_steps": grad_steps, **changed}
    if merged["dynamics"].stochastic:
        merged["noise"] = noises(merged["steps"])
    return merged


def gradients(model, way, objective=loss, **kwargs):
    """Gradients of the denoiser's parameters and the final latents."""
    model.zero_grad()
    with torch.no_grad():
        cond = model.embed(prompts())
        uncond = model.unconditional(3)
    made = rolled(
        model,
        cond,
        uncond=uncond,
        checkpoint=way == "checkpointed",
        deferred=way == "deferred",
        **options(**kwargs),
    )
    if way == "deferred":
        assert not made.final.requires_grad
        backpropagate(model, made, end_gradient(made.final, objective)[1])
    else:
        objective(made.final).backward()
    return [p.grad.clone() for p in model.denoiser()], made.final.detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("schedule", "dynamics"),
    [
        (None, DDIM()),
        (None, DDIM(eta=0.6)),
        (None, CPS(eta=0.5)),
        (Schedule.flow(shift=2.0), FlowODE()),
        (Schedule.flow(), FlowSDE(eta=0.4)),
    ],
    ids=lambda v: getattr(v, "name", getattr(v, "prediction", "eps")),
)
def test_gradients_are_those_of_finite_differences(way, schedule, dynamics):
    model = TinyModel(schedule)
    grads, _ = gradients(model, way, dynamics=dynamics)
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.denoiser()]

    def value(step):
        with torch.no_grad():
            for p, d in zip(model.denoiser(), direction, strict=True):
                p.add_(step * d)
            final = rolled(model, model.embed(prompts()), **options(0, dynamics=dynamics)).final
            for p, d in zip(model.denoiser(), direction, strict=True):
                p.sub_(step * d)
            return float(loss(final))

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    along = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    assert abs(along) > 1e-4
    assert abs(along - expected) < 1e-6 * abs(expected)


@pytest.mark.parametrize(
    "grad_steps",
    [1, 3, STEPS, torch.tensor([0, 1, 0, 1, 0]), torch.tensor([1, 0, 1, 1, 1])],
    ids=["last", "last-3", "all", "two", "mask"],
)
def test_checkpointed_and_deferred_gradients_are_the_plain_ones_exactly(grad_steps):
    model = TinyModel()
    expected, final = gradients(model, "plain", grad_steps=grad_steps)
    assert any(g.abs().sum() > 0 for g in expected)
    for way in WAYS[1:]:
        ours, reached = gradients(model, way, grad_steps=grad_steps)
        assert torch.equal(reached, final)
        for one, two in zip(ours, expected, strict=True):
            assert torch.equal(one, two), way


def by_hand(model, constant, grad_steps):
    """The chain written out, where `constant(i)` says whether the prediction of step i is detached."""
    model.zero_grad()
    x, chain = start(), model.schedule.timesteps(STEPS)
    with torch.no_grad():
        cond, uncond = model.embed(prompts()), model.unconditional(3)
    for i in range(STEPS):
        t, t_next = (v[i].expand(3) for v in chain)
        if i == STEPS - grad_steps:
            x = x.detach()
        without = model.predict(x, t, uncond)
        pred = without + 3.0 * (model.predict(x, t, cond) - without)
        mean, std = transition(model.schedule, pred.detach() if constant(i) else pred, x, t, t_next, DDIM(eta=0.6))
        x = mean + std * noises(STEPS)[:, i]
    loss(x).backward()
    return [p.grad.clone() for p in model.denoiser()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad_steps", [1, 2, 4])
def test_a_truncated_gradient_is_that_of_a_detached_graph(way, grad_steps):
    model = TinyModel()
    expected = by_hand(model, lambda i: False, grad_steps)
    for one, two in zip(gradients(model, way, grad_steps=grad_steps)[0], expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("way", WAYS)
def test_outside_a_mask_the_prediction_is_a_constant(way):
    model, mask = TinyModel(), torch.tensor([False, True, False, True, False])
    expected = by_hand(model, lambda i: not mask[i], STEPS - 1)
    for one, two in zip(gradients(model, way, grad_steps=mask)[0], expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_the_result_does_not_depend_on_what_is_differentiated():
    model = TinyModel()
    finals = [gradients(model, "plain", grad_steps=k)[1] for k in (1, 3, STEPS)]
    finals.append(rolled(model, model.embed(prompts()), **options(0)).final.detach())
    assert all(torch.equal(final, finals[0]) for final in finals)


class Alive:
    """Counts the tensors that graphs hold: those saved in all, and the most at one time."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        if not tensor.numel():
            return Holder([tensor])  # torch 2.11 marks each checkpoint by one
        self.now += 1
        self.peak = max(self.peak, self.now)
        box = [tensor]
        holder = Holder(box)
        weakref.finalize(holder, self.drop)
        return holder

    def drop(self):
        self.now -= 1


class Holder:
    def __init__(self, box):
        self.box = box


def held(way, steps):
    counter = Alive()
    with saved_tensors_hooks(counter.pack, lambda holder: holder.box[0]):
        gradients(TinyModel(), way, grad_steps=steps, steps=steps)
    return counter.peak


def test_graphs_do_not_grow_with_the_chain_unless_plain():
    assert held("plain", 12) > 2.5 * held("plain", 4)
    # A checkpoint holds what it starts from: one latent a step.
    assert held("checkpointed", 12) - held("checkpointed", 4) == 12 - 4
    assert held("deferred", 12) == held("deferred", 4) > 0


def test_the_graph_of_the_reward_is_gone_before_the_walk():
    counter, x = Alive(), start()
    with saved_tensors_hooks(counter.pack, lambda holder: holder.box[0]):
        value, grad = end_gradient(x, loss)
    assert counter.peak > 0
    assert counter.now == 0
    assert not x.requires_grad and not value.requires_grad
    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    assert torch.equal(grad, expected)
    with pytest.raises(ValueError, match="does not depend on the latents"):
        end_gradient(x, lambda _: torch.ones((), requires_grad=True))


def test_the_walk_needs_no_gradient_mode_and_adds_to_what_is_there():
    model = TinyModel()
    expected, _ = gradients(model, "deferred")
    with torch.no_grad():
        made = rolled(model, model.embed(prompts()), deferred=True, **options())
        at_end = end_gradient(made.final, loss)[1]
        found = backpropagate(model, made, at_end)
    for parameter, one in zip(model.denoiser(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * one, rtol=1e-12, atol=0)
    assert found.cond is None and found.uncond is None


def test_gradients_of_the_start():
    model, begin = TinyModel(), start().requires_grad_()
    cond = model.embed(prompts())
    final = rolled(model, cond, **options(latents=begin)).final
    (expected,) = torch.autograd.grad(loss(final), begin)
    made = rolled(model, cond, deferred=True, **options())
    assert torch.equal(backpropagate(model, made, end_gradient(made.final, loss)[1]).latents, expected)


@pytest.mark.parametrize("grad_steps", [2, STEPS])
def test_a_text_encoder_gets_its_gradient(grad_steps):
    model = TinyModel()
    loss(rolled(model, model.embed(prompts()), **options(grad_steps)).final).backward()
    expected = model.text.weight.grad.clone()
    model.zero_grad()
    cond, uncond = model.embed(prompts()), model.unconditional(3)
    made = rolled(model, cond, uncond=uncond, deferred=True, **options(grad_steps))
    found = backpropagate(model, made, end_gradient(made.final, loss)[1], conditions=True)
    assert model.text.weight.grad is None
    into_conditions(cond, found.cond)
    into_conditions(uncond, found.uncond)
    torch.testing.assert_close(model.text.weight.grad, expected, rtol=1e-12, atol=1e-15)
    assert expected.abs().sum() > 0
    into_conditions(made.cond, found.cond)
    into_conditions(cond, None)


def test_a_window_may_be_chosen_after_sampling():
    model = TinyModel()
    expected, _ = gradients(model, "plain", grad_steps=2)
    model.zero_grad()
    made = rolled(model, model.embed(prompts()), **options(0, history=True))
    at_end = end_gradient(made.final, loss)[1]
    with pytest.raises(ValueError, match="no step to differentiate"):
        backpropagate(model, made, at_end)
    model.zero_grad()
    backpropagate(model, made, at_end, window=2)
    assert all(torch.equal(p.grad, one) for p, one in zip(model.denoiser(), expected, strict=True))


@pytest.mark.parametrize("method", ["lora", "oft", "boft", "sara", "svfit"])
@pytest.mark.parametrize("way", WAYS[1:])
def test_adapters_and_their_caches_serve_all_ways(method, way):
    model = tiny_model("sd")
    chosen = {"oft": {"block_size": 4}, "boft": {"block_size": 4, "factors": 1}, "sara": {"budget": 0.1}}
    adapters = attach(
        {"unet": model.denoiser}, method, targets="all", presets=model.presets(), **chosen.get(method, {})
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    cond = model.embed(["a red circle", "a blue square"])

    def run(way):
        adapters.zero_grad()
        made = rolled(
            model,
            cond,
            cfg_scale=2.0,
            steps=3,
            grad_steps=2,
            generator=torch.Generator().manual_seed(0),
            checkpoint=way == "checkpointed",
            deferred=way == "deferred",
        )
        if way == "deferred":
            backpropagate(model, made, end_gradient(made.final, lambda x: loss(model.decode(x)))[1])
        else:
            loss(model.decode(made.final)).backward()
        return [p.grad.clone() for p in adapters.parameters()]

    expected = run("plain")
    # Twice: the second run finds every cache filled.
    for _ in range(2):
        for one, two in zip(run(way), expected, strict=True):
            assert (one - two).norm() <= 1e-4 * two.norm() + 1e-9
    assert any(g.abs().sum() > 0 for g in expected)


IDENTITY = {**SD, "steps_offset": 0}  # with set_alpha_to_one=False the last step goes from level 0 to level 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_window_without_effect_is_refused_before_sampling(deferred, prediction):
    model = TinyModel(Schedule.from_scheduler(DDIMScheduler(prediction_type=prediction, **IDENTITY)))
    cond = model.embed(prompts())
    remedy = "raise grad_steps, or give the model's scheduler timestep_spacing=trailing"
    with pytest.raises(UserError, match=rf"no influence at the steps to differentiate \(t = 0\).*{remedy}"):
        rolled(model, cond, deferred=deferred, **options(1))
    assert model.calls == 0
    rolled(model, cond, deferred=deferred, **options(2))
    rolled(model, cond, **options(0))
    with torch.no_grad():
        made = rolled(model, cond, history=True, **options(1))
    with pytest.raises(UserError, match="no influence"):
        backpropagate(model, made, torch.ones_like(made.final))


@pytest.mark.parametrize(
    "mend",
    [{"steps_offset": 1}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}],
    ids=lambda m: next(iter(m)),
)
def test_each_mend_of_the_message_helps(mend):
    model = TinyModel(Schedule.from_scheduler(DDIMScheduler(**{**IDENTITY, **mend})))
    assert gradients(model, "plain", grad_steps=1)[0][0].abs().sum() > 0


def test_rounding_and_wrong_windows_are_refused():
    model = TinyModel()
    cond = model.embed(prompts())
    with pytest.raises(ValueError, match="give no dtype"):
        rolled(model, cond, dtype=torch.bfloat16, **options())
    with pytest.raises(ValueError, match="a gradient mask of shape"):
        rolled(model, cond, **options(torch.tensor([True])))
    with pytest.raises(ValueError, match="must not be negative"):
        rolled(model, cond, **options(-1))


def test_a_start_that_requires_a_gradient_gets_none_from_a_truncated_chain():
    model = TinyModel()
    cond = model.embed(prompts())
    for grad_steps in (0, 2):
        begin = start().requires_grad_()
        final = rolled(model, cond, **options(grad_steps, latents=begin)).final
        assert final.requires_grad == (grad_steps > 0)
        if final.requires_grad:
            loss(final).backward()
        assert begin.grad is None
