from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("glance")


def test_a_run_is_judged_at_its_checkpoints_and_strengths(cli, recipe):
    assert cli("train", recipe, "train.checkpoint_every=1", "train.steps=2", "train.lr=1e-2").code == 0
    result = cli(
        "evaluate", "runs/tiny", "--clip", "pocket/clip", "--scales", "0.5,1", "--checkpoints", "--out", "c.json"
    )
    assert result.code == 0, result.err
    written = json.loads(Path("c.json").read_text())
    assert [(p["step"], p["scale"]) for p in written["points"]] == [(0, 0), (1, 0.5), (1, 1), (2, 0.5), (2, 1)]
    assert written["points"][0]["learnt"] == 0 and written["points"][0]["kept"] == pytest.approx(1, abs=1e-3)
    assert written["best"] in written["points"] and "best: step" in result.out
    final = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--out", "d.json")
    assert final.code == 0, final.err
    assert json.loads(Path("d.json").read_text())["points"][1]["scores"] == written["points"][-1]["scores"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/none"], "holds no finished run"),
        (["runs/none", "--scales", "a"], "list of numbers"),
        (["runs/none", "--scales", "1,nan"], "between -4 and 4"),
        (["runs/none", "--out", "x.txt"], ".json file"),
    ],
)
def test_what_cannot_be_judged_is_one_line(cli, words, message):
    result = cli("evaluate", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "change", [{"objective": {"name": "evil.py"}}, {"adapter": {"name": "evil"}}, {"reward": {"name": "evil.py"}}]
)
def test_a_folder_of_somebody_elses_has_no_code_run(cli, recipe, change):
    assert cli("train", recipe).code == 0
    held = Path("runs/tiny/recipe.yaml")
    held.write_text(yaml.safe_dump(yaml.safe_load(held.read_text()) | change))
    Path("evil.py").write_text("open('ran', 'w')")
    result = cli("evaluate", "runs/tiny", "--clip", "pocket/clip")
    assert result.code == 0, result.err
    assert not Path("ran").exists()


@pytest.mark.parametrize("option", ["train.ema=0.9", "train.optimizer=evil.Optimizer"])
def test_checkpoints_that_are_not_what_is_averaged_are_refused(cli, recipe, option):
    assert cli("train", recipe).code == 0
    held, (path, _, value) = Path("runs/tiny/recipe.yaml"), option.partition("=")
    content = yaml.safe_load(held.read_text())
    content["train"][path.removeprefix("train.")] = value
    held.write_text(yaml.safe_dump(content))
    Path("evil.py").write_text("open('ran', 'w')")
    result = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--checkpoints")
    assert result.code == 2 and "leave out --checkpoints" in result.err and not Path("ran").exists()


def test_a_damaged_checkpoint_and_a_place_that_cannot_be_written_are_one_line(cli, recipe):
    assert cli("train", recipe).code == 0
    Path("folder.json").mkdir()
    taken = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--out", "folder.json")
    assert taken.code == 2 and "folder.json cannot be written" in taken.err
    (Path("runs/tiny/checkpoints/step-000002") / "weights.safetensors").write_bytes(b"half")
    damaged = cli("evaluate", "runs/tiny", "--clip", "pocket/clip", "--checkpoints")
    assert damaged.code == 2 and "step-000002" in damaged.err and "cannot be read" in damaged.err


def test_a_run_ends_with_what_it_learnt_and_kept(cli, recipe):
    """Its result at every strength, the checkpoint before it at full strength; the result stays what it was."""
    judge = "judge={clip: pocket/clip, steps: 2, prompts: 2, seeds: 1, scales: [0.5, 1]}"
    steps = ["train.checkpoint_every=1", "train.steps=2", "train.lr=1e-2"]
    plain = cli("train", recipe, *steps, "name=plain")
    assert plain.code == 0 and "judged" not in plain.out and not Path("runs/plain/judged.json").exists()
    result = cli("train", recipe, *steps, judge)
    assert result.code == 0, result.err
    assert "best: step" in result.out and "(the base: 0% and 100%)" in result.out
    written = json.loads(Path("runs/tiny/judged.json").read_text())
    assert [(p["step"], p["scale"]) for p in written["points"]] == [(0, 0), (1, 1), (2, 0.5), (2, 1)]
    assert written["best"] in written["points"]
    weights = [Path(f"runs/{name}/adapter.safetensors") for name in ("tiny", "plain")]
    assert load_file(weights[0]).keys() == load_file(weights[1]).keys()
    assert all(t.equal(load_file(weights[1])[name]) for name, t in load_file(weights[0]).items())


def test_a_full_fine_tune_is_judged_against_its_base_opened_anew(cli, recipe):
    judge = "judge={clip: pocket/clip, steps: 2, prompts: 2, seeds: 1}"
    result = cli("train", recipe, "adapter=none", "train.lr=1e-3", judge)
    assert result.code == 0, result.err
    written = json.loads(Path("runs/tiny/judged.json").read_text())
    assert [(p["step"], p["scale"]) for p in written["points"]] == [(0, 0), (2, 1)]
    assert written["points"][0]["kept"] == pytest.approx(1, abs=1e-3) and written["points"][1]["kept"] < 0.999


def test_evaluating_a_subject_of_one_s_own_needs_a_clip(cli, recipe):
    assert cli("train", recipe).code == 0
    result = cli("evaluate", "runs/tiny")
    assert result.code == 2 and "--clip" in result.err and result.err.count("\n") == 1


def test_a_run_without_pictures_is_not_judged(cli):
    words = ["reward_tune/alignprop", "name=red", "judge={clip: pocket/clip}"]
    for verb in ("train", "check"):
        result = cli(verb, *words)
        assert result.code == 2 and "leave judge out" in result.err and not Path("runs/red").exists()


def test_who_judges_is_asked_before_the_run_begins(cli, recipe):
    for verb in ("check", "train"):
        unknown = cli(verb, recipe, "judge={clip: nowhere}")
        assert unknown.code == 2 and "'nowhere' cannot be loaded" in unknown.err and not Path("runs/tiny").exists()
    assert "judge: nobody can: name a CLIP" in cli("check", recipe, "judge={}").out
    nobody = cli("train", recipe, "judge={}")
    assert nobody.code == 0 and "not judged: name a CLIP" in nobody.out


def test_what_models_put_together_is_one_table_each_and_their_difference(cli, recipe, tiny_folder):
    assert cli("train", recipe, "train.lr=1e-2").code == 0
    words = ["--count", 1, "--steps", 1, "--judge", "jpeg", "--out", "c.json", "--categories", "colour,numeracy"]
    result = cli("evaluate", "compose", tiny_folder, "runs/tiny", *words)
    assert result.code == 0, result.err
    assert result.out.count("numeracy") == 3 and "runs/tiny beside" in result.out
    written = json.loads(Path("c.json").read_text())
    base, trained = written["models"]
    guided = cli("evaluate", "compose", tiny_folder, "--guidance", "[{pag: 5}]", *words)
    assert guided.code == 0, guided.err
    again, other = json.loads(Path("c.json").read_text())["models"]
    assert again == base and other["rows"] != base["rows"] and "[{pag: 5}] beside" in guided.out
    assert [p["prompt"] for p in base["pictures"]] == [p["prompt"] for p in trained["pictures"]]
    assert base["rows"] != trained["rows"] and Path("c.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compose", "--scales", "0.5"], "leave them out of compose"),
        (["./compose"], "holds no finished run"),
        (["compose", "nowhere"], "name a reward"),
        (["compose", "--tasks", "own.jsonl"], "leave --tasks out"),
        (["compose", "--count", "0"], "from 1 to 200"),
        (["compose", "--judge", "nothing"], "nothing"),
        (["compose", "--guidance", "[{pagg: 1}]"], "'pagg'"),
        (["compose", "--guidance", "3"], "guidance"),
        (["compose", "--categories", "colour,shap"], "'shap'; did you mean 'shape'"),
        (["runs/none", "--count", "3"], "'visiontune evaluate compose'"),
        (["runs/none", "pocket/sd"], "'visiontune evaluate compose'"),
    ],
)
def test_what_is_of_the_other_judgement_is_one_line(cli, words, message):
    result = cli("evaluate", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
