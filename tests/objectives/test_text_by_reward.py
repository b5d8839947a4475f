"""Text encoders trained by reward: TexForce (policy gradient) and TextCraftor (through the sampler)."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from tiny_online import batch_of, policy_trainer, tools_of
from tiny_rollout import rolled
from tiny_training import TinyRows, tiny_trainer

from visiontune import adapters, config
from visiontune.assemble.parts import attach_adapter, open_objective
from visiontune.diffusion.dynamics import DDIM
from visiontune.diffusion.guidance import classifier_free
from visiontune.diffusion.replay import replay
from visiontune.errors import UserError
from visiontune.objectives import alignprop, ddpo
from visiontune.objectives._online import conditions
from visiontune.objectives._policy import clipped_surrogate
from visiontune.rewards.base import FunctionReward

PROMPTS = ("a red circle", "a blue square")


def tuned(moved=True, where="text"):
    model = tiny_model("sd")
    torch.manual_seed(0)
    parts = model.of("text") if where == "text" else model.of("denoiser", "text")
    found = adapters.attach(
        parts, "lora", targets=["q_proj", "v_proj", "to_q"] if where != "text" else ["q_proj"]
    ).eval()
    if moved:
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.add_(0.05)
    return model, found


def force(**options):
    return ddpo.build(ddpo.Config(**{"steps": 3, "cfg_scale": 3.0, "group": 2, "tracker": 0} | options))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_encoder_gets_the_gradient_of_one_graph(micro_batch):
    model, found = tuned()
    tools = tools_of(text=True, reference=found.disable)
    built = force(micro_batch=micro_batch)
    rollouts = built.collect(model, batch_of(2, 2, PROMPTS), tools)
    drift = []
    built.require_ratio_one = lambda value, t: drift.append(value)
    built.update(model, rollouts, 0, tools)
    assert drift and not any(value.any() for value in drift)
    ours = {name: p.grad.clone() for name, p in found.named_parameters()}
    assert all(p.grad is None for p in model.denoiser.parameters())

    found.zero_grad()
    losses = []
    for chunk in rollouts.pieces[0]:
        cond, uncond = conditions(model, chunk.batch.prompts, classifier_free(3.0), text=True)
        now = replay(model, chunk.trajectory, cond=cond, uncond=uncond)
        losses.append(clipped_surrogate(now, chunk.trajectory.log_probs, chunk.advantages, 1e-4)[0])
    torch.cat(losses).mean().backward()
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-8)
        assert parameter.grad.any()


def test_the_gradient_is_that_of_finite_differences():
    model, found = tuned()
    tools, built = tools_of(text=True, reference=found.disable), force(clip=10.0)
    rollouts = built.collect(model, batch_of(2, 2, PROMPTS), tools)
    (chunk,) = rollouts.pieces[0]
    steps = built.timesteps(chunk, 0, tools)
    parameter = next(p for name, p in found.named_parameters() if name.endswith("up"))
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for step in (0.02, -0.02, 0.0):
        with torch.no_grad():
            parameter.add_(step * direction)
        found.zero_grad()
        values.append(float(built.gradients(model, chunk, steps, 1.0, False, tools)["loss"].double().sum()))
        with torch.no_grad():
            parameter.sub_(step * direction)
    slope = float((parameter.grad * direction).sum())
    assert slope == pytest.approx((values[0] - values[1]) / 0.04, rel=0.05)


def test_the_base_reads_prompts_with_its_own_encoder():
    for moved in (False, True):
        model, found = tuned(moved)
        tools = tools_of(text=True, reference=found.disable)
        built = force(kl_penalty=0.5)
        kl = float(built.collect(model, batch_of(2, 2, PROMPTS), tools).terms["kl"])
        assert (abs(kl) > 1e-8) is moved


def test_a_run_trains_the_encoder_and_nothing_else(tmp_path):
    model, found = tuned(moved=False, where="all")
    before = {name: value.clone() for name, value in found.tensors().items()}
    trainer = policy_trainer(
        tmp_path,
        force(),
        model=model,
        adapters=found,
        batch_size=4,
        steps=2,
        lr=1e-2,
        parts=["text"],
    )
    assert trainer.parameters and all(name.startswith("adapters.text_encoder.") for name in trainer.parameters)
    trainer.fit()
    moved = {name.partition(".")[0] for name, value in found.tensors().items() if not torch.equal(value, before[name])}
    assert moved == {"text_encoder"}


def test_without_the_denoiser_something_must_be_left(tmp_path):
    for old in ("denoiser", "text_encoder", "text_encoder_lr"):
        with pytest.raises(UserError, match=rf"train\.{old} is now train\.part"):
            config.parse_run({"name": "a", "adapter": "lora", "data": "x", "train": {old: False}})
    with pytest.raises(UserError, match="parts leaves nothing to train"):
        config.parse_run({"name": "a", "adapter": "lora", "data": "x", "train": {"parts": []}})
    model = tiny_model("sd")
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    with pytest.raises(UserError, match=r"train\.parts has 'text', but the adapter has no layer in it"):
        tiny_trainer(tmp_path, model=model, adapters=found, parts=["text"])
    model = tiny_model("sd")
    trainer = tiny_trainer(tmp_path, model=model, rows=TinyRows(model, embedded=False), parts=["text"])
    assert all(name.startswith("text_encoder.") for name in trainer.parameters)
    assert not any(p.requires_grad for p in model.denoiser.parameters())


@pytest.mark.parametrize("name", ["texforce", "textcraftor"])
def test_the_recipes_put_adapters_on_the_text_encoder_alone(name):
    run = config.load_run(f"reward_tune/{name}")
    found = attach_adapter(run, tiny_model("sd"), open_objective(run))
    assert found.layers and all(layer.startswith("text_encoder.") for layer in found.layers)


# --------------------------------------------------------------------------------------------------- TextCraftor


def craft(**options):
    return alignprop.build(alignprop.Config(**{"steps": 4, "cfg_scale": 3.0, "truncation": "full"} | options))


def bright():
    def squared(images, prompts, meta):
        return images.square().mean((1, 2, 3))

    squared.differentiable = True
    return FunctionReward(squared, "bright")


def gradients(built, model, found):
    found.zero_grad()
    loss = built.update(model, batch_of(1, 2, PROMPTS), 0, tools_of(bright(), text=True, reference=found.disable))
    return loss, [p.grad.clone() for p in found.parameters()]


@pytest.mark.parametrize("dynamics", ["ddim", {"name": "ddim", "eta": 1.0}])
def test_an_encoder_that_is_the_base_draws_the_same_pictures(dynamics):
    model, found = tuned(moved=False)
    plain, _ = gradients(craft(dynamics=dynamics, truncation="fixed", grad_steps=2), model, found)
    split, _ = gradients(craft(dynamics=dynamics, base_steps=2), model, found)
    assert torch.equal(plain.total, split.total)
    assert split.terms["grad_steps"] == 2


def test_the_first_steps_see_the_base_and_the_last_ones_the_trained_encoder():
    model, found = tuned()
    seen = []
    predict = model.predict
    model.predict = lambda x, t, cond: seen.append(cond.tokens.detach().clone()) or predict(x, t, cond)
    gradients(craft(base_steps=3), model, found)
    with torch.no_grad():
        trained = torch.cat([model.unconditional(2).tokens, model.embed(PROMPTS).tokens])
        with found.disable():
            base = torch.cat([model.unconditional(2).tokens, model.embed(PROMPTS).tokens])
    assert [torch.equal(s, base) for s in seen] == [True, True, True, False, False]
    assert all(torch.equal(s.sort(0).values, trained.sort(0).values) for s in seen[3:])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_gradient_with_first_steps_of_the_base_is_that_of_one_graph(eta):
    model, found = tuned()
    options = {"cfg_scale": 3.0, "dynamics": DDIM(eta=eta)}
    loss, ours = gradients(craft(base_steps=2, dynamics={"name": "ddim", "eta": eta}), model, found)

    found.zero_grad()
    generators, (start, end) = tools_of().generators(batch_of(1, 2, PROMPTS)), model.schedule.timesteps(4)
    with torch.no_grad(), found.disable():
        cond, uncond = model.embed(PROMPTS), model.unconditional(2)
        begun = rolled(model, cond, uncond=uncond, chain=(start[:2], end[:2]), generator=generators, **options)
    cond, uncond = model.embed(PROMPTS), model.unconditional(2)
    made = rolled(
        model,
        cond,
        uncond=uncond,
        chain=(start[2:], end[2:]),
        latents=begun.final,
        generator=generators,
        grad_steps=2,
        **options,
    )
    whole = -bright()((model.decode(made.final) / 2 + 0.5).clamp(0, 1), PROMPTS).mean()
    whole.backward()
    assert float(loss.total) == pytest.approx(float(whole.detach()), rel=1e-6)
    for one, parameter in zip(ours, found.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))
        assert one.any()


def test_steps_of_the_base_need_a_trained_encoder():
    with pytest.raises(UserError, match=r"train text encoders \(train\.parts\)"):
        craft(base_steps=2).check_text(False)
    craft(base_steps=2).check_text(True)
    for wrong in ({"base_steps": 4}, {"base_steps": 2, "grad_steps": 3}):
        with pytest.raises(ValueError, match="base_steps"):
            craft(**wrong)
