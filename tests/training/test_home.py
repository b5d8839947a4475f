"""What a run may remove from its folder, and that it has the folder to itself."""

from __future__ import annotations

import pytest
from test_files import holder
from tiny_training import tiny_trainer

from visiontune.errors import UserError
from visiontune.files import Lock
from visiontune.training import home, preview


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "mine.txt").write_text("mine")


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_pictures_of_lost_steps_are_forgotten_and_nobody_elses(tmp_path):
    samples, own = tmp_path / "samples", ("a-step-000900", "step-000900-good", "step-9", "step-final", ".step-kept")
    folders(samples, *own, "step-000000", "step-000002", "step-000004", ".step-000006.1.tmp")
    for step in (0, 2, 4):
        home.note(tmp_path, preview.folder(tmp_path, step))
    home.forget_steps(samples, 2)
    assert names(samples) == sorted([*own, "step-000000", "step-000002"])


def test_what_lies_where_a_run_writes_is_refused(tmp_path):
    folders(tmp_path, "samples/step-000900")
    with pytest.raises(UserError, match="step-000900 lies where the run writes, and no run wrote it: move it away"):
        home.forget_steps(tmp_path / "samples", 0)
    with pytest.raises(UserError, match="no run wrote it"):
        home.clear(tmp_path, tmp_path / "samples" / "step-000900")
    assert names(tmp_path / "samples" / "step-000900") == ["mine.txt"]


def test_a_model_of_the_users_own_is_not_replaced_by_the_result(tmp_path):
    folders(tmp_path, "model")
    with pytest.raises(UserError, match="model lies where the run writes"):
        tiny_trainer(tmp_path).fit()
    assert names(tmp_path / "model") == ["mine.txt"]


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl", "judged.json"])
def test_a_file_of_the_users_own_is_not_written_over_by_a_run_that_begins(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} lies where the run writes"):
        tiny_trainer(tmp_path, steps=1).fit()
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    tiny_trainer(tmp_path, steps=1).fit()
    tiny_trainer(tmp_path, steps=2, resume=True).fit()


def test_a_run_replaces_what_it_wrote_itself(tmp_path):
    for steps in (2, 3):
        tiny_trainer(tmp_path, steps=steps, resume=True, checkpoint_every=1).fit()
    assert home.wrote(tmp_path, tmp_path / "model") and not (tmp_path / ".lock").exists()


def test_a_run_of_today_is_known_by_its_record_alone(tmp_path):
    tiny_trainer(tmp_path, steps=2, checkpoint_every=1).fit()
    (tmp_path / "samples" / "step-000900").mkdir(parents=True)
    (tmp_path / "samples" / "step-000900" / "grid.png").touch()
    with pytest.raises(UserError, match="no run wrote it"):
        tiny_trainer(tmp_path, steps=3, resume=True).fit()


def test_runs_of_earlier_versions_are_known_by_what_previews_consist_of(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name, files in {"step-000002": ("grid.png", "00_seed0.png"), "step-000004": ("grid.png", "notes.txt")}.items():
        folder = tmp_path / "samples" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    written = [path for path in (tmp_path / "samples").iterdir() if home.wrote(tmp_path, path)]
    assert [path.name for path in written] == ["step-000002"] and home.wrote(tmp_path, tmp_path / "model")


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    trainer, other = tiny_trainer(tmp_path), holder(tmp_path)
    with pytest.raises(UserError, match=f"written to by process {other.pid}"):
        trainer.fit()
    other.kill()
    other.wait()
    trainer.fit()
    Lock(tmp_path).hold()


@pytest.mark.parametrize(("rank", "held"), [("0", True), ("1", False)])
def test_the_first_process_of_a_run_has_the_folder_for_all(tmp_path, monkeypatch, rank, held):
    monkeypatch.setenv("RANK", rank)
    with home.Home(tmp_path):
        assert (tmp_path / ".lock").exists() == held


@pytest.mark.parametrize("name", ["metrics.jsonl", "README.md", "recipe.yaml", ".written"])
def test_a_folder_where_the_run_keeps_a_file_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is not a file, as the run needs it: move it away"):
        home.refuse_others_kind(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "guards", "tensorboard"])
def test_a_file_or_a_dead_link_where_the_run_keeps_a_folder_is_refused(tmp_path, name):
    home.refuse_others_kind(tmp_path)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name} is not a folder, as the run needs it: move it away"):
        home.refuse_others_kind(tmp_path)
