from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import yaml

from visiontune import config
from visiontune.assemble.build import build
from visiontune.view import runs

PROMPTS = [f"a {size} {color} {shape}" for size in ("small", "large") for color in ("red", "blue") for shape in "ox"]


@pytest.fixture
def recipe(tmp_path, tiny_folder) -> Path:
    """Four steps of training by reward on the tiny model, looked at after every two."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""verb: train
name: tiny
model: {tiny_folder}
adapter: {{name: lora, rank: 2}}
objective: {{name: alignprop, steps: 2, cfg_scale: 1}}
reward: redness
data: {tmp_path}/prompts.txt
train: {{steps: 4, batch_size: 2, checkpoint_every: 1, trackers: [], device: cpu, lr: 1e-2}}
guards: {{every: 2, holdout: 3, reward: brightness}}
"""
    )
    return path


def log():
    return [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]


def test_a_run_with_guards_logs_them_and_trains_on_the_other_prompts(cli, recipe):
    assert cli("train", recipe).code == 0
    measured = [row for row in log() if "guard/reward" in row]
    assert [row["step"] for row in measured] == [0, 2, 4]
    trainer = build(config.load_run(recipe), cache_dir=Path("cache"))
    assert len(trainer.guard.prompts) == 3 and len(trainer.rows.prompts) == 5
    assert sorted(trainer.guard.prompts + trainer.rows.prompts) == sorted(PROMPTS)
    assert (trainer.guard.steps, trainer.guard.cfg_scale) == (2, 1.0)
    resolved = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())
    assert resolved["guards"]["every"] == 2 and resolved["guards"]["diversity_min"] == 0.5
    assert config.load_run("runs/tiny/recipe.yaml") == config.load_run(recipe)


def test_an_alarm_ends_with_a_status_of_its_own_and_a_run_goes_on_with_looser_bounds(cli, recipe):
    stopped = cli("train", recipe, "guards.change_max=1e-9")
    assert stopped.code == 3 and "guards stopped the run at step 2: change is" in stopped.err
    assert stopped.err.splitlines()[-1].startswith("visiontune: guards stopped") and "Traceback" not in stopped.err
    assert runs.read(Path("runs/tiny"))["alarms"] == [
        {"step": 2, "alarms": "bounds of the guards broken: 1; see guards/step-000002"}
    ]
    assert Path("runs/tiny/guards/step-000002").is_dir()
    assert cli("train", recipe, "guards.change_max=1e-9", "train.resume=true").code == 3
    other = cli("train", recipe, "train.resume=true", "guards.holdout=4")
    assert other.code == 2 and "guards.holdout=3, not 4" in other.err
    assert cli("train", recipe, "train.resume=true", "guards.change_max=null").code == 0
    assert Path("runs/tiny/adapter.safetensors").is_file()
    assert [row["step"] for row in log() if "guard/change" in row] == [0, 2, 4]


def test_prompts_of_ones_own_leave_the_training_prompts_alone(recipe):
    run = config.load_run(recipe, ["guards.prompts=['a green triangle']", "data.trigger=sks"])
    trainer = build(run, cache_dir=Path("cache"))
    assert trainer.guard.prompts == ["a green triangle"] and trainer.rows.prompts == PROMPTS


def test_guards_can_be_turned_off(cli, recipe):
    assert cli("train", recipe, "guards=none").code == 0
    assert not any(name.startswith("guard/") for row in log() for name in row)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guards.diversity_min=2"], "guards.diversity_min must be a number above 0 and below 1, not '2'"),
        (["guards.diversty_min=1"], "guards.diversty_min is not an option of guards; did you mean 'diversity_min'"),
        (["guards.holdout=8"], "guards.holdout=8 leaves none of 8 prompts"),
        (["guards.reward=redniss"], "redniss"),
        (["objective=denoising", "reward=none", "data=pocket/bumble"], "guards are for objectives that draw"),
        (["guards.reward={name: mix, terms: [{reward: redness, normalise: running}]}"], "whose scale moves"),
        (["guards.terms.klx=1"], "guards.terms.klx is not logged by this run"),
    ],
)
def test_mistakes_are_one_line(cli, recipe, words, message):
    result = cli("train", recipe, *words)
    assert result.code == 2 and message in result.err, result.err


def test_a_guard_that_is_the_trained_reward_is_warned_of(recipe):
    for reward, warned in (("redness", True), ("{name: color, color: red}", True), ("brightness", False)):
        run = config.load_run(recipe, [f"guards.reward={reward}"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build(run, cache_dir=Path("cache"))
        assert any("rises while it is hacked" in str(w.message) for w in caught) is warned


def test_show_prints_the_options(cli):
    out = cli("show", "guards").out
    assert "diversity_min" in out and "on_alarm: one of stop, warn, lower_lr; default stop" in out
