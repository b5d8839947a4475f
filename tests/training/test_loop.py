from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_training import CutRows, RowNoise, TinyModel, TinyRows, tiny_trainer

from visiontune import adapters
from visiontune.errors import UserError
from visiontune.objectives import denoising
from visiontune.objectives.base import Tools, generator


def final(trainer):
    trainer.fit()
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def test_two_accumulated_batches_of_two_are_one_batch_of_four(tmp_path):
    results = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = TinyModel()
        rows = CutRows(model, size)
        options = {"accumulate": accumulate, "optimizer": "sgd", "lr": 0.1, "steps": 3, "max_grad_norm": None}
        out = tmp_path / f"{size}"
        results.append(final(tiny_trainer(out, model=model, rows=rows, objective=RowNoise(), **options)))
    start = dict(TinyModel().denoiser.named_parameters())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name.removeprefix("unet.")])


def test_a_step_is_plain_adamw_on_the_objective(tmp_path):
    """The loop against the five lines that it stands for."""
    trained = final(tiny_trainer(tmp_path, steps=3, lr=1e-2, max_grad_norm=0.5, seed=4))
    model = TinyModel()
    model.denoiser.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-2, fused=True)
    objective = denoising.build(denoising.Config())
    for step in range(3):
        loss = objective.loss(model, TinyRows(model).batch(step), Tools(rng=generator(4, "noise", step, 0))).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.denoiser.parameters(), 0.5)
        optimizer.step()
    for name, value in model.denoiser.named_parameters():
        assert torch.equal(trained[f"unet.{name}"], value)


def test_the_seed_decides_the_run(tmp_path):
    one, same, other = (final(tiny_trainer(tmp_path / str(i), seed=s)) for i, s in enumerate((0, 0, 1)))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    results = []
    for on in (False, True):
        model = tiny_model("sd")
        torch.manual_seed(0)
        found = adapters.attach(model.of("denoiser", "text"), "lora", targets=["to_q", "q_proj"])
        rows = TinyRows(model, embedded=False)
        options = {"parts": ["denoiser", "text"], "lr": 1e-2, "steps": 2, "gradient_checkpointing": on}
        trainer = tiny_trainer(tmp_path / str(on), model=model, rows=rows, adapters=found, **options)
        assert model.denoiser.is_gradient_checkpointing is on
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            trainer.loss(0)
        results.append((final(trainer), saved))
    (plain, much), (checkpointed, little) = results
    assert little < much / 2
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path):
    model = TinyModel()
    seen = set()
    model.denoiser.first.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    trainer = tiny_trainer(tmp_path, model=model, precision="bf16", steps=3, lr=1e-2)
    weights = final(trainer)
    assert seen == {torch.bfloat16}
    reference = final(tiny_trainer(tmp_path / "fp32", steps=3, lr=1e-2))
    for name, value in weights.items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, reference[name])
        torch.testing.assert_close(value, reference[name], atol=2e-2, rtol=0)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.precision=fp16"):
        tiny_trainer(tmp_path, precision="fp16")


def test_what_is_saved_is_the_average(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=5, lr=1e-2, ema=0.6)
    average = trainer.average
    result = load_file(trainer.fit() / "weights.safetensors")
    for (name, p), shadow in zip(trainer.parameters.items(), average.shadow, strict=True):
        assert torch.equal(result[name.removeprefix("unet.")], shadow)
        assert not torch.equal(p, shadow)


def test_an_adapter_leaves_the_base_alone_and_is_saved_with_its_metadata(tmp_path):
    model = tiny_model("sd")
    base = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    trainer = tiny_trainer(tmp_path, model=model, adapters=found, rows=TinyRows(model), lr=1e-2)
    trainer.metadata = {"trigger": "sks", "prompt": "a photo of sks"}
    path = trainer.fit()
    assert {k for k, v in model.denoiser.state_dict().items() if not torch.equal(v, base[k])} == set()
    assert adapters.read_header(path)["trigger"] == "sks"
    other = tiny_model("sd")
    loaded = adapters.load({"unet": other.denoiser}, path)
    assert all(torch.equal(v, found.tensors()[k]) for k, v in loaded.tensors().items())
    card = (tmp_path / "README.md").read_text()
    assert "base_model: tiny-sd" in card and "instance_prompt: a photo of sks" in card and "lora" in card


def test_full_fine_tuning_saves_a_pipeline_that_loads(tmp_path):
    from diffusers import StableDiffusionPipeline

    model = tiny_model("sd")
    trainer = tiny_trainer(tmp_path, model=model, rows=TinyRows(model), lr=1e-3, steps=2)
    pipe = StableDiffusionPipeline.from_pretrained(trainer.fit(), local_files_only=True)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, model.denoiser.state_dict()[name])


def test_full_fine_tuning_leaves_the_text_encoder_alone_unless_asked(tmp_path):
    for asked in (False, True):
        model = TinyModel()
        before = model.encoder.weight.clone()
        rows = TinyRows(model, embedded=not asked)
        tiny_trainer(
            tmp_path / str(asked), model=model, rows=rows, parts=["denoiser", "text"] if asked else None, lr=1e-2
        ).fit()
        assert torch.equal(model.encoder.weight, before) is not asked
        assert not any(p.requires_grad for p in model.vae.parameters())


def test_a_cached_condition_cannot_train_the_text_encoder(tmp_path):
    with pytest.raises(ValueError, match="no gradient"):
        tiny_trainer(tmp_path, parts=["denoiser", "text"]).fit()


def test_rows_of_the_log_are_means_over_their_steps(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=5, log_every=2)
    losses = []
    optimise = trainer.optimise
    trainer.optimise = lambda step: losses.append(optimise(step)) or losses[-1]
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    expected = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert {"lr", "grad_norm", "seconds"} <= rows[0].keys()


def test_the_model_is_frozen_but_for_the_adapter(tmp_path):
    model = tiny_model("sd")
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    trainer = tiny_trainer(tmp_path, model=model, adapters=found, rows=TinyRows(model))
    for module in (model.vae, model.denoiser, *model.of("text").values()):
        assert not any(p.requires_grad for p in module.parameters())
    assert sum(p.numel() for p in trainer.parameters.values()) == found.parameter_count


class Closed(TinyRows):
    """Says when it is told to let nothing work ahead."""

    said: tuple[str, ...] = ()

    def batch(self, step):
        self.said += ("batch",)
        if step == 2:
            raise ValueError("no third batch")
        return super().batch(step)

    def close(self):
        self.said += ("close",)


@pytest.mark.parametrize("steps", [2, 3])
def test_nothing_works_ahead_when_a_run_ends_or_draws(tmp_path, steps):
    model = TinyModel()
    rows = Closed(model)
    trainer = tiny_trainer(tmp_path, model=model, rows=rows, steps=steps)
    if steps == 3:
        with pytest.raises(ValueError, match="no third batch"):
            trainer.fit()
    else:
        trainer.fit()
    assert rows.said[-1] == "close"
    with trainer.looking():
        assert rows.said[-2:] == ("close", "close")
