from __future__ import annotations

import pytest
import yaml

from visiontune import catalogue
from visiontune.errors import UserError


def test_names_are_paths_without_suffix():
    assert {"personalise/oft", "personalise/lora", "sample/prompts"} <= set(catalogue.names("pipelines"))
    assert "pocket/bumble" in catalogue.names("datasets")
    assert catalogue.find("pipelines", "personalise/oft").name == "oft.yaml"


def test_an_unknown_entry_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'personalise/oft'"):
        catalogue.find("pipelines", "personalise/otf")


def test_nothing_outside_the_catalogue_is_reachable():
    with pytest.raises(UserError):
        catalogue.find("rewards", "../pipelines/personalise/oft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1\n", "line 3, column 1"),
        ("a: 1\na: 2\n", "the option 'a' is given twice"),
        ("train:\n  lr: 1\n  lr: 2\n", "line 3, column 3: the option 'lr' is given twice"),
        ("- a\n", "must hold options"),
        ("", "must hold options"),
    ],
)
def test_bad_yaml_is_one_readable_line(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        catalogue.read_yaml(file)
    assert message in str(error.value) and "\n" not in str(error.value) and str(file) in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        catalogue.read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        catalogue.read_yaml(tmp_path / "b.yaml")


def _recipe(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_takes_what_it_does_not_say_from_the_one_it_extends(tmp_path):
    adapter = {"name": "oft", "block_size": 8, "targets": "all"}
    _recipe(tmp_path / "first.yaml", verb="train", adapter=adapter, train={"lr": 1.0, "steps": 5})
    _recipe(tmp_path / "second.yaml", extends="first.yaml", adapter={"coft": True}, train={"lr": 2.0})
    third = _recipe(tmp_path / "third.yaml", extends="second.yaml", adapter={"name": "lora", "rank": 2})
    assert catalogue.read_recipe(tmp_path / "second.yaml") == {
        "verb": "train",
        "adapter": {**adapter, "coft": True},
        "train": {"lr": 2.0, "steps": 5},
    }
    assert catalogue.read_recipe(third)["adapter"] == {"name": "lora", "rank": 2}
    by_name = _recipe(tmp_path / "mine.yaml", extends="personalise/oft", name="mine")
    assert catalogue.read_recipe(by_name) == {**catalogue.load("pipelines", "personalise/oft"), "name": "mine"}


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    one = _recipe(tmp_path / "one.yaml", extends="two.yaml")
    _recipe(tmp_path / "two.yaml", extends="one.yaml")
    with pytest.raises(UserError, match=r"one.yaml extends itself: take `extends` out of one of one.yaml, two.yaml"):
        catalogue.read_recipe(one)


def test_an_unknown_recipe_to_extend_is_named(tmp_path):
    with pytest.raises(UserError, match="'personalise/otf' is not a recipe"):
        catalogue.read_recipe(_recipe(tmp_path / "one.yaml", extends="personalise/otf"))
