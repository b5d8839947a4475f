"""What a user does with a family, from recipe to export, on its tiny pipeline: every family of continuous latents.

Runs are of two steps. What they draw, resume and export is judged by the stock pipeline of the family.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SIZE, save_tiny
from tiny_training import interrupt

from visiontune import adapters, assemble, models
from visiontune.cli.main import main
from visiontune.config import load_run
from visiontune.core import Request
from visiontune.models.diffusion import DiffusionModel
from visiontune.weights.keys import Keys, keys_of

FAMILIES = sorted(name for name, cls in models.families().items() if issubclass(cls, DiffusionModel))
REQUESTS = [Request(prompt="a red circle", seed=1), Request(prompt="small", seed=2)]


class Workshop:
    """A folder with a tiny model of one family, three photos and some prompts."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.model = family, folder, save_tiny(folder / "model", family)
        (folder / "prompts.txt").write_text("a red circle\na blue square\n")
        (folder / "photos").mkdir()
        rng = np.random.default_rng(0)
        for i in range(3):
            pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
            (folder / "photos" / f"{i}.txt").write_text("a photo of a [trigger] circle")
        flow = self.open().schedule.prediction == "flow"
        self.noisy = "{name: flow-sde, eta: 0.7}" if flow else "{name: ddim, eta: 1.0}"

    def open(self, folder: Path | None = None):
        return models.load(str(folder or self.model))

    def trainer(self, recipe: str, name: str, *more: str):
        common = ["train.trackers=[]", "train.device=cpu", "train.precision=no", "train.checkpoint_every=1"]
        shown = ["preview.prompts=['a circle']", "preview.seeds=[0]", "preview.steps=2"]
        where = [f"model={self.model}", f"out={self.folder / 'runs'}", f"name={name}"]
        return assemble.assemble(load_run(recipe, [*where, *common, *shown, "train.steps=2", *more]))

    def personalise(self, name: str, *more: str):
        data = [f"data.root={self.folder / 'photos'}", "data.prompt=null", "data.class_noun=circle"]
        prior = ["objective.prior_images=2", "objective.prior_steps=2"]
        parts = "train.parts=[denoiser, text_encoder]"
        return self.trainer(
            "personalise/lora", name, *data, *prior, parts, "train.batch_size=1", "train.lr=0.03", *more
        )

    @functools.cached_property
    def denoiser(self) -> Path:
        """The adapter of a personalisation of the denoiser alone."""
        return self.personalise("denoiser", "train.parts=[denoiser]").fit()

    def reward(self, recipe: str, name: str, *more: str):
        data = [f"data={self.folder / 'prompts.txt'}", "reward=redness", "objective.steps=3"]
        return self.trainer(recipe, name, *data, *more)

    def grpo(self, name: str, *more: str):
        sizes = ["train.batch_size=4", "objective.group=2", "objective.micro_batch=2", "objective.cfg_scale=2"]
        return self.reward("reward_tune/grpo", name, f"objective.dynamics={self.noisy}", *sizes, *more)


@pytest.fixture(scope="module", params=FAMILIES)
def shop(request, tmp_path_factory) -> Workshop:
    return Workshop(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def personal(shop) -> Path:
    """The adapter of a personalisation."""
    return shop.personalise("personal").fit()


def drawn(model, requests=REQUESTS):
    return model.draw(requests, steps=3, guidance=model.guidance(3.0))


def moved(file: Path) -> bool:
    """Whether training changed what starts at zero: all but the few layers whose outputs a family does not use."""
    changes = [tensor.any().item() for name, tensor in load_file(file).items() if name.endswith("up")]
    return len(changes) > 4 and sum(changes) > 0.8 * len(changes)


def test_data_and_prior_pictures_train_an_adapter_of_every_part(shop, personal):
    folders = list((shop.folder / "runs" / ".cache").glob("prior-*"))
    assert len(folders) == 1 and len(list(folders[0].glob("*.png"))) == 2
    header = adapters.read_header(personal)
    assert {layer.split(".")[0] for layer in header["layers"]} == {*shop.open().DENOISERS, "text_encoder"}
    assert moved(personal)


@pytest.mark.parametrize("recipe", ["personalise", "grpo"])
def test_an_interrupted_run_ends_in_the_same_bits(shop, recipe):
    train = getattr(shop, recipe)
    whole = load_file(train(f"{recipe}-whole").fit())
    interrupt(train(f"{recipe}-broken"), 1)
    broken = load_file(train(f"{recipe}-broken", "train.resume=true").fit())
    assert whole.keys() == broken.keys() and len(whole) > 4
    for name, tensor in whole.items():
        assert torch.equal(tensor, broken[name]), name
    assert any(tensor.any() for name, tensor in whole.items() if name.endswith("up"))


def test_a_rewards_gradient_reaches_the_adapter_through_the_sampler(shop):
    assert moved(shop.reward("reward_tune/alignprop", "prop", "train.batch_size=2").fit())


def test_sample_draws_what_the_stock_pipeline_draws_with_the_adapter(shop, personal, tmp_path):
    for name, more in (("adapted", [f"adapter={personal}"]), ("plain", [])):
        words = [f"model={shop.model}", f"out={tmp_path / name}", "prompts=a red circle", "seeds=[1]", "steps=3"]
        assert main(["sample", *words, "cfg_scale=3", "device=cpu", *more]) == 0
        model = shop.open()
        if more:
            adapters.load(model.networks(), personal).eval()
        with Image.open(tmp_path / name / "00000_seed1.png") as read:
            np.testing.assert_array_equal(
                np.asarray(read), (drawn(model, REQUESTS[:1])[0] * 255).round().astype("uint8")
            )
    first, second = ((tmp_path / name / "00000_seed1.png").read_bytes() for name in ("adapted", "plain"))
    assert first != second


def test_the_stock_pipeline_loads_an_exported_lora_and_draws_the_same(shop, personal, tmp_path, capsys):
    ours = shop.open()
    words = [str(tmp_path / "lora.safetensors"), "--dtype", "fp32"]
    if "text_encoder" not in ours.pipe._lora_loadable_modules:
        assert main(["export", str(personal), *words]) == 2
        assert "loads no LoRA of its text_encoder" in capsys.readouterr().err
        personal = shop.denoiser
    assert main(["export", str(personal), *words]) == 0
    plain = drawn(ours)
    adapters.load(ours.networks(), personal).eval()
    cls = type(ours)
    stock = type(ours.pipe).from_pretrained(shop.model, **cls.load_options)
    stock.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    found = drawn(cls(stock))
    np.testing.assert_allclose(found, drawn(ours), rtol=0, atol=1e-5)
    assert abs(found - plain).max() > 1e-3


def test_a_merged_model_is_a_model_of_the_family_and_draws_the_same(shop, personal, tmp_path):
    options = ["--format", "merged", "--dtype", "fp32"]
    assert main(["export", str(personal), str(tmp_path / "merged"), *options]) == 0
    ours = shop.open()
    adapters.load(ours.networks(), personal).eval()
    merged = shop.open(tmp_path / "merged")
    assert merged.family == shop.family
    np.testing.assert_allclose(drawn(merged), drawn(ours), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["kohya", "diff"])
def test_what_is_written_for_other_tools_is_read_back_and_draws_the_same(shop, personal, tmp_path, capsys, kind):
    """Or is refused in one line: for the family, or for a text encoder that the tools have no names for."""
    written, back = (str(tmp_path / f"{name}.safetensors") for name in ("written", "back"))
    words = [written, "--format", kind, "--dtype", "fp32"]
    known = type(keys_of(shop.family, {})) is not Keys
    if main(["export", str(personal), *words]) == 2:
        refusal = capsys.readouterr().err
        assert refusal.count("\n") == 1 and not Path(written).exists()
        assert (
            "no name for 'text_encoder." if known else f"no names for the layers of the family '{shop.family}'"
        ) in refusal
        if not known:
            return
        personal = shop.denoiser
        assert main(["export", str(personal), *words]) == 0
    assert known and main(["import", written, back, "--model", str(shop.model)]) == 0
    theirs, ours = shop.open(), shop.open()
    adapters.load(theirs.networks(), back).eval()
    adapters.load(ours.networks(), personal).eval()
    np.testing.assert_allclose(drawn(theirs), drawn(ours), rtol=0, atol=1e-5)
    assert abs(drawn(shop.open()) - drawn(ours)).max() > 1e-3
