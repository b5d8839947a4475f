from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tiny import tiny_model
from tiny_training import TinyModel, TinyRows, tiny_trainer
from torch.nn import Parameter

from visiontune import adapters, config
from visiontune.assemble import resources
from visiontune.data.loader import BatchSampler
from visiontune.errors import UserError
from visiontune.schema import from_mapping
from visiontune.training import optim, preview
from visiontune.training.config import PreviewConfig, TrainConfig
from visiontune.training.devices import make_accelerator, precision_of
from visiontune.training.ema import Average


def test_the_average_follows_its_formula():
    parameter = Parameter(torch.tensor([1.0]))
    average, expected = Average([parameter], 0.5), 1.0
    for n, value in enumerate([2.0, 3.0, 5.0, 8.0, -1.0, 4.0, 0.0, 7.0, 2.0, 9.0, 3.0, 1.0]):
        parameter.data.fill_(value)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * value
        assert average.shadow[0].item() == pytest.approx(expected, rel=1e-5)


def test_the_average_is_only_looked_through():
    parameter = Parameter(torch.randn(5))
    average = Average([parameter], 0.9)
    parameter.data += 1
    before = parameter.detach().clone()
    with average.applied():
        assert torch.allclose(parameter, before - 1)
    assert torch.equal(parameter, before)


def test_averages_that_diffusers_kept_are_taken_up():
    """Checkpoints of earlier versions hold the state of its ``EMAModel``, whose formula is the same."""
    parameters = [Parameter(torch.randn(3)), Parameter(torch.randn(2, 2))]
    theirs, before, after = EMAModel(parameters, decay=0.7), Average(parameters, 0.7), Average(parameters, 0.7)
    for n in range(9):
        for p in parameters:
            p.data += 1
        theirs.step(parameters)
        before.update()
        if n == 4:
            after.load_state_dict(theirs.state_dict())
        elif n > 4:
            after.update()
    for one, two, three in zip(before.shadow, after.shadow, theirs.shadow_params, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)


def test_no_average_is_the_weights():
    parameter = Parameter(torch.ones(1))
    average = Average([parameter], None)
    average.update()
    with average.applied():
        assert parameter.item() == 1
    assert average.state_dict() is None


# ---------------------------------------------------------------------------------------------------- optimiser


def rates(train, steps=10):
    optimizer = optim.make_optimizer({"x": Parameter(torch.ones(1))}, train, {})
    schedule, found = optim.make_schedule(optimizer, train), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rate_schedules():
    assert rates(TrainConfig(steps=10, lr=1.0)) == [1.0] * 10
    assert rates(TrainConfig(steps=10, lr=1.0, warmup=4))[:6] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(TrainConfig(steps=10, lr=1.0, schedule="linear")) == pytest.approx([1 - k / 10 for k in range(10)])
    cosine = [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert rates(TrainConfig(steps=10, lr=1.0, schedule="cosine")) == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("adafactor", "Adafactor"), ("torch.optim.RAdam", "RAdam")]
)
def test_optimisers_by_name_or_path_lower_a_loss(name, kind):
    parameter = Parameter(torch.full((4, 4), 2.0))
    optimizer = optim.make_optimizer({"x": parameter}, TrainConfig(optimizer=name, lr=0.05, weight_decay=0.0), {})
    assert type(optimizer).__name__ == kind
    for _ in range(30):
        optimizer.zero_grad()
        parameter.square().mean().backward()
        optimizer.step()
    assert parameter.abs().mean() < 1.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamv"}, "adamw"),
        ({"optimizer": "torch.optim.Nothing"}, "cannot be loaded"),
        ({"optimizer": "os.system"}, "is no optimiser"),
        ({"optimizer": "subprocess.Popen"}, "is no optimiser"),
        ({"optimizer": "torch.optim.lr_scheduler.LambdaLR"}, "is no optimiser"),
        ({"optimizer": "torch.optim.Adam.step"}, "not installed"),
        ({"optimizer_options": {"speed": 3}}, "speed"),
        ({"optimizer_options": {"foreach": "maybe"}}, r"^train\.optimizer_options\.foreach must be true or false"),
        ({"optimizer_options": {"eps": "small"}}, r"^train\.optimizer_options\.eps must be a number"),
        ({"optimizer_options": {"betas": [0.9]}}, r"^train\.optimizer_options\.betas must be a list of 2"),
        ({"optimizer": "sgd", "optimizer_options": {"nesterov": 3}}, r"^train\.optimizer_options\.nesterov must be"),
    ],
)
def test_bad_optimisers_are_named(options, message):
    with pytest.raises(UserError, match=message):
        optim.make_optimizer({"x": Parameter(torch.ones(1))}, TrainConfig(**options), {})


def test_options_of_an_optimiser_may_be_text_as_a_command_line_and_yaml_have_them():
    options = {"eps": "1e-6", "amsgrad": "true", "betas": "[0.5, 0.9]"}
    made = optim.make_optimizer({"x": Parameter(torch.ones(1))}, TrainConfig(optimizer_options=options), {})
    assert (made.defaults["eps"], made.defaults["amsgrad"], made.defaults["betas"]) == (1e-6, True, (0.5, 0.9))


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_text_encoder_has_its_own_learning_rate(tmp_path, with_adapter):
    model = tiny_model("sd")
    found = adapters.attach(model.of("denoiser", "text"), "lora", targets=["to_q", "q_proj"]) if with_adapter else None
    rows = TinyRows(model, embedded=False)
    options = {"parts": ["denoiser", "text"], "part_lr": {"text": 1e-5}, "lr": 1e-3}
    trainer = tiny_trainer(tmp_path, model=model, adapters=found, rows=rows, **options)
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-5]
    text = sum(p.numel() for n, p in trainer.parameters.items() if "text_encoder" in n)
    assert sum(p.numel() for p in groups[1]["params"]) == text > 0
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in trainer.parameters.values())


def test_a_text_encoder_without_adapter_layers_is_refused(tmp_path):
    model = tiny_model("sd")
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    with pytest.raises(UserError, match=r"train\.parts has 'text', but the adapter has no layer in it"):
        tiny_trainer(tmp_path, model=model, adapters=found, rows=TinyRows(model), parts=["denoiser", "text"])


def test_an_adapter_on_what_is_no_network_is_refused(tmp_path):
    model = tiny_model("sd")
    found = adapters.attach({"net": model.denoiser}, "lora", targets=["to_q"])
    with pytest.raises(UserError, match="attached to 'net', which is no network of 'tiny-sd'"):
        tiny_trainer(tmp_path, model=model, adapters=found, rows=TinyRows(model))


def test_what_is_released_is_nothing_that_steps_need(tmp_path, monkeypatch):
    model, moved = TinyModel(), []
    monkeypatch.setattr(TinyModel, "release", lambda self, *parts: moved.extend(parts))
    tiny_trainer(tmp_path, model=model, release=["text", "vae"])
    assert moved == ["text", "vae"]
    for part in ("denoiser", "text"):
        with pytest.raises(UserError, match=r"train\.release has '(unet|text_encoder)'"):
            rows = TinyRows(model, embedded=False)
            tiny_trainer(tmp_path, model=model, rows=rows, parts=["denoiser", "text"], release=[part])


@pytest.mark.parametrize(
    ("words", "rows", "left"),
    [
        ([], {}, ["vae", "text_encoder"]),
        (["train.release=[vae]"], {}, ["vae"]),
        (["train.release=[]"], {}, []),
        (["data.cache=false"], {}, []),
        ([], {"train_text": True}, []),
        ([], {"prior": [3]}, []),
        (["train.parts=[denoiser, vae]"], {}, ["text_encoder"]),
    ],
)
def test_what_no_step_needs_leaves_by_itself(words, rows, left):
    """Not prior pictures' VAE: they are encoded when they are first drawn."""
    run = config.load_run("personalise/lora", ["data.root=x", "train.parts=[denoiser]", *words])
    batches = object.__new__(BatchSampler)
    batches.rows = SimpleNamespace(**{"train_text": False, "prior": [], **rows})
    assert sorted(resources.released(run, tiny_model("sd"), batches)) == sorted(left)
    if not words:
        assert resources.released(run, tiny_model("sd"), object()) == []  # prompts: pictures are drawn in the steps


def test_half_precision_weights_are_not_trained(tmp_path):
    model = TinyModel()
    model.denoiser.bfloat16()
    with pytest.raises(UserError, match=r"model\.dtype=fp32"):
        tiny_trainer(tmp_path, model=model)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"lr": 0}, {"ema": 1.0}, {"max_grad_norm": -1}, {"precision": "fp8"}]
)
def test_impossible_training_options_are_refused(options):
    with pytest.raises(UserError, match=f"train.*{next(iter(options))}"):
        from_mapping(TrainConfig, options, "train")


def test_unknown_trackers_are_refused(tmp_path):
    with pytest.raises(UserError, match="'tensorboard'"):
        tiny_trainer(tmp_path, trackers=["tensorbord"])


def test_events_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer(tmp_path, trackers=["tensorboard"], log_every=2).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "visiontune"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4]


# ---------------------------------------------------------------------------------------------------- previews


def previewed(out, method="lora", method_options=None, **train):
    model = tiny_model("sd")
    torch.manual_seed(0)
    found = adapters.attach({"unet": model.denoiser}, method, targets=["to_q", "to_v"], **method_options or {})
    config = PreviewConfig(prompts=["a red circle", "a square"], seeds=[3, 4], every=2, steps=2, cfg_scale=2.0)
    options = {"model": model, "adapters": found, "rows": TinyRows(model), "preview": config, "lr": 0.3, "steps": 5}
    return tiny_trainer(out, **options | train)


def test_previews_are_drawn_before_the_first_step_and_after_the_last(tmp_path):
    previewed(tmp_path, trackers=["tensorboard"]).fit()
    folders = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert folders == ["before_after.png", "step-000000", "step-000002", "step-000004", "step-000005"]
    names = {p.name for p in (tmp_path / "samples" / "step-000000").iterdir()}
    assert names == {"00_seed3.png", "00_seed4.png", "01_seed3.png", "01_seed4.png", "grid.png"}
    card = (tmp_path / "README.md").read_text()
    assert "samples/step-000005/00_seed3.png" in card and "a red circle" in card


def test_previews_show_the_base_at_first_and_the_training_later(tmp_path):
    from visiontune.sampling.pipeline import images

    previewed(tmp_path).fit()
    first, last = (
        np.asarray(Image.open(tmp_path / "samples" / s / "00_seed3.png")) for s in ("step-000000", "step-000005")
    )
    stock = images(tiny_model("sd"), ["a red circle"], [3], steps=2, cfg_scale=2.0)[0]
    assert np.abs(first.astype(int) - stock).max() <= 1
    assert np.abs(first.astype(int) - last).max() > 1


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("oft", {"block_size": 8, "keep_rotated": True})])
def test_previews_do_not_change_the_training(tmp_path, method, options):
    """Also where the adapter keeps what it computed from the averaged weights of the preview."""
    plain = previewed(tmp_path / "plain", method, options, preview=None, ema=0.5)
    plain.fit()
    watched = previewed(tmp_path / "watched", method, options, ema=0.5)
    watched.fit()
    assert all(torch.equal(plain.parameters[k], p) for k, p in watched.parameters.items())


def test_previews_show_the_averaged_weights(tmp_path):
    from visiontune.sampling.pipeline import images

    trainer = previewed(tmp_path, ema=0.5)
    path = trainer.fit()
    model = tiny_model("sd")
    adapters.load({"unet": model.denoiser}, path)
    again = images(model, ["a red circle"], [3], steps=2, cfg_scale=2.0)[0]
    shown = np.asarray(Image.open(tmp_path / "samples" / "step-000005" / "00_seed3.png"))
    assert np.abs(shown.astype(int) - again).max() <= 1


def test_an_average_that_starts_late_begins_at_the_weights():
    parameter = Parameter(torch.ones(1))
    average = Average([parameter], 0.9)
    parameter.data.fill_(5.0)
    average.load_state_dict(None)
    assert average.shadow[0].item() == 5.0
    other = Average([Parameter(torch.zeros(1))], 0.3)
    other.load_state_dict(average.state_dict())
    assert other.shadow[0].item() == 5.0 and other.decay == 0.3


def test_no_prompts_no_previews():
    assert not preview.due(0, 10, PreviewConfig())


# ---------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("precision", "resolution", "plain"), [("bf16", 16, True), ("no", 16, False), ("bf16", 512, False)]
)
def test_attention_is_written_out_for_few_tokens_in_bf16_and_put_back(tmp_path, precision, resolution, plain):
    model = tiny_model()
    model.resolution = resolution
    before = dict(model.denoiser.attn_processors)
    accelerator = make_accelerator(TrainConfig(precision=precision, device="cpu"), tmp_path)
    precise = model.at(precision_of(accelerator))
    cond, x_t, t = model.embed(["a"]), torch.ones(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        expected = model.predict(x_t, t, cond)
        with precise.training():
            kinds = {type(p).__name__ for p in model.denoiser.attn_processors.values()}
            assert kinds == ({"AttnProcessor"} if plain else {"AttnProcessor2_0"})
            torch.testing.assert_close(model.predict(x_t, t, cond), expected, rtol=1e-4, atol=1e-5)
    assert model.denoiser.attn_processors == before
