"""Reward back-propagation: its gradients against one graph written out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_model
from tiny_rollout import SD
from tiny_training import TinyModel, TinyReward

from visiontune.adapters import attach
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.schedule import Schedule
from visiontune.diffusion.transition import transition
from visiontune.errors import UserError
from visiontune.objectives._online import conditions, pixels, score
from visiontune.objectives.alignprop import Config, build
from visiontune.objectives.base import Tools, generator
from visiontune.schema import from_mapping

STEPS = 4
PROMPTS = ["a red cat", "a dog", "two birds in a tree", "a blue fish"]
FIXED = {"steps": STEPS, "cfg_scale": 3.0, "dynamics": {"name": "ddim", "eta": 0.6}}
EXACT = {"rtol": 1e-4, "atol": 1e-7}


class Model(TinyModel):
    """Counts the calls of the denoiser; its chain ends with a step that has an effect."""

    calls = 0

    def __init__(self, **scheduler):
        super().__init__()
        self.schedule = Schedule.from_scheduler(DDIMScheduler(**{**SD, **scheduler}))
        self.denoiser.requires_grad_(True)

    def predict(self, x_t, t, cond):
        self.calls += 1
        return super().predict(x_t, t, cond)


def batch(count=4):
    return PromptBatches(PROMPTS, count).batch(0)


def tools(**changes):
    return Tools(**{"reward": TinyReward(), "reference": lambda: None, "seed": 5, "index": 2, **changes})


def grads(model):
    found = [p.grad.clone() for m in (model.denoiser, model.encoder) for p in m.parameters() if p.grad is not None]
    model.denoiser.zero_grad()
    model.encoder.zero_grad()
    return found


def ours(model, given=None, lent=None, **options):
    """The loss of an update and the gradients that it leaves."""
    objective = build(Config(**{**FIXED, **options}))
    given, lent = given or batch(), lent or tools()
    with torch.no_grad():
        collected = objective.collect(model, given, lent)
    loss = objective.update(model, collected, 0, lent)
    return loss, grads(model)


def draws(rows, steps, *key):
    """The start and the noise of the steps, row by row."""
    made = []
    for row in rows.data["row"]:
        rng = generator(5, "row", 2, int(row), *key)
        made.append([torch.randn(4, 8, 8, generator=rng) for _ in range(steps + 1)])
    return [torch.stack(values) for values in zip(*made, strict=True)]


def chain_by_hand(model, x, noise, start, end, grad_steps, cond, uncond, dynamics):
    for i, (t, t_next) in enumerate(zip(start, end, strict=True)):
        if i == len(start) - grad_steps:
            x = x.detach()
        t, t_next = t.expand(len(x)), t_next.expand(len(x))
        without = model.predict(x, t, uncond)
        pred = without + FIXED["cfg_scale"] * (model.predict(x, t, cond) - without)
        mean, std = transition(model.schedule, pred, x, t, t_next, dynamics)
        x = mean + std * noise[i]
    return x


def loss_by_hand(x, rows, target=None):
    """As `TinyReward` of `TinyModel.decode` is defined, one row at a time."""
    rewards = []
    for latents, prompt in zip(x, rows.prompts, strict=True):
        picture = torch.tanh((latents[:3] + 0.5 * latents[3:]).repeat_interleave(2, 1).repeat_interleave(2, 2))
        place = torch.linspace(0.5, 1.5, picture.numel()).view(picture.shape)
        rewards.append(len(prompt) / 10 * (torch.sin(3 * (picture / 2 + 0.5)) * place).mean())
    rewards = torch.stack(rewards)
    return (-rewards if target is None else (rewards - target).abs()).mean(), rewards


def one_graph(model, grad_steps, rows=None, length=STEPS, target=None):
    rows = batch() if rows is None else rows
    dynamics = build(Config(**FIXED)).dynamics
    start, end = model.schedule.timesteps(STEPS)
    if length < STEPS:
        start, end = start[:length], end[:length].clone()
        end[-1] = -1
    first, *noise = draws(rows, length)
    cond, uncond = model.embed(rows.prompts), model.unconditional(len(rows))
    loss, rewards = loss_by_hand(
        chain_by_hand(model, first, noise, start, end, grad_steps, cond, uncond, dynamics), rows, target
    )
    loss.backward()
    return loss.detach(), rewards.detach(), grads(model)


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    assert any(value.abs().max() > 1e-4 for value in expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, **EXACT)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("truncation", "grad_steps", "window"), [("full", 1, STEPS), ("fixed", 1, 1), ("fixed", 3, 3)])
@pytest.mark.parametrize("target", [None, 0.4])
def test_gradients_are_those_of_one_graph(truncation, grad_steps, window, target):
    model = Model()
    expected, rewards, by_hand = one_graph(model, window, target=target)
    loss, found = ours(model, truncation=truncation, grad_steps=grad_steps, target=target)
    assert_close(found, by_hand)
    torch.testing.assert_close(loss.total, expected)
    assert not loss.total.requires_grad
    assert float(loss.terms["reward"]) == pytest.approx(float(rewards.mean()), rel=1e-5)
    assert float(loss.terms["reward_std"]) == pytest.approx(float(rewards.std(unbiased=False)), rel=1e-5)
    assert float(loss.terms["grad_steps"]) == window


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_nothing(size):
    model = Model()
    whole, expected = ours(model, truncation="full")
    cut, found = ours(model, truncation="full", micro_batch=size)
    assert_close(found, expected)
    for name, value in whole.terms.items():
        torch.testing.assert_close(cut.terms[name], value)
    torch.testing.assert_close(cut.total, whole.total)


def test_a_trained_text_encoder_gets_the_gradient_of_both_conditions():
    model = Model()
    model.encoder.requires_grad_(True)
    _, _, by_hand = one_graph(model, 3)
    assert by_hand[-1].abs().max() > 1e-5
    _, found = ours(model, lent=tools(text=True), truncation="fixed", grad_steps=3, micro_batch=3)
    assert_close(found, by_hand)
    _, without = ours(model, truncation="fixed", grad_steps=3)
    assert len(without) == len(by_hand) - 1


def test_text_adapters_learn_through_a_real_encoder_with_copies():
    """The encoder's graph is gone after one backward pass, so what all copies found must go through it at once."""
    model = tiny_model("sd")
    adapters = attach(model.of("denoiser", "text"), "lora", targets=["to_q", "q_proj"]).eval()
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))
    options = {"truncation": "fixed", "copies": 2, "steps": 2, "cfg_scale": 2.0}
    objective = build(Config(**options))
    objective.update(model, batch(2), 0, tools(text=True))
    assert all(parameter.grad.any() for parameter in adapters.parameters())
    assert {name.partition(".")[0] for name in adapters.tensors()} == {"text_encoder", "unet"}


def test_the_loss_scale_is_on_the_gradients_alone():
    model = Model()
    plain, expected = ours(model, truncation="full", micro_batch=3)
    scaled, found = ours(model, lent=tools(scale=256.0), truncation="full", micro_batch=3)
    assert_close([value / 256 for value in found], expected)
    torch.testing.assert_close(scaled.total, plain.total)
    assert scaled.terms["reward"] == plain.terms["reward"]


# ---------------------------------------------------------------------------------------------------- DRaFT-LV, ReFL


def test_copies_average_the_gradients_of_the_last_step_from_ends_noised_again():
    model, copies = Model(), 3
    rows, dynamics = batch(), build(Config(**FIXED)).dynamics
    start, end = model.schedule.timesteps(STEPS)
    first, *noise = draws(rows, STEPS)
    cond, uncond = model.embed(rows.prompts), model.unconditional(4)
    with torch.no_grad():
        final = chain_by_hand(model, first, noise, start, end, 1, cond, uncond, dynamics)
    _, _, total = one_graph(model, 1)
    rewards = [loss_by_hand(final, rows)[1]]
    for copy in range(1, copies):
        again, step = draws(rows, 1, "copy", copy)
        x = model.schedule.add_noise(final, again, start[-1].expand(4)).detach()
        x = chain_by_hand(model, x, [step], start[-1:], end[-1:], 1, cond, uncond, dynamics)
        loss, found = loss_by_hand(x, rows)
        loss.backward(retain_graph=True)
        rewards.append(found.detach())
        independent = grads(model)
        assert not torch.allclose(independent[0], total[0] / copy, rtol=1e-2)
        total = [one + two for one, two in zip(total, independent, strict=True)]
    loss, found = ours(model, truncation="fixed", copies=copies)
    assert_close(found, [value / copies for value in total])
    assert float(loss.terms["reward"]) == pytest.approx(float(torch.stack(rewards).mean()), rel=1e-5)
    one, plain = ours(model, truncation="fixed", copies=1), one_graph(model, 1)
    assert_close(one[1], plain[2])


def test_an_early_end_comes_where_it_may():
    objective = build(Config(**FIXED, truncation="early_end", earliest=0.5))
    assert {objective.draw(generator(i)) for i in range(50)} == {(2, 1), (3, 1), (4, 1)}


@pytest.mark.parametrize("length", [2, 3, 4])
def test_an_early_end_is_one_step_from_a_cut_chain_to_a_clean_picture(length):
    model, objective = Model(), build(Config(**FIXED, truncation="early_end"))
    objective.draw = lambda rng: (length, 1)
    objective.update(model, batch(), 0, tools())
    assert_close(grads(model), one_graph(model, 1, length=length)[2])


def test_an_early_end_gives_the_clean_picture_that_the_prediction_implies():
    model, objective = Model(set_alpha_to_one=True), build(Config(steps=STEPS, truncation="early_end"))
    start, end = objective.chain(model, 2)
    assert start.tolist() == model.schedule.timesteps(STEPS)[0][:2].tolist() and end.tolist() == [*start[1:], -1]
    x, pred = torch.randn(2, 1, 4, 8, 8, generator=generator(0))
    mean, _ = transition(model.schedule, pred, x, start[1:], end[1:], objective.dynamics)
    torch.testing.assert_close(mean, model.schedule.to_x_0(pred, x, start[1:]))


# ---------------------------------------------------------------------------------------------------- the window


def drawn(count=400, **options):
    objective = build(Config(**{**FIXED, "steps": 10, **options}))
    return torch.tensor([objective.draw(generator(i))[1] for i in range(count)]).double()


def test_windows_are_drawn_as_the_names_say():
    uniform = drawn(truncation="uniform")
    assert set(uniform.tolist()) == set(range(1, 11))
    assert float(uniform.mean()) == pytest.approx(5.5, abs=0.5)
    assert set(drawn(truncation="uniform", grad_steps=7).tolist()) == {7, 8, 9, 10}
    normal = drawn(2000, truncation="normal", grad_steps=20, steps=40)
    assert float(normal.mean()) == pytest.approx(20, abs=0.5)
    assert float(normal.std()) == pytest.approx(5, abs=0.5)
    # What falls outside is drawn again, so the ends are not crowded.
    low = drawn(2000, truncation="normal", grad_steps=1, steps=10)
    assert low.min() == 1 and float((low == 1).double().mean()) < 0.2


def test_the_window_is_that_of_the_rollout_in_every_process_and_micro_batch():
    model = Model()
    windows = {float(ours(model, lent=tools(rank=r, world=2))[0].terms["grad_steps"]) for r in (0, 1)}
    assert len(windows) == 1
    several = {float(ours(model, lent=tools(index=i))[0].terms["grad_steps"]) for i in range(8)}
    assert len(several) > 1


def test_rows_depend_on_their_number_alone():
    """A second process's rows are those that one process would have at their place."""
    model = Model()
    whole, expected = ours(model, truncation="full")
    parts = [PromptBatches(PROMPTS, 2, rank=rank, world=2).batch(0) for rank in (0, 1)]
    found = [ours(model, part, truncation="full") for part in parts]
    assert_close([(one + two) / 2 for one, two in zip(found[0][1], found[1][1], strict=True)], expected)
    torch.testing.assert_close((found[0][0].total + found[1][0].total) / 2, whole.total)


def test_logged_rewards_are_those_of_all_processes():
    model = Model()
    lent = tools(gather=lambda value: torch.cat([value, value + 1]))
    loss, _ = ours(model, lent=lent)
    alone, _ = ours(model)
    assert float(loss.terms["reward"]) == pytest.approx(float(alone.terms["reward"]) + 0.5, rel=1e-5)
    assert float(loss.terms["reward_std"]) > 0.5


# ---------------------------------------------------------------------------------------------------- refusals


class Blind(TinyReward):
    name = "blind"
    differentiable = False


class Groupwise(TinyReward):
    name = "groupwise"
    groupwise = True


IDENTITY = {"steps_offset": 0}  # with set_alpha_to_one=False the last DDIM step changes nothing


@pytest.mark.parametrize(
    ("options", "reward", "scheduler", "words"),
    [
        ({}, None, {}, "needs a reward: add for instance reward=pocket-clip"),
        ({}, Blind(), {}, "reward 'blind' is not differentiable.*objective=ddpo"),
        ({"micro_batch": 2}, Groupwise(), {}, r"'groupwise' compares .*micro_batch"),
        ({"dynamics": "flow-ode"}, TinyReward(), {}, "flow-ode"),
        ({"truncation": "fixed"}, TinyReward(), IDENTITY, r"no influence.*\(t = 0\).*raise grad_steps.*trailing"),
        ({"truncation": "uniform"}, TinyReward(), IDENTITY, "raise grad_steps"),
        ({"truncation": "normal", "grad_steps": 3}, TinyReward(), IDENTITY, "no influence"),
        ({"truncation": "early_end"}, TinyReward(), IDENTITY, "no influence"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(options, reward, scheduler, words):
    model = Model(**scheduler)
    with pytest.raises(UserError, match=words) as caught:
        build(Config(**{**FIXED, "dynamics": "ddim", **options})).check(model, reward)
    assert model.calls == 0 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "scheduler"),
    [
        ({"truncation": "fixed", "grad_steps": 2}, IDENTITY),
        ({"truncation": "uniform", "grad_steps": 2}, IDENTITY),
        ({"truncation": "full"}, IDENTITY),
        ({"truncation": "fixed"}, {**IDENTITY, "timestep_spacing": "trailing"}),
        ({"truncation": "early_end"}, {}),
    ],
)
def test_what_the_refusal_advises_is_taken(options, scheduler):
    model = Model(**scheduler)
    build(Config(**{**FIXED, "dynamics": "ddim", **options})).check(model, TinyReward())
    assert any(value.abs().max() > 0 for value in ours(model, dynamics="ddim", **options)[1])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"copies": 0},
        {"grad_steps": 0},
        {"steps": 3, "grad_steps": 4},
        {"earliest": 1.0},
        {"copies": 2},
        {"copies": 2, "truncation": "fixed", "grad_steps": 2},
        {"micro_batch": 0},
    ],
)
def test_impossible_options(options):
    with pytest.raises(UserError):
        from_mapping(Config, options)


def test_an_unknown_dynamics_is_named():
    with pytest.raises(UserError, match="ddmp"):
        Config(dynamics="ddmp")


# ---------------------------------------------------------------------------------------------------- shared parts


def test_conditions_have_a_graph_only_for_trained_encoders():
    model = Model()
    model.encoder.requires_grad_(True)
    cond, uncond = conditions(model, PROMPTS, classifier_free(3.0), text=True)
    assert cond.tokens.requires_grad and uncond.tokens.requires_grad
    cond, uncond = conditions(model, PROMPTS, classifier_free(1.0), text=False)
    assert not cond.tokens.requires_grad and uncond is None


def test_pictures_are_in_the_range_of_rewards_and_pass_gradients():
    model = Model()
    latents = (3 * torch.randn(2, 4, 8, 8, generator=generator(1))).requires_grad_()
    made = pixels(model, latents)
    assert made.shape == (2, 3, 16, 16) and 0 <= made.min().item() < made.max().item() <= 1
    torch.testing.assert_close(made, model.decode(latents) / 2 + 0.5)
    made.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_rewards_are_told_the_prompts_and_their_numbers():
    seen = {}

    class Asks(TinyReward):
        def score(self, images, prompts, meta):
            seen.update(prompts=prompts, meta=meta)
            return super().score(images, prompts, meta)

    rows = batch()[1:3]
    assert list(score(tools(reward=Asks()), torch.rand(2, 3, 16, 16), rows)) == ["reward"]
    assert seen["prompts"] == rows.prompts
    assert [PROMPTS[m["prompt_id"]] for m in seen["meta"]] == rows.prompts
