"""``visiontune merge``: runs of one base added up, by told weights or by a search."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model

from visiontune.adapters import attach, load, read_header
from visiontune.models import load as load_model


@pytest.fixture
def runs(tmp_path, tiny_folder):
    """Two folders with LoRAs of the tiny model, and what each adds to a layer."""
    model, changes = tiny_model(), []
    for number, name in enumerate(("low", "high")):
        made = attach({"unet": model.denoiser}, "lora", targets="attention", rank=2)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        (tmp_path / name).mkdir()
        made.save(tmp_path / name / "adapter.safetensors", {"base_model": str(tiny_folder), "trigger": "sks"})
        changes.append({layer: made.change(layer)[0] for layer in made.layers})
        made.detach()
    return changes


def test_adapters_are_added_up_and_the_file_says_so(cli, runs, tmp_path):
    done = cli("merge", "low", "high", "both.safetensors", "--weight", ".5", "--weight", "-.25")
    assert done.code == 0, done.err
    header = read_header(tmp_path / "both.safetensors")
    assert header["merged"] == "0.5 low + -0.25 high" and header["trigger"] == "sks"
    made = load(tiny_model().networks(), tmp_path / "both.safetensors")
    for layer in made.layers:
        expected = 0.5 * runs[0][layer] - 0.25 * runs[1][layer]
        torch.testing.assert_close(made.change(layer)[0], expected, rtol=1e-4, atol=1e-6)


def test_how_runs_are_drawn_is_kept_and_must_be_one_way(cli, runs, tmp_path):
    for name in ("low", "high"):
        file = tmp_path / name / "adapter.safetensors"
        with safe_open(file, "pt") as held:
            tensors, header = {key: held.get_tensor(key) for key in held.keys()}, held.metadata()  # noqa: SIM118
        save_file(tensors, file, {**header, "canvas": "source, image"})
        done = cli("merge", "low", "high", f"{name}.safetensors", "--weight", "1", "--weight", "1")
        if name == "low":
            assert "drawn in different ways (canvas in their headers)" in done.err
    assert done.code == 0 and read_header(tmp_path / "high.safetensors")["canvas"] == "source, image"


def test_weights_are_searched_on_held_out_pictures(cli, runs, photos, tmp_path):
    done = cli("merge", "low", "high", "both.safetensors", "--data", photos, "--grid", "0", "1", "--count", 2)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if "held-out loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert [line.split(":")[0].strip() for line in lines] == ["the base", "low", "high", "merged"]
    assert losses[3] == min(losses) and len(set(losses)) >= 3


def test_models_of_all_weights_are_merged_into_one(cli, tiny_folder, tmp_path):
    base, ends = tiny_model(), []
    for number, name in enumerate(("one", "two")):
        model = tiny_model()
        with torch.no_grad():
            for p in model.denoiser.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        model.save(tmp_path / name / "model")
        ends.append(model.denoiser.state_dict())
    words = ("merge", "one", "two", "merged", "--weight", "0.5", "--weight", "0.5")
    assert "name it by --model" in cli(*words).err
    assert cli(*words, "--model", tiny_folder).code == 0
    made = load_model(str(tmp_path / "merged"))
    for name, value in made.denoiser.state_dict().items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2, rtol=1e-4, atol=1e-6)
    vaes = [model.networks()["vae"].state_dict() for model in (made, base)]
    assert all(torch.equal(vaes[0][name], vaes[1][name]) for name in vaes[0])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["low", "x.safetensors", "--weight", "1"], "takes two runs or more"),
        (["low", "high", "x.safetensors"], "either a --weight for each run, or --data"),
        (["low", "high", "x.safetensors", "--weight", "1"], "1 --weight for 2 runs"),
        (["low", "high", "x", "--weight", "1", "--weight", "1"], "merged into a .safetensors file"),
    ],
)
def test_what_it_refuses(cli, runs, words, line):
    done = cli("merge", *words)
    assert done.code == 2 and line in done.err and len(done.err.strip().splitlines()) == 1
