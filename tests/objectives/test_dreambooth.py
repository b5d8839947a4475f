from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter

import numpy as np
import pytest
import torch
from tiny_training import PREDICTIONS, TinyModel, TinyRows, tiny_batch, tiny_trainer
from torch import nn

from visiontune.data.base import Config as DataConfig
from visiontune.diffusion.timesteps import Timesteps
from visiontune.errors import UserError
from visiontune.objectives import dreambooth
from visiontune.objectives.base import Tools, generator
from visiontune.objectives.dreambooth import build

Config = partial(dreambooth.Config, prior="pictures")
DOG = DataConfig(root="dog", class_noun="dog")


def rows_of(loss):
    return float(loss.terms["instance"]), float(loss.terms["prior"])


def test_lambda_zero_is_the_loss_of_the_instance_rows_alone():
    model = TinyModel()
    batch = tiny_batch(model, 0, instance=3, prior=3, weight=0.0)
    objective = build(Config())
    errors = objective.errors(model, batch, Tools(rng=generator(1)))
    torch.testing.assert_close(objective.loss(model, batch, Tools(rng=generator(1))).total, errors[:3].mean())


def test_swapping_instance_and_prior_swaps_the_terms():
    model, objective = TinyModel(), build(Config(snr_gamma=5.0))
    batch = tiny_batch(model, 0, instance=2, prior=2)
    swapped = replace(batch, prior=~batch.prior)
    one, other = (
        objective.loss(model, batch, Tools(rng=generator(1))),
        objective.loss(model, swapped, Tools(rng=generator(1))),
    )
    assert rows_of(one) == tuple(reversed(rows_of(other)))
    torch.testing.assert_close(one.total, other.total)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("instance", "prior"), [(1, 1), (1, 3), (4, 2)])
def test_min_snr_with_prior_rows_weighs_each_row_by_its_own_timestep(prediction, instance, prior):
    """Also for one row of each kind, where weights of two rows and a loss of one would broadcast in silence."""
    model = TinyModel(prediction)
    batch = tiny_batch(model, 0, instance, prior, weight=0.7)
    plain, weighted = Config(offset_noise=0.1), Config(offset_noise=0.1, snr_gamma=5.0)
    errors = build(plain).errors(model, batch, Tools(rng=generator(1)))
    snr = model.schedule.snr(Timesteps().draw(model, (4, 8, 8), instance + prior, generator(1)))
    scale = {"eps": 1 / snr, "v": 1 / (snr + 1), "x0": torch.ones_like(snr)}[prediction]
    row = errors * snr.clamp(max=5) * scale
    loss = build(weighted).loss(model, batch, Tools(rng=generator(1)))
    torch.testing.assert_close(loss.total, row[:instance].mean() + 0.7 * row[instance:].mean())
    assert rows_of(loss) == pytest.approx((float(row[:instance].mean()), float(row[instance:].mean())))


def test_prior_rows_may_stand_anywhere():
    model, objective = TinyModel(), build(Config())
    batch = tiny_batch(model, 0, instance=2, prior=2, weight=0.5)
    errors = objective.errors(model, batch, Tools(rng=generator(1)))
    mixed = replace(batch, prior=torch.tensor([True, False, True, False]), weight=torch.tensor([0.5, 1.0, 0.5, 1.0]))
    expected = errors[[1, 3]].mean() + 0.5 * errors[[0, 2]].mean()
    torch.testing.assert_close(objective.loss(model, mixed, Tools(rng=generator(1))).total, expected)


# ------------------------------------------------------------------------------------------------ prior images


class Adapters:
    on = True

    @contextmanager
    def disable(self):
        self.on = False
        yield
        self.on = True


def painter(adapters=None, fail_at=None):
    """Stands for `sampling.generate.images`; each image tells its seed and whether the adapters were on."""
    calls = []

    def images(model, prompts, seeds, *, steps, cfg_scale, batch_size):
        calls.append((prompts[0], list(seeds), steps, cfg_scale))
        if fail_at is not None and len(calls) > fail_at:
            raise KeyboardInterrupt
        shade = 200 if adapters is not None and adapters.on else 0
        return np.stack([np.full((16, 16, 3), shade + seed, np.uint8) for seed in seeds])

    images.calls = calls
    return images


def prepare(config, tmp_path, images, adapters=None, model=None, data=DOG):
    model = model or TinyModel()
    reference = adapters.disable if adapters is not None else nullcontext
    return build(config).prepare(model, data, [], tmp_path, Tools(reference=reference, draw=images))


def test_prior_images_come_from_the_base_without_its_adapters(tmp_path):
    adapters = Adapters()
    samples = prepare(Config(prior_images=5, prior_weight=0.5), tmp_path, painter(adapters), adapters)
    assert [int(np.asarray(s.sources["image"].open())[0, 0, 0]) for s in samples] == [0, 1, 2, 3, 4]
    assert adapters.on
    assert {(s.prior, s.weight, s.caption) for s in samples} == {(True, 0.5, "a photo of a dog")}
    assert len({s.id for s in samples}) == 5


def test_prior_images_are_made_once(tmp_path):
    images = painter()
    first = prepare(Config(prior_images=5, prior_batch_size=2), tmp_path, images)
    assert sorted(call[1] for call in images.calls) == [[0, 1], [2, 3], [4]]
    again = prepare(Config(prior_images=5, prior_batch_size=2), tmp_path, images)
    assert again == first and len(images.calls) == 3


def test_what_another_run_drew_meanwhile_is_not_drawn_again(tmp_path):
    config, images = Config(prior_images=6, prior_batch_size=2), painter()

    def while_another_draws(*args, **options):
        if not images.calls:
            prepare(config, tmp_path, images)
        return images(*args, **options)

    samples = prepare(config, tmp_path, while_another_draws)
    assert len(images.calls) == 4
    assert [int(np.asarray(s.sources["image"].open())[0, 0, 0]) for s in samples] == list(range(6))


def test_a_killed_generation_goes_on_where_it_stopped(tmp_path):
    config = Config(prior_images=6, prior_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path, painter(fail_at=1))
    images = painter()
    samples = prepare(config, tmp_path, images)
    drawn = [call[1] for call in images.calls]
    assert len(drawn) == 2 and all(chunk in [[0, 1], [2, 3], [4, 5]] for chunk in drawn)
    assert [int(np.asarray(s.sources["image"].open())[0, 0, 0]) for s in samples] == list(range(6))


@pytest.mark.parametrize(
    "change", [{"prior_prompts": "a [class]"}, {"prior_steps": 3}, {"prior_cfg_scale": 1.0}, "base"]
)
def test_other_prior_settings_make_other_images(tmp_path, change):
    images = painter()
    first = prepare(Config(prior_images=2), tmp_path, images)
    model = TinyModel()
    if change == "base":
        model.fingerprint = lambda part: f"other-{part}"
    options = {} if change == "base" else change
    second = prepare(Config(prior_images=2, **options), tmp_path, images, model=model)
    assert len(images.calls) == 2 and not {s.id for s in first} & {s.id for s in second}


def test_several_prior_prompts_take_turns_and_each_image_keeps_its_own(tmp_path):
    drawn = []

    def images(model, prompts, seeds, **_):
        drawn.extend(zip(prompts, seeds, strict=True))
        return np.zeros((len(seeds), 16, 16, 3), np.uint8)

    config = Config(prior_prompts=["a [class]", "a tree", "a house"], prior_images=5, prior_batch_size=2)
    samples = prepare(config, tmp_path, images)
    assert [s.caption for s in samples] == ["a dog", "a tree", "a house", "a dog", "a tree"]
    assert sorted(drawn, key=itemgetter(1)) == [(s.caption, i) for i, s in enumerate(samples)]
    with pytest.raises(ValueError, match="prior_prompts must not be empty"):
        Config(prior_prompts=[])


def test_no_images_without_a_prior_term(tmp_path):
    images = painter()
    assert not prepare(Config(prior_weight=0.0), tmp_path, images)
    assert not prepare(Config(prior_images=0), tmp_path, images)
    assert not images.calls


def test_a_class_prompt_needs_a_class(tmp_path):
    with pytest.raises(UserError, match=r"data\.class_noun"):
        prepare(Config(), tmp_path, painter(), data=DataConfig(root="dog"))


# ------------------------------------------------------------------------------------------------ does it work


class Memory(nn.Module):
    """A denoiser that can memorise 4x8x8 latents."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(256 + 8 + 2, 192), nn.Linear(192, 256)
        self.middle = nn.Linear(192, 192)

    def forward(self, x, t, tokens):
        level = (t / 1000)[:, None]
        features = torch.cat([x.flatten(1), tokens.mean(1), level, level.square()], 1)
        hidden = torch.nn.functional.silu(self.enter(features))
        return self.leave(torch.nn.functional.silu(self.middle(hidden))).view_as(x)


class ClassRows(TinyRows):
    """Class latents: four fixed patterns with a little noise. Instance latents: four other fixed patterns."""

    def __init__(self, model, instance: int, prior: int, weight: float = 1.0) -> None:
        super().__init__(model, instance, prior)
        self.weight = weight

    def batch(self, step):
        batch = tiny_batch(self.model, step, self.batch_size, self.prior, self.weight)
        own = torch.randn(4, 4, 8, 8, generator=generator("instance"))
        kind = torch.randn(4, 4, 8, 8, generator=generator("class"))
        pick = torch.randint(0, 4, (len(batch),), generator=generator(step))
        noise = 0.1 * torch.randn(batch.data["image"].shape, generator=generator(step, "noise"))
        latents = torch.where(batch.prior[:, None, None, None], kind[pick] + noise, own[pick])
        return replace(batch, data={"image": latents})


def class_drift(model, base) -> float:
    """Mean squared distance of the two models' predictions for the class prompt, on class latents."""
    batch = ClassRows(model, 0, 64).batch(10**6)
    t = torch.randint(0, 1000, (64,), generator=generator("t"))
    x_t = model.schedule.add_noise(
        batch.data["image"], torch.randn(batch.data["image"].shape, generator=generator("eps")), t
    )
    with torch.no_grad():
        return float((model.predict(x_t, t, batch.cond) - base.predict(x_t, t, batch.cond)).square().mean())


def test_the_subject_is_learnt_and_the_prior_term_holds_the_class(tmp_path):
    def fit(name, model, rows, steps):
        tiny_trainer(tmp_path / name, model=model, rows=rows, objective=build(Config()), steps=steps, lr=2e-3).fit()
        return model

    def fresh(state=None):
        torch.manual_seed(0)
        model = TinyModel("x0", denoiser=Memory())
        if state:
            model.denoiser.load_state_dict(state)
        return model

    base = fresh()
    fit("base", base, ClassRows(base, 0, 16), 300)
    state = base.denoiser.state_dict()
    drift, loss = {}, {}
    for weight in (0.0, 1.0):
        model = fresh(state)
        before = instance_loss(model)
        fit(f"lambda{weight}", model, ClassRows(model, 8, 8, weight), 200)
        loss[weight], drift[weight] = instance_loss(model) / before, class_drift(model, base)
    assert loss[0.0] < 0.3 and loss[1.0] < 0.3
    assert drift[1.0] < 0.5 * drift[0.0]


def instance_loss(model) -> float:
    with torch.no_grad():
        rows = ClassRows(model, 64, 0)
        return float(build(Config()).loss(model, rows.batch(10**6), Tools(rng=generator("loss"))).terms["instance"])
