"""The loss of pairs: identities, its gradient, what is shared between the pictures, and both objectives in a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from tiny_online import PROMPTS, SCHEDULES, Drawing, batch_of, brightness, gradient, most_held, tools_of

from visiontune import adapters, config
from visiontune.assemble import train
from visiontune.core import Batch
from visiontune.data.prompts import PromptBatches
from visiontune.errors import UserError
from visiontune.objectives import dpo_online
from visiontune.objectives._draw import draw
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.diffusion_dpo import Config, build, preference
from visiontune.rewards.base import as_reward
from visiontune.schema import from_mapping
from visiontune.training.config import TrainConfig
from visiontune.training.loop import Trainer

GROUP = 4


def prepared(model, **options):
    return build(Config(**options))


def lent(model, seed) -> Tools:
    return Tools(rng=generator(seed), reference=model.disable)


def pair_batch(rows=4, seed=0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x_0, worse = torch.randn(2, rows, 2, 4, 4, generator=rng, dtype=torch.float64)
    return Batch(
        prompts=[PROMPTS[i % 3] for i in range(rows)],
        data={"image": x_0, "rejected": worse},
        cond=None,
        weight=torch.ones(rows),
        prior=torch.zeros(rows, dtype=torch.bool),
        ids=[str(i) for i in range(rows)],
    )


def swapped(batch):
    return replace(batch, data={"image": batch.data["rejected"], "rejected": batch.data["image"]})


def error_gap(objective, model, batch, seed=1):
    """mean(e_w - e_l), as the loss draws its noise."""
    rng = generator(seed)
    t, eps = objective.noised(model, batch.data["image"], batch, Tools(rng=rng))
    errors = objective.both(model, batch.data["image"], batch.data["rejected"], eps, t, model.embed(batch.prompts))
    return (errors[0] - errors[1]).mean()


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_at_the_base_the_loss_is_log_two_and_the_gradient_that_of_the_errors(prediction):
    model, batch = Drawing(prediction), pair_batch()
    objective = prepared(model, beta=30.0)
    loss = objective.loss(model, batch, lent(model, 1))
    assert float(loss.total.detach()) == pytest.approx(math.log(2), rel=1e-12)
    assert float(loss.terms["accuracy"]) == 0
    loss.total.backward()
    found = gradient(model)
    (30.0 / 4 * error_gap(objective, model, batch)).backward()
    torch.testing.assert_close(found, gradient(model), rtol=1e-10, atol=1e-14)
    assert model.on


def test_the_loss_is_its_definition_against_an_untouched_copy():
    model, untouched, batch = Drawing(), Drawing(), pair_batch()
    model.move(0.3)
    objective = prepared(model, beta=3.0, sft_weight=0.2)
    loss = objective.loss(model, batch, lent(model, 1))
    rng = generator(1)
    t = (torch.rand(4, generator=rng, dtype=torch.float64) * 1000).long()
    eps = torch.randn(4, 2, 4, 4, generator=rng)
    cond = model.embed(batch.prompts)

    def errors(net, x_0):
        return (net.predict(model.schedule.add_noise(x_0, eps, t), t, cond) - eps).square().mean((1, 2, 3))

    better, worse = (errors(model, x) - errors(untouched, x) for x in (batch.data["image"], batch.data["rejected"]))
    expected = torch.log1p(torch.exp(1.5 * (better - worse))).mean() + 0.2 * errors(model, batch.data["image"]).mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.terms["chosen"], errors(model, batch.data["image"]).mean().detach())
    torch.testing.assert_close(loss.terms["rejected_base"], errors(untouched, batch.data["rejected"]).mean())
    torch.testing.assert_close(loss.terms["accuracy"], (better < worse).double().mean())


def test_swapping_the_pictures_flips_the_sign():
    errors, base = torch.rand(2, 2, 5, dtype=torch.float64)
    rows, inside = preference(errors, base, 7.0)
    other, flipped = preference(errors.flip(0), base.flip(0), 7.0)
    torch.testing.assert_close(flipped, -inside)
    torch.testing.assert_close(other - rows, inside)
    model, batch = Drawing(), pair_batch()
    model.move(0.3)
    objective = prepared(model, beta=3.0)
    one, two = (objective.loss(model, b, lent(model, 1)).terms["accuracy"] for b in (batch, swapped(batch)))
    assert float(one + two) == 1


def test_what_both_errors_have_in_common_cancels_and_a_small_beta_says_nothing():
    errors, base = torch.rand(2, 2, 5, dtype=torch.float64)
    rows, _ = preference(errors, base, 7.0)
    torch.testing.assert_close(preference(errors + 3.0, base, 7.0)[0], rows)
    torch.testing.assert_close(preference(errors, base - 0.4, 7.0)[0], rows)
    small = preference(errors, base, 1e-9)[0]
    torch.testing.assert_close(small, torch.full_like(small, math.log(2)))


def test_both_pictures_and_both_models_see_one_noise_and_one_timestep():
    model, batch, seen = Drawing(), pair_batch(), []
    predict = model.predict

    def spy(x_t, t, cond):
        seen.append((x_t, t, model.on))
        return predict(x_t, t, cond)

    model.predict = spy
    prepared(model).loss(model, batch, lent(model, 3))
    (ours, t, on), (base, t_base, off) = seen
    assert on and not off
    assert torch.equal(ours, base) and torch.equal(t, t_base) and torch.equal(t[:4], t[4:])
    alpha, sigma = (v.view(-1, 1, 1, 1).double() for v in (model.schedule.alphas[t[:4]], model.schedule.sigmas[t[:4]]))
    noises = [
        (x - alpha * x_0) / sigma
        for x, x_0 in zip(ours.chunk(2), (batch.data["image"], batch.data["rejected"]), strict=True)
    ]
    torch.testing.assert_close(*noises)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_predictions_agree_where_errors_are_weighed_alike(prediction):
    """SNR times the error in x_0 is the error in eps, and SNR / (SNR + 1) times the error in v is."""
    x_0, eps, wrong = torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([100, 300, 500, 800])
    found = {}
    for name in ("eps", prediction):
        schedule = SCHEDULES[name]
        x_t = schedule.add_noise(x_0, eps, t)
        guess = schedule.target(x_0 + 0.1 * wrong, schedule_eps(schedule, x_t, x_0 + 0.1 * wrong, t), t)
        found[name] = (guess - schedule.target(x_0, eps, t)).square().flatten(1).mean(1)
    snr = schedule.snr(t).double()
    weight = {"v": snr / (snr + 1), "x0": snr}[prediction]
    torch.testing.assert_close(weight * found[prediction], found["eps"], rtol=1e-5, atol=0)


def schedule_eps(schedule, x_t, x_0, t):
    alpha, sigma = schedule.levels(t, 4)
    return (x_t - alpha * x_0) / sigma


def test_training_prefers_what_was_chosen():
    model, batch = Drawing(), pair_batch(8)
    objective = prepared(model, beta=500.0)
    optimizer = torch.optim.Adam([model.delta], lr=1e-3)
    log = []
    for step in range(250):
        loss = objective.loss(model, batch, lent(model, step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        log.append((float(loss.total.detach()), float(loss.terms["accuracy"])))
    assert sum(a for _, a in log[-50:]) / 50 > 0.7
    assert sum(value for value, _ in log[-50:]) / 50 < 0.9 * math.log(2)


def test_rows_have_weights_and_what_is_missing_is_refused():
    model, batch = Drawing(), pair_batch()
    model.move(0.3)
    objective = prepared(model, beta=3.0)
    one = objective.loss(model, batch, lent(model, 1)).total
    half = objective.loss(model, replace(batch, weight=torch.full((4,), 0.5)), lent(model, 1)).total
    torch.testing.assert_close(half, one / 2)
    with pytest.raises(ValueError, match="column 'rejected'"):
        objective.loss(model, replace(batch, data={"image": batch.data["image"]}), lent(model, 1))
    for wrong in ({"beta": 0}, {"sft_weight": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            from_mapping(Config, wrong)


def test_a_recipe_trains_on_pairs(tmp_path):
    overrides = [f"out={tmp_path}", "train.steps=1", "train.batch_size=2", "train.trackers=[]", "preview.prompts=[]"]
    overrides += ["data.root=" + str(tmp_path / "photos"), "train.device=cpu", "train.log_every=1"]
    from PIL import Image

    for folder, colour in (("chosen", "red"), ("rejected", "blue")):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in "ab":
            Image.new("RGB", (64, 64), colour).save(tmp_path / "photos" / folder / f"{name}.png")
            (tmp_path / "photos/chosen" / f"{name}.txt").write_text("a circle")
    train(config.load_run("reward_tune/diffusion_dpo", overrides))
    row = json.loads((tmp_path / "diffusion_dpo/metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert row["chosen"] == pytest.approx(row["chosen_base"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------- online

OPTIONS = {"group": GROUP, "steps": 3, "timestep_count": 3, "beta": 20.0}


def online(**options):
    return dpo_online.build(dpo_online.Config(**OPTIONS | options))


def test_the_best_and_the_worst_of_each_group_are_a_pair():
    model = Drawing()
    objective, lent = online(), tools_of(model=model)
    rewards = torch.tensor([0.3, 0.1, 0.9, 0.4, 5.0, 7.0, 6.0, 5.5])
    single = tools_of(model=model, reward=lambda images, prompts, meta: rewards)
    collected = objective.collect(model, batch_of(GROUP, 2), single)
    pictures = draw(objective, model, batch_of(GROUP, 2), lent)
    assert torch.equal(collected.chosen, pictures.final[[2, 5]])
    assert torch.equal(collected.rejected, pictures.final[[1, 4]])
    assert torch.equal(collected.cond.tokens, pictures.cond.tokens[[2, 5]])
    assert float(collected.terms["gap"]) == pytest.approx((0.8 + 2.0) / 2)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_an_online_update_is_the_gradient_of_one_graph(prediction, micro_batch):
    model = Drawing(prediction)
    objective, lent = online(micro_batch=micro_batch, sft_weight=0.1), tools_of(model=model, scale=2.0)
    collected = objective.collect(model, batch_of(GROUP, 4), lent)
    model.move()
    loss = objective.update(model, collected, 0, lent)
    found = gradient(model)
    t, eps = objective.noised(model, collected, 0, lent)
    total = 0
    for k in range(3):
        pictures = collected.chosen, collected.rejected, eps[:, k], t[:, k], collected.cond
        errors = objective.pairs.both(model, *pictures)
        with torch.no_grad(), model.disable():
            base = objective.pairs.both(model, *pictures)
        total = total + (preference(errors, base, 20.0)[0] + 0.1 * errors[0]).mean() / 3
    total.backward()
    torch.testing.assert_close(found, 2 * gradient(model), rtol=1e-9, atol=1e-12)
    assert float(loss.total) == pytest.approx(total.item(), rel=1e-6)
    assert {"accuracy", "chosen", "rejected_base", "gap", "ties"} <= loss.terms.keys()
    assert all(0 <= int(v) * 3 // 1000 == k for k in range(3) for v in t[:, k])


def test_groups_without_a_difference_are_no_pairs():
    model = Drawing()
    objective = online()

    def half_tied(images, prompts, meta):
        found = brightness(images, prompts)
        return torch.where(torch.arange(len(found)) < GROUP, 0.5, found)

    lent = tools_of(model=model, reward=half_tied)
    collected = objective.collect(model, batch_of(GROUP, 2), lent)
    assert collected.weight.tolist() == [0, 1] and float(collected.terms["ties"]) == 0.5
    level = tools_of(model=model, reward=lambda images, prompts, meta: torch.ones(len(images)))
    tied = objective.collect(model, batch_of(GROUP, 2), level)
    objective.update(model, tied, 0, level)
    assert not gradient(model).any()


def test_two_ranks_take_the_gradient_of_one():
    model = Drawing()
    objective, lent = online(), tools_of(model=model)
    batches = [batch_of(GROUP, 1, rank=r, world=2) for r in (0, 1)]
    whole = objective.collect(model, batch_of(GROUP, 2), lent)
    parts = [objective.collect(model, batch, lent) for batch in batches]
    model.move()
    objective.update(model, whole, 0, lent)
    expected = gradient(model)
    assert torch.equal(torch.cat([p.rows for p in parts]), whole.rows)
    halves = []
    for part in parts:
        objective.update(model, part, 0, lent)
        halves.append(gradient(model))
    torch.testing.assert_close(sum(halves) / 2, expected, rtol=1e-9, atol=1e-12)


def test_a_tie_on_one_rank_counts_on_both():
    model, objective = Drawing(), online()
    gaps = [torch.tensor([0.0]), torch.tensor([2.0])]
    for rank, weight in ((0, 0.0), (1, 2.0)):

        def gather(value):
            return torch.cat(gaps) if len(value) == 1 else torch.cat([value, value])

        def reward(images, prompts, meta, rank=rank):
            return torch.arange(4.0) * rank

        lent = tools_of(model=model, reward=reward, world=2, rank=rank, gather=gather)
        part = objective.collect(model, batch_of(GROUP, 1, rank=rank, world=2), lent)
        assert part.weight.tolist() == [weight]


def test_memory_does_not_grow_with_the_timesteps():
    def held(timesteps):
        model = Drawing()
        objective, lent = online(timestep_count=timesteps), tools_of(model=model)
        collected = objective.collect(model, batch_of(GROUP, 2), lent)
        return most_held(lambda: objective.update(model, collected, 0, lent))

    assert held(9) == held(3) > 0


def test_a_batch_that_mixes_prompts_in_a_group_is_refused():
    model = Drawing()
    batch = batch_of(GROUP, 2)
    batch.data["prompt"][1] += 1
    with pytest.raises(ValueError, match="groups of 4 with one prompt"):
        online().collect(model, batch, tools_of(model=model))


@pytest.mark.parametrize("name", ["prdp", "dpo_online"])
def test_online_objectives_train_a_real_adapter(tmp_path, name):
    from visiontune import plugin

    model = tiny_model("sd")
    torch.manual_seed(0)
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    options = {"name": name, "group": 4, "steps": 2, "updates": 2, "micro_batch": 2}
    module, built = plugin.configure("objectives", options, "objective")
    trainer = Trainer(
        model=model,
        adapters=found,
        objective=module.build(built),
        rows=PromptBatches(PROMPTS, 4, 4),
        train=TrainConfig(steps=4, batch_size=4, lr=1e-2, trackers=[], device="cpu", log_every=1),
        out=tmp_path,
        reward=as_reward(brightness, "brightness"),
    )
    before = [p.detach().clone() for p in found.parameters()]
    trainer.fit()
    assert any(not torch.equal(p, b) for p, b in zip(found.parameters(), before, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all("reward" in row for row in rows)
