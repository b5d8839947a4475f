"""Runs whose networks are sharded by FSDP2, on gloo: they do what one process does, and go on on any number."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import apart
from safetensors.torch import load_file
from tiny_training import TinyModel, tiny_batch, tiny_trainer
from training import shard_worker as worker
from workshop import Workshop

from visiontune import adapters, assemble
from visiontune.config import load_run
from visiontune.errors import UserError
from visiontune.objectives import denoising, dreambooth, unigrpo
from visiontune.objectives.base import Tools
from visiontune.training import checkpoint, resume, sharding
from visiontune.training.config import TrainConfig

RESULTS = {
    "adapter": ("adapter.safetensors",),
    "watched": ("adapter.safetensors",),
    "full": ("model/transformer/diffusion_pytorch_model.safetensors",),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the runs of two processes, one after the other."""
    folder = tmp_path_factory.mktemp("shared")
    Workshop("sd3", make(folder / "shop"))
    assert apart("training.shard_worker:two", folder, *worker.RUNS) == [0, 0]
    return folder


def make(folder):
    folder.mkdir()
    return folder


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", worker.RUNS)
def test_two_processes_with_a_share_of_the_weights_train_like_one(tmp_path, shared, name):
    if name == "watched":
        Workshop("sd3", make(tmp_path / "shop"))
    worker.one(tmp_path, name)
    for file in RESULTS.get(name, ("model/weights.safetensors",)):
        one, two = load_file(tmp_path / name / file), load_file(shared / name / file)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(rows(shared / name), rows(tmp_path / name), strict=True):
        ours, theirs = (
            {k: v for k, v in row.items() if k not in ("seconds", "clip_fraction")} for row in (ours, theirs)
        )
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_seed0.png"))
    assert len(drawn) == {"adapter": 2, "full": 2, "watched": 1}.get(name, 0)
    for path in drawn:
        one, two = (np.asarray(Image.open(root / path), np.int16) for root in (tmp_path, shared))
        assert abs(one - two).max() <= 1
    for path in (tmp_path / name).rglob("*.json"):
        assert path.read_text() == (shared / path.relative_to(tmp_path)).read_text()


def test_a_sharded_checkpoint_goes_on_bit_for_bit_and_with_its_weights_on_other_numbers_of_processes(tmp_path, caplog):
    worker.kept(tmp_path / "plain", worker.ROWS, steps=2).fit()
    assert apart("training.shard_worker:goes_on", tmp_path) == [0] * 5
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    name = "model/weights.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    early = checkpoint.folder(whole, 2)
    assert not (early / checkpoint.WEIGHTS).exists() and len(list((early / "shards").iterdir())) == 2
    assert not list((whole / "checkpoints").glob(".*"))
    run = worker.kept(whole, worker.ROWS, steps=worker.STEPS + 1)
    assert resume.take_up(run) == worker.STEPS
    assert "by 2 processes, and 1 go on" in caplog.text
    weights, state = checkpoint.load(checkpoint.latest(whole))
    assert weights.keys() == run.parameters.keys()
    assert all(torch.equal(p, weights[name]) for name, p in run.parameters.items())
    # What is averaged is what the two left as their result.
    result = load_file(whole / name)
    shadows = dict(zip(run.parameters, run.average.shadow, strict=True))
    assert all(torch.equal(shadows[f"unet.{key}"], value) for key, value in result.items())
    moments = [entry["exp_avg_sq"] for entry in run.optimizer.state.values()]
    saved = [entry["exp_avg_sq"] for entry in state["parts"]["optimisation"]["optimizer"]["state"].values()]
    assert len(moments) == len(weights) and all(map(torch.equal, moments, saved)) and all(m.any() for m in moments)
    run.fit()
    with pytest.raises(UserError, match=r"train\.batch_size=3, not 5"):
        resume.take_up(worker.kept(broken, 5))
    sorted((checkpoint.latest(broken) / "shards").iterdir())[0].unlink()
    with pytest.raises(UserError, match="has not all of"):
        resume.take_up(worker.kept(broken, worker.ROWS))


@pytest.mark.parametrize(("lockstep", "calls"), [(False, 1), (True, 4)])
def test_what_the_base_reads_is_read_as_often_as_other_processes_have_to(monkeypatch, lockstep, calls):
    model = TinyModel()
    batch = tiny_batch(model, 0, 1, 2, embedded=False)
    asked = []
    monkeypatch.setattr(model, "embed", lambda prompts, embed=model.embed: [asked.append(prompts), embed(prompts)][1])
    x, t = torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long)
    objective = dreambooth.build(dreambooth.Config())
    for _ in range(2):
        objective.targets(model, x, t, x, batch, Tools(lockstep=lockstep))
    assert len(asked) == calls


@pytest.fixture
def fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "value", "mend"),
    [
        ("FSDP_VERSION", "1", "fsdp_version to 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward to true"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params to false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"train\.gradient_checkpointing=true"),
        ("FSDP_IGNORED_MODULES", "proj_.*", "leave fsdp_ignored_modules out"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "SHARDED_STATE_DICT"),
        ("FSDP_AUTO_WRAP_POLICY", "BY_LUCK", "cannot be read"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config is not supported"),
    ],
)
def test_what_accelerate_may_ask_for_and_a_run_cannot_do_is_one_line(fsdp, variable, value, mend):
    fsdp.setenv(variable, value)
    with pytest.raises(UserError, match=mend) as caught:
        sharding.asked()
    assert "\n" not in str(caught.value)


def test_without_fsdp_nothing_is_asked_and_one_process_shards_nothing(tmp_path, fsdp, caplog):
    assert tiny_trainer(tmp_path).shards is None
    assert "there is one process" in caplog.text
    fsdp.delenv("ACCELERATE_USE_FSDP")
    assert sharding.asked() is None


def test_what_needs_whole_weights_is_refused(tmp_path):
    model, objective, train = TinyModel(), denoising.build(denoising.Config()), TrainConfig()
    sharding.check(model, None, objective, train)
    with pytest.raises(UserError, match="'unigrpo' computes on more rows"):
        sharding.check(model, None, unigrpo.build(unigrpo.Config()), train)
    with pytest.raises(UserError, match=r"train\.precision=bf16"):
        sharding.check(model, None, objective, TrainConfig(precision="fp16"))
    found = adapters.attach(model.of("denoiser"), "sara", targets="all", presets=model.presets())
    with pytest.raises(UserError, match="'sara' chooses among the base's weights"):
        sharding.check(model, found, objective, train)
    model.denoiser.time.weight = torch.nn.Parameter(torch.zeros(16, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="the unet is quantised"):
        sharding.check(model, None, objective, train)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=sara"], "adapter 'sara' chooses among"),
        (["adapter=lora", "model.quantize=int8"], r"leave model\.quantize out"),
        (["adapter=lora", "model.compile=true"], "set model.compile to false"),
        (["adapter=lora", "judge={}"], "set judge=none"),
        (["adapter=lora", "objective=unigrpo"], "start without FSDP"),
    ],
)
def test_a_recipe_that_cannot_be_sharded_is_refused_before_its_model_is_looked_for(tmp_path, fsdp, words, message):
    run = load_run("personalise/lora", ["model=nowhere/to-be-found", f"out={tmp_path}", "data.root=.", *words])
    with pytest.raises(UserError, match=message):
        assemble.train(run)
