"""Consistency distillation: the function that is learnt, what it is held to, and that stock samplers draw with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from tiny import save_tiny, tiny_model, tiny_pipe
from tiny_online import PROMPTS, SCHEDULES, Drawing, batch_of, gradient, tools_of
from tiny_rollout import SD

from visiontune import adapters
from visiontune.cli.main import main
from visiontune.core import Condition, Request
from visiontune.diffusion.guidance import CFG, guided
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.models.pipeline import own_generator
from visiontune.objectives.base import generator
from visiontune.objectives.consistency import Config, Consistency, build, consistency
from visiontune.sampling.pipeline import images

OPTIONS = {"steps": 4, "updates": 4, "cfg_scale": 3.0, "jitter": False}
TEACHER = CFG(scale=3.0)
TABLES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def objective(**options) -> Consistency:
    return build(Config(**{**OPTIONS, **options}))


def moved(prediction="eps") -> Drawing:
    model = Drawing(prediction)
    model.move(0.3)
    return model


def lent(model, **changed):
    return tools_of(model=model, rng=generator("noise"), **changed)


@torch.no_grad()
def collected(model, made, tools):
    return made.collect(model, batch_of(1, 3), tools)


@pytest.mark.parametrize("prediction", TABLES)
def test_the_function_is_what_the_stock_sampler_takes_it_for(prediction):
    stock = LCMScheduler(prediction_type=TABLES[prediction], clip_sample=False)
    schedule = Schedule.from_scheduler(DDIMScheduler(prediction_type=TABLES[prediction], **SD))
    stock.set_timesteps(50)
    rng = generator("x")
    for t in (999, 499, 19):
        x, pred = (torch.randn(1, 2, 4, 4, generator=rng) for _ in range(2))
        stock._step_index = None
        expected = stock.step(pred, torch.tensor(t), x, generator=rng).denoised
        torch.testing.assert_close(consistency(schedule, pred, x, torch.tensor([t])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_where_there_is_no_noise_it_changes_nothing(prediction):
    x, pred = (torch.randn(2, 2, 4, 4, generator=generator(name)) for name in ("x", "pred"))
    found = consistency(SCHEDULES[prediction], pred, x, torch.tensor([-1, 0]))
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x[1])


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_states_lead_along_the_path_of_the_guided_base(prediction):
    model = moved(prediction)
    (seen,) = collected(model, objective(), lent(model))
    assert sorted({float(t) for t in seen.t}, reverse=True)[0] == (1000 if prediction == "flow" else 999)
    with model.disable(), torch.no_grad():
        pred = guided(model, seen.x, seen.t, seen.cond, None, TEACHER)
    x_0, eps = (to(pred, seen.x, seen.t) for to in (model.schedule.to_x_0, model.schedule.to_eps))
    expected = model.schedule.add_noise(x_0, eps, seen.end)
    torch.testing.assert_close(seen.target.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_of_pictures_a_step_of_the_teacher_leads_to_the_target(prediction):
    model = moved(prediction)
    t = torch.tensor([900, 100]) if prediction == "eps" else torch.tensor([900.0, 100.0])
    x_t = torch.randn(2, 2, 4, 4, generator=generator("x"))
    cond = model.embed(PROMPTS[:2])
    with torch.no_grad(), model.disable():
        seen = objective().step(model, x_t, t, cond)
        pred = guided(model, x_t, t, cond, None, TEACHER)
    assert seen.end.tolist() == [650, -1]
    x_0, eps = (to(pred, x_t, t) for to in (model.schedule.to_x_0, model.schedule.to_eps))
    torch.testing.assert_close(seen.target, model.schedule.add_noise(x_0, eps, seen.end).to(seen.target))


def test_the_gradient_is_of_the_first_function_alone():
    model, made = moved(), objective(updates=1, huber=0.1)
    tools = lent(model, scale=4.0)
    (seen,) = states = collected(model, made, tools)
    loss = made.update(model, states, 0, tools)
    found = gradient(model) / 4
    with torch.no_grad():
        far = model.predict(seen.target, seen.end.clamp(min=0), seen.cond)
        goal = consistency(model.schedule, far, seen.target, seen.end)
    pred = consistency(model.schedule, model.predict(seen.x, seen.t, seen.cond), seen.x, seen.t)
    expected = (((pred - goal) ** 2 + 0.01).sqrt() - 0.1).mean()
    (whole,) = torch.autograd.grad(expected, model.delta)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(loss.total, expected.detach().float(), check_dtype=False)
    assert torch.equal(goal[seen.end < 0], seen.target[seen.end < 0].to(goal))


class OnePicture(Drawing):
    """Knows one picture, which is the end of every path."""

    def __init__(self) -> None:
        super().__init__("flow")

    def predict(self, x_t, t, cond: Condition):
        return (x_t.double() - 0.3) / (t.double() / 1000).clamp(min=1e-3).view(-1, 1, 1, 1) + 0 * self.delta.sum()


def test_a_function_that_is_consistent_has_no_loss():
    model, made = OnePicture(), objective(states="teacher")
    tools = lent(model)
    assert float(made.update(model, collected(model, made, tools), 0, tools).total) < 1e-5


def test_micro_batches_change_nothing():
    found = []
    for size in (None, 1):
        model, made = moved(), objective(micro_batch=size)
        made.update(model, collected(model, made, lent(model)), 1, lent(model))
        found.append(gradient(model))
    torch.testing.assert_close(*found)


def test_how_it_is_to_be_drawn_is_written_down():
    facts = {name: json.loads(told) for name, told in objective(few_steps=2).facts().items()}
    assert facts["few_steps"] == {"steps": 2, "scheduler": "lcm"}
    assert facts["distilled_guidance"] == {"cfg_scale": 3.0}


def test_a_path_with_noise_is_refused_and_so_are_more_updates_than_states():
    with pytest.raises(UserError, match=r"dynamics 'ddim' adds noise: set objective\.dynamics=ddim"):
        objective(dynamics={"name": "ddim", "eta": 1.0}).check(Drawing(), None)
    with pytest.raises(ValueError, match="updates must be at most steps"):
        Config(steps=2, updates=3)


def test_an_exported_adapter_draws_with_the_stock_sampler(tmp_path):
    model = tiny_model("sd")
    made = adapters.attach(model.of("denoiser"), "lora", targets="attention", presets=model.presets())
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator("weights", number)))
    together = images(model, ["a blue square", "a red circle"], 3, steps=2, cfg_scale=1.0, scheduler="lcm")
    file = made.save(tmp_path / "adapter.safetensors", {"base_model": str(save_tiny(tmp_path / "base"))})
    ours = images(model, ["a red circle"], 3, steps=2, cfg_scale=1.0, scheduler="lcm")
    assert np.abs(together[1].astype(float) - ours[0]).max() <= 1
    assert main(["export", str(file), str(tmp_path / "lora.safetensors"), "--format", "diffusers"]) == 0
    stock = tiny_pipe("sd")
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    rng = own_generator(Request(prompt="a red circle", seed=3))
    latents = torch.randn(1, *model.latent_shape(), generator=rng)
    drawn = stock(
        ["a red circle"], num_inference_steps=2, guidance_scale=1.0, latents=latents, generator=rng, output_type="np"
    ).images
    assert np.abs(ours.astype(float) - (drawn * 255).round()).max() <= 1
