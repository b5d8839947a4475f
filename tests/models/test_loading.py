"""Opening a model by name, folder or Hub id, and every way in which that can go wrong."""

from __future__ import annotations

import json
import shutil
import socket

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import remade, save_tiny, tiny_model, tiny_pipe

from visiontune import models
from visiontune.diffusion.guidance import Embedded
from visiontune.errors import UserError
from visiontune.models import pocket
from visiontune.models.clip import load_clip
from visiontune.models.sources import weights_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    """What the Hub answers: set `hub["error"]`. No test reaches the network."""
    answer = {"error": ConnectionError("[Errno -2] Name or service not known\nand a second line")}

    def model_info(self, repo_id, **kwargs):
        raise answer["error"]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return answer


def refusal(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        models.load(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_gives_the_model_that_was_saved(saved):
    model, original = models.load(str(saved)), tiny_model("sd")
    assert (model.family, model.source, model.dtype) == ("sd", str(saved), torch.float32)
    prompts = ["a red circle", "sks!"]
    cond = model.embed(prompts)
    torch.testing.assert_close(cond.tokens, original.embed(prompts).tokens)
    x_t, t = torch.ones(2, 4, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(model.predict(x_t, t, cond), original.predict(x_t, t, cond), rtol=0, atol=1e-5)
    for part in ("vae", "text", "denoiser"):
        assert model.fingerprint(part) == original.fingerprint(part)
    for module in (model.vae, model.denoiser, *model.of("text").values()):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert (model.resolution, model.downsample, model.latent_channels, model.reader.limit) == (16, 2, 4, 32)


def test_the_folder_of_a_run_stands_for_the_model_in_it(folder):
    model = models.load(str(folder.parent))
    assert model.fingerprint("denoiser") == tiny_model("sd").fingerprint("denoiser")
    assert model.source == str(folder.parent)


def test_the_pipeline_class_chooses_the_family(tmp_path):
    tiny_pipe("sdxl").save_pretrained(tmp_path)
    model, original = models.load(str(tmp_path)), tiny_model("sdxl")
    assert model.family == "sdxl"
    torch.testing.assert_close(model.embed(["a red circle"]).pooled, original.embed(["a red circle"]).pooled)
    assert not model.unconditional(1).tokens.any()


def test_prediction_type_comes_with_the_folder(tmp_path):
    assert models.load(str(save_tiny(tmp_path / "v", prediction_type="v_prediction"))).schedule.prediction == "v"


def test_dtype_is_that_of_every_part(saved):
    model = models.load(str(saved), dtype=torch.bfloat16)
    modules = [model.vae, *model.networks().values()]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert models.load("~/model").source == "~/model"


def test_pocket_names_are_folders_of_the_package(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "_assets", lambda: tmp_path)
    assert "there is no pocket model 'pocket/sd': this installation lacks its assets" in refusal("pocket/sd")
    shutil.copytree(saved, tmp_path / "pocket-sd")
    (tmp_path / "pocket-clip").mkdir()  # no pipeline, so not a model to fine-tune
    assert pocket.names() == ["pocket/sd"]
    (tmp_path / "pocket-clip" / "config.json").touch()
    assert pocket.names("config.json") == ["pocket/clip"]
    assert pocket.folder("pocket/clip", "config.json") == tmp_path / "pocket-clip"
    assert pocket.names() == ["pocket/sd"]
    assert models.load("pocket/sd").source == "pocket/sd"
    message = refusal("pocket/ds")
    assert "there is no pocket model 'pocket/ds'" in message
    assert "pocket/sd" in message


def test_pocket_assets_lie_in_the_package():
    from pathlib import Path

    import visiontune

    assert pocket._assets() == Path(visiontune.__file__).parent / "assets"


@pytest.mark.parametrize("source", ["nothing", "./nothing", "../no/such/folder", "/no/such/folder", "a/b/c", ""])
def test_a_name_that_can_be_nothing_is_refused_without_the_network(source, hub):
    hub["error"] = AssertionError("asked the Hub")
    assert "is neither a folder nor a Hub id (owner/name)" in refusal(source)


def test_a_checkpoint_file_is_refused(saved):
    assert "is a file: give a folder in the layout of diffusers or transformers" in refusal(saved / "model_index.json")


def test_a_folder_without_index_is_refused(folder):
    (folder / "model_index.json").unlink()
    assert "has no model_index.json and no config.json: give a model in the layout of diffusers" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00"])
def test_a_broken_index_is_refused(folder, content):
    (folder / "model_index.json").write_bytes(content)
    assert "has a broken model_index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ({"_class_name": "KolorsPipeline"}, "KolorsPipeline"),
        ({"_class_name": ["a"]}, "['a']"),
        ({}, "None"),
        ([], "None"),
    ],
)
def test_another_pipeline_class_is_refused_with_those_that_work(folder, index, name):
    (folder / "model_index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert f"has the pipeline class {name}; supported: " in message
    assert "StableDiffusionPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLInstruct" in message


@pytest.mark.parametrize(("library", "name"), [("evil", "Model"), ("subprocess", "Popen"), ("os.path", "join")])
def test_a_component_of_another_library_is_refused_before_it_is_imported(folder, monkeypatch, library, name):
    (folder.parent / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.chdir(folder.parent)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": [library, name]}))
    assert f"wants its unet from '{library}'" in refusal(folder)
    assert not (folder.parent / "ran").exists()


def test_what_a_file_names_is_opened_from_the_cache_and_not_fetched(saved, tmp_path, monkeypatch, hub):
    def no_network(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    hub["error"] = AssertionError("asked the Hub")
    repository = tmp_path / "models--owner--name"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "is not on this machine: to fetch it from the Hub, name it yourself" in refusal("owner/name", fetch=False)
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert models.load("owner/name", fetch=False).fingerprint("denoiser") == tiny_model("sd").fingerprint("denoiser")
    with pytest.raises(AssertionError, match="asked the Hub"):
        models.load("owner/name")


def test_truncated_weights_are_refused(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read (" in refusal(folder)


def without_a_tensor(file, index=5) -> str:
    """Take a tensor out of a file; its name."""
    tensors = load_file(file)
    name = sorted(tensors)[index]
    save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused_and_it_is_named(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    name = without_a_tensor(file)
    message = refusal(folder)
    assert name in message and part in message


def as_variant(folder, parts, variant="fp16", keep=False):
    """Give the weights of some parts the names of a variant."""
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            (shutil.copy if keep else shutil.move)(file, file.with_name(f"{file.stem}.{variant}.safetensors"))


def test_a_folder_with_nothing_but_a_variant_opens_and_says_so(folder, saved):
    as_variant(folder, ["unet", "vae", "text_encoder"])
    with pytest.warns(UserWarning, match="unet of model .* has no plain weights: its variant fp16 is read"):
        model = models.load(str(folder))
    original = models.load(str(saved))
    for part in model.networks():
        assert model.fingerprint(part) == original.fingerprint(part)
    assert models.load(str(folder), variant="fp16").fingerprint("denoiser") == original.fingerprint("denoiser")


def test_the_plain_files_are_read_unless_a_variant_is_asked_for(folder):
    as_variant(folder, ["unet"], keep=True)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(plain).items()}, plain, {"format": "pt"})
    model, variant = models.load(str(folder)), models.load(str(folder), variant="fp16")
    bias = "conv_in.bias"
    torch.testing.assert_close(model.denoiser.state_dict()[bias], variant.denoiser.state_dict()[bias] + 1)
    assert model.fingerprint("vae") == variant.fingerprint("vae")  # which has plain files alone


def test_variants_that_are_not_there_or_not_alone_are_refused_with_those_that_are(folder):
    assert "has no variant 'fp16': set variant to null" in refusal(folder, variant="fp16")
    as_variant(folder, ["unet"], "ema", keep=True)
    assert "has no variant 'fp16': set variant, one of ema" in refusal(folder, variant="fp16")
    as_variant(folder, ["unet"], "fp16")
    (folder / "unet" / "diffusion_pytorch_model.ema.fp16.safetensors").unlink()
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        folder / "unet" / "diffusion_pytorch_model.ema.safetensors",
    )
    assert "has no plain weights: set variant, one of ema, fp16" in refusal(folder)


@pytest.mark.parametrize("online", [True, False])
def test_a_hub_model_with_nothing_but_a_variant_is_fetched(folder, tmp_path, monkeypatch, online):
    as_variant(folder, ["unet", "vae", "text_encoder"])
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: files)
    kind = type(tiny_pipe())
    monkeypatch.setattr(kind, "download", lambda name, variant=None, **_: [asked.append(variant), str(folder)][1])
    index = json.loads((folder / "model_index.json").read_text())
    family = models.families()["sd"]
    with pytest.warns(UserWarning, match="variant fp16 is read"):
        family.open(kind.__name__, "owner/name", "owner/name", torch.float32, index, local_files_only=not online)
    assert asked == (["fp16"] if online else [None])


def test_a_transformers_model_with_nothing_but_a_variant_opens(tmp_path):
    folder = shutil.copytree(pocket.folder("pocket/clip", "config.json"), tmp_path / "clip")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.warns(UserWarning, match="its variant fp16 is read"):
        models.load(str(folder))
    models.load(str(folder), variant="fp16")


@pytest.mark.parametrize("part", ["unet", "scheduler", "tokenizer", "vae"])
@pytest.mark.parametrize(
    "value", [5, "x", {}, [], ["diffusers"], ["diffusers", 5], [5, "x"], [None, "x"], [["a"], "b"]]
)
def test_an_index_whose_part_is_no_class_is_refused(folder, part, value):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: value}))
    assert f"does not say of what class its {part} is" in refusal(folder)


@pytest.mark.parametrize("steps", [0, -1, "x", 1.5, 10**12, None, [1000]])
def test_a_schedule_without_a_length_is_refused(folder, steps):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": steps}))
    assert "num_train_timesteps=" in refusal(folder)


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "5", "[]", "{", '{"_class_name": 5}', "{}"])
def test_a_broken_config_of_a_part_is_one_line(folder, file, content):
    (folder / file).write_text(content)
    if (file, content) == ("scheduler/scheduler_config.json", "{}"):
        models.load(str(folder))  # all of it has defaults
        return
    refusal(folder)


@pytest.mark.parametrize(
    ("kind", "options", "fits"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, False),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, False),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.5, 1.0]}, False),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, True),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "sample"}, True),
        ("DDIMScheduler", {}, True),
    ],
)
def test_noise_is_not_predicted_where_a_schedule_leaves_no_signal(folder, kind, options, fits):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, kind)(**options).save_pretrained(folder / "scheduler")
    if fits:
        models.load(str(folder))
    else:
        assert "zero terminal SNR): set prediction_type" in refusal(folder)


@pytest.mark.parametrize("name", ["k" * 3000, "a\0b", "~nosuchuser/m", "a\udcff"])
def test_a_name_that_nothing_can_have_is_refused(name):
    assert "model" in refusal(name)


def test_a_clip_that_lacks_a_tensor_is_refused_and_it_is_named(tmp_path):
    folder = shutil.copytree(pocket.folder("pocket/clip", "config.json"), tmp_path / "clip")
    name = without_a_tensor(folder / "model.safetensors")
    assert f"{folder} has no weights for {name} of CLIPModel, which would be random" in refusal(folder)
    with pytest.raises(UserError, match=f"has no weights for {name}"):
        load_clip(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_refused(folder, part):
    shutil.rmtree(folder / part)
    message = refusal(folder)
    assert "cannot be read (" in message
    assert "give a complete diffusers folder with safetensors weights" in message


def test_a_tokenizer_without_vocabulary_is_refused(folder):
    shutil.rmtree(folder / "tokenizer")
    assert "has no vocabulary in its tokenizer folder" in refusal(folder)


def test_pickled_weights_are_refused(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    assert "safetensors weights" in refusal(folder)


def test_an_inpainting_unet_is_refused(tmp_path):
    pipe = tiny_pipe()
    pipe.unet = remade(pipe.unet, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpaint")
    assert "its UNet takes 9 channels; give a text-to-image checkpoint" in refusal(tmp_path / "inpaint")


def test_a_guidance_distilled_unet_is_told_its_guidance(tmp_path):
    pipe = tiny_pipe()
    pipe.unet = remade(pipe.unet, time_cond_proj_dim=8)
    pipe.save_pretrained(tmp_path / "lcm")
    model = models.load(str(tmp_path / "lcm"))
    assert model.embedded and model.guidance(3.0) == Embedded(scale=3.0)


def test_an_absent_device_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device 'cuda:0' is not available" in refusal(saved, device="cuda:0")


def test_a_device_past_the_last_and_what_is_none_are_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "device 'cuda:7' is not available: PyTorch sees cuda:0 to cuda:1" in refusal(saved, device="cuda:7")
    assert "'gpu' is not a device: take cpu, cuda" in refusal(saved, device="gpu")


def test_an_unreachable_hub_tells_how_to_bring_the_model(hub):
    message = refusal("owner/some-model", revision="v2")
    assert "model 'owner/some-model' at revision 'v2'" in message
    assert "Name or service not known" in message
    assert "run `hf download owner/some-model` where there is a network and give the folder" in message


@pytest.mark.parametrize(
    ("kind", "mend"), [(RepositoryNotFoundError, "correct the name"), (GatedRepoError, "accept its terms")]
)
def test_what_the_hub_refuses_is_told_apart(hub, kind, mend):
    hub["error"] = kind.__new__(kind)  # the constructors differ between versions of the Hub's library
    assert mend in refusal("owner/some-model")


def test_a_cached_hub_model_opens_without_the_network(saved, tmp_path, monkeypatch, hub):
    cached = tmp_path / "models--owner--name"
    shutil.copytree(saved, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert models.load("owner/name").source == "owner/name"


def test_families_are_found_by_their_files():
    found = models.families()
    assert {"sd", "sdxl"} <= set(found)
    assert all(cls.family == name and cls.__module__ == f"visiontune.models.{name}" for name, cls in found.items())
    for kind in ("pipeline_classes", "architectures"):
        classes = [name for cls in found.values() for name in getattr(cls, kind, ())]
        assert classes and len(classes) == len(set(classes))


def test_weights_are_not_asked_for_again_and_again_where_the_hub_does_not_answer(monkeypatch):
    asked = []

    def silent(self, source, **how):
        asked.append(source)
        raise OSError("no route to it")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    refused = pytest.raises(UserError, match=r"CLIP 'a/b' cannot be loaded by transformers \(no route to it\): give a")
    with refused, weights_of("CLIP 'a/b'", "transformers", "a/b"):
        pytest.fail("the library would ask for half a minute")
    with weights_of("CLIP 'ViT-B-32/openai'", "open_clip", "ViT-B-32/openai"):
        pass
    assert asked == ["a/b"]
