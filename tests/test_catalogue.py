from __future__ import annotations

import pytest

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
    with pytest.raises(UserError, match="No such file"):
        catalogue.read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        catalogue.read_yaml(tmp_path / "b.yaml")
