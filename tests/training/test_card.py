"""The model card: what it calls the base and the adapter."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from tiny_training import TinyRows, tiny_trainer

from visiontune import adapters

CALLED = {"lora": ("lora", {}), "dora": ("lora", {"dora": True}), "coft": ("oft", {"block_size": 4, "coft": True})}


@pytest.mark.parametrize("name", CALLED)
def test_a_variant_is_called_by_its_own_name_and_a_folder_without_its_place(name, tmp_path):
    method, options = CALLED[name]
    model = tiny_model("sd")
    model.source = str(tmp_path / "models" / "my-base")
    found = adapters.attach({"unet": model.denoiser}, method, targets=["to_q"], **options)
    tiny_trainer(tmp_path / "run", model=model, adapters=found, rows=TinyRows(model), steps=1).fit()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"- {name}\n" in card and f"A {name} adapter for `my-base`" in card
    assert str(tmp_path) not in card and "base_model" not in card


def test_a_model_of_the_hub_is_named_for_it(tmp_path):
    model = tiny_model("sd")
    model.source = "owner/name"
    found = adapters.attach({"unet": model.denoiser}, "lora", targets=["to_q"])
    tiny_trainer(tmp_path / "run", model=model, adapters=found, rows=TinyRows(model), steps=1).fit()
    assert "base_model: owner/name" in (tmp_path / "run" / "README.md").read_text()
