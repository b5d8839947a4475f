"""Rollouts in the training loop: reuse, processes, checkpoints, precision, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from processes import apart
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from tiny_training import TinyModel, TinyReward, TinyRows, tiny_trainer
from training import online_worker as worker

from visiontune import adapters, assemble
from visiontune.assemble.build import build
from visiontune.config import load_run
from visiontune.data.prompts import PromptBatches
from visiontune.diffusion.schedule import Schedule
from visiontune.errors import UserError
from visiontune.estimate import measure
from visiontune.guidance.stack import GuidanceStack
from visiontune.objectives import alignprop
from visiontune.training import checkpoint
from visiontune.training.config import PreviewConfig, TrainConfig
from visiontune.training.devices import make_accelerator


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same(one, other):
    """Whether nested states are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def prop(
    out, model=None, reward=None, found=None, batch_size=2, accelerator=None, preview=None, objective=None, **train
):
    model = model or TinyModel()
    options = {"steps": 3, "cfg_scale": 2.0, "truncation": "full", **(objective or {})}
    return tiny_trainer(
        out,
        model=model,
        objective=alignprop.build(alignprop.Config(**options)),
        rows=PromptBatches(worker.PROMPTS, batch_size),
        adapters=found,
        reward=reward or TinyReward(),
        accelerator=accelerator,
        preview=preview,
        batch_size=batch_size,
        **train,
    )


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


# ---------------------------------------------------------------------------------------------------- the loop


def test_the_reward_rises(tmp_path):
    prop(tmp_path, steps=30, lr=2e-2, log_every=5).fit()
    rewards = [row["reward"] for row in metrics(tmp_path)]
    assert rewards[-1] > rewards[0] + 0.1
    assert {"reward", "reward_std", "grad_steps", "loss", "grad_norm", "lr"} <= metrics(tmp_path)[0].keys()


def test_a_rollout_serves_its_updates(tmp_path):
    trainer = worker.remembering(tmp_path)
    trainer.fit()
    assert trainer.objective.calls == trainer.lender.state["rollouts"] == 12 // 2
    # Three steps a row of the log: parts 0 1 0, then 1 0 1.
    assert [row["part"] for row in metrics(tmp_path)] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])


def test_dropout_is_off_throughout_and_previews_leave_it_off(tmp_path):
    model = tiny_model("sd")
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"], dropout=0.5)
    preview = PreviewConfig(prompts=["a red circle"], every=1, steps=1)
    trainer = prop(tmp_path, model=model, found=found, steps=2, lr=1e-3, preview=preview)
    modes = []
    model.denoiser.register_forward_hook(lambda *_: modes.append((model.denoiser.training, found.training)))
    trainer.fit()
    assert set(modes) == {(False, False)}


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_averages_shown_in_previews_leave_no_trace_in_the_rollouts(tmp_path, method):
    """What an adapter keeps of its parameters must not outlive a look at the averaged ones."""
    results = []
    for prompts in ([], ["a red circle"]):
        model = tiny_model("sd")
        torch.manual_seed(0)
        options = {"block_size": 4, "keep_rotated": True} if method == "oft" else {}
        found = adapters.attach({"unet": model.denoiser}, method, targets=["to_q", "to_v"], **options)
        preview = PreviewConfig(prompts=prompts, every=1, steps=1)
        out = tmp_path / str(len(prompts))
        trainer = prop(out, model=model, found=found, steps=3, lr=1e-2, ema=0.9, preview=preview)
        trainer.fit()
        results.append(parameters(trainer))
    assert same(*results)


def test_a_step_does_not_depend_on_the_micro_batches(tmp_path):
    results = []
    for size in (None, 1):
        options = {"optimizer": "sgd", "lr": 0.1, "steps": 3}
        trainer = prop(tmp_path / str(size), batch_size=3, objective={"micro_batch": size}, **options)
        trainer.fit()
        results.append(parameters(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    """Objective and reward keep running means; the run dies in its fifth rollout, after the checkpoint of step 8."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    worker.remembering(whole).fit()
    assert apart("training.online_worker:death", broken, 4) == [-signal.SIGKILL]
    assert checkpoint.steps(broken)[-1] == 8
    worker.remembering(broken).fit()
    ours, theirs = (checkpoint.load(checkpoint.latest(out)) for out in (broken, whole))
    for state in (ours[1], theirs[1]):
        del state["parts"]["meter"]
    assert same(ours, theirs)
    assert theirs[1]["parts"]["objective"]["rollouts"] == 6 and theirs[1]["parts"]["reward"]["tiny"]["count"] == 24
    assert metrics(broken) == metrics(whole)
    name = Path("model", "weights.safetensors")
    assert same(load_file(broken / name), load_file(whole / name))


def test_alignprop_goes_on_to_the_same_bits(tmp_path):
    prop(tmp_path / "whole", steps=4, lr=1e-2).fit()
    prop(tmp_path / "broken", steps=2, lr=1e-2).fit()
    prop(tmp_path / "broken", steps=4, lr=1e-2, resume=True).fit()
    name = Path("model", "weights.safetensors")
    assert same(load_file(tmp_path / "broken" / name), load_file(tmp_path / "whole" / name))


# ---------------------------------------------------------------------------------------------------- processes


def test_two_processes_train_like_one_with_both_their_batches(tmp_path):
    assert apart("training.online_worker:two", tmp_path / "two") == [0, 0]
    trainer = worker.shared(tmp_path / "one", 4)
    before = parameters(trainer)
    one = load_file(trainer.fit() / "weights.safetensors")
    two = load_file(tmp_path / "two" / "model" / "weights.safetensors")
    for name, value in one.items():
        # Scores are divided by their spread, which is small here, and rounding with them.
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert (value - before[f"unet.{name}"]).abs().max() > 1e-4
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (checkpoint.load(checkpoint.latest(tmp_path / run))[1]["parts"]["reward"] for run in ("two", "one"))
    assert ours["tiny#2"] == pytest.approx(theirs["tiny#2"], rel=1e-4) and ours["tiny#2"]["count"] == 16


# ---------------------------------------------------------------------------------------------------- precision


def test_networks_run_in_bf16_and_the_chain_between_them_in_float32(tmp_path):
    seen, chain = set(), set()

    class Seen(TinyModel):
        def predict(self, x_t, *rest):
            chain.add(x_t.dtype)
            return super().predict(x_t, *rest)

    model = Seen()
    model.denoiser.first.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    options = {"optimizer": "sgd", "lr": 0.1, "steps": 3}
    trainer = prop(tmp_path, model=model, precision="bf16", **options)
    trainer.fit()
    assert seen == {torch.bfloat16} and chain == {torch.float32}
    exact = prop(tmp_path / "exact", **options)
    exact.fit()
    for name, value in parameters(trainer).items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, exact.parameters[name])
        torch.testing.assert_close(value, exact.parameters[name], atol=2e-3, rtol=0)


def test_a_gradient_scaler_scales_what_is_differentiated_and_nothing_that_is_kept(tmp_path):
    """As fp16 does on a GPU; the scale is a power of two, so nothing is rounded."""
    options = {"steps": 3, "lr": 1e-2, "max_grad_norm": None, "log_every": 1}
    plain = prop(tmp_path / "plain", **options)
    plain.fit()
    accelerator = make_accelerator(TrainConfig(device="cpu", trackers=[]), tmp_path)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = prop(tmp_path / "scaled", accelerator=accelerator, **options)
    gradients = []
    update = scaled._update

    def look(step):
        gradients.append({name: p.grad.clone() for name, p in scaled.parameters.items()})
        update(step)

    scaled._update = look
    scaled.fit()
    assert same(parameters(scaled), parameters(plain))
    assert metrics(tmp_path / "scaled") == metrics(tmp_path / "plain")
    fresh = prop(tmp_path / "fresh", **options)
    fresh._gradients(0)
    for name, parameter in fresh.parameters.items():
        assert torch.equal(gradients[0][name], 2.0**10 * parameter.grad)


# ---------------------------------------------------------------------------------------------------- refusals


class Counting(TinyModel):
    calls = 0

    def predict(self, *args):
        self.calls += 1
        return super().predict(*args)


def identity():
    """A model whose last DDIM step changes nothing."""
    model = Counting()
    model.schedule = Schedule.from_scheduler(DDIMScheduler(clip_sample=False, set_alpha_to_one=False))
    return model


class Blind(TinyReward):
    name = "blind"
    differentiable = False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 2}, r"train\.accumulate is for objectives with data: set objective\.micro_batch"),
        ({"reward": Blind()}, "'blind' is not differentiable"),
        ({"objective": {"truncation": "fixed"}, "model": identity()}, "no influence at the steps to differentiate"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(tmp_path, options, words):
    model = options.pop("model", Counting())
    with pytest.raises(UserError, match=words):
        prop(tmp_path, model=model, **options)
    assert model.calls == 0 and not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["steps", "checkpoint_every"])
def test_a_checkpoint_between_the_updates_of_a_rollout_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"train\.{name}=5 falls between .*objective\.updates=2"):
        worker.remembering(tmp_path, **{name: 5})


def test_the_base_is_the_model_without_its_adapter(tmp_path):
    model = tiny_model("sd")
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    trainer = prop(tmp_path / "lora", model=model, found=found)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1)
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([500]), model.embed(["a circle"])
    with torch.no_grad():
        adapted = model.predict(x, t, cond)
        with trainer.lender.tools(0).reference():
            base = model.predict(x, t, cond)
        assert torch.equal(base, tiny_model("sd").predict(x, t, cond)) and not torch.equal(base, adapted)


# ---------------------------------------------------------------------------------------------------- from a recipe


def recipe(tmp_path, *more):
    folder = tmp_path / "tiny"
    if not folder.exists():
        save_tiny(folder)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    overrides = [f"model={folder}", f"out={tmp_path}", f"data={tmp_path / 'prompts.txt'}", "train.trackers=[]"]
    small = ["train.steps=2", "train.batch_size=2", "train.checkpoint_every=2", "train.precision=no", "preview.steps=2"]
    return load_run("reward_tune/alignprop", [*overrides, *small, "objective.steps=3", "train.device=cpu", *more])


def test_a_recipe_trains_and_shows_before_and_after(tmp_path):
    run = recipe(tmp_path, "preview.prompts=['a circle', 'a red square']", "preview.seeds=[0, 1]", "preview.every=1")
    result = assemble.assemble(run).fit()
    assert adapters.read_header(result)["objective"] == "alignprop"
    folders = {path.name for path in (run.folder / "samples").iterdir()}
    assert folders == {"step-000000", "step-000001", "step-000002", "before_after.png"}


def test_rollouts_previews_and_guards_are_guided_by_terms(tmp_path, monkeypatch):
    seen = []
    begin = GuidanceStack.begin

    def begun(stack, *args, **kwargs):
        seen.append(("rollout", [term.name for term in stack.terms]))
        return begin(stack, *args, **kwargs)

    def attach(stack, *args, **kwargs):
        seen.append(("picture", [term.name for term in stack.terms]))
        return attached(stack, *args, **kwargs)

    attached = GuidanceStack.attach
    monkeypatch.setattr(GuidanceStack, "begin", begun)
    monkeypatch.setattr(GuidanceStack, "attach", attach)
    terms = ["objective.guidance=[{cfg: 3}, {slg: 1}]", "preview.guidance=[{slg: 2}]", "preview.prompts=['a circle']"]
    guards = "guards={every: 2, holdout: 1, seeds: [0], diversity_min: null}"
    assemble.assemble(recipe(tmp_path, *terms, guards)).fit()
    assert ("rollout", ["cfg", "slg"]) in seen
    # Two previews, whose own scale is 1, and the guard at both ends, which draws as the rollouts do.
    pictures = [tuple(names) for what, names in seen if what == "picture"]
    assert sorted(pictures) == [("cfg", "slg")] * 2 + [("slg",)] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("objective.guidance=[{pag: {layers: nine}}]", "pag: no layer of '.*' is called 'nine'"),
        ("objective.guidance=[{apg: {scale: 4, momentum: -0.5}}]", "remembers earlier steps"),
        ("preview={prompts: [a], steps: 2, guidance: [{slg: {window: [0.1, 0.2]}}]}", "preview.guidance: slg acts at"),
    ],
)
def test_guidance_that_cannot_be_is_refused_before_the_run(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        assemble.assemble(recipe(tmp_path, given))


def test_check_says_what_guidance_costs(tmp_path):
    run = recipe(tmp_path, "objective.guidance=[{cfg: 3}, {slg: {scale: 1, window: [0.5, 1]}}]")
    assert "objective.guidance: cfg, slg: the network sees each picture 7 times in 3 steps" in measure(run).text()


def test_mistakes_of_a_recipe_are_found_before_the_model_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("visiontune.assemble.parts.open_model", lambda run: pytest.fail("the model was opened"))
    for run, words in (
        (recipe(tmp_path, f"data={tmp_path / 'gone.txt'}"), "there is no prompts file"),
        (recipe(tmp_path, "reward=rednes"), "rednes"),
        (recipe(tmp_path, "reward=pocket-oracle"), "not differentiable"),
        (recipe(tmp_path, "reward=none"), "needs a reward"),
        (recipe(tmp_path, "train.accumulate=2"), "accumulate"),
        (load_run("personalise/oft", ["reward=redness", "data=pocket/poppy"]), "does not read one"),
    ):
        with pytest.raises(UserError, match=words):
            build(run, cache_dir=tmp_path / "cache")


def test_an_adapter_that_looks_at_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'eva' looks at a loss on data.*'alignprop' does not have"):
        build(recipe(tmp_path, "adapter=eva"), cache_dir=tmp_path / "cache")


def test_rows_with_data_still_train_with_dropout(tmp_path):
    trainer = tiny_trainer(tmp_path, rows=TinyRows(TinyModel()))
    assert not trainer.online and trainer.step_module.training
