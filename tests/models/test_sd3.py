"""What Stable Diffusion 3 has of its own: a T5 that may be absent, steps shifted by resolution, patches."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from tiny import remade, save_tiny, tiny_model, tiny_pipe

from visiontune import models
from visiontune.adapters import attach, load
from visiontune.core import Condition
from visiontune.diffusion.dynamics import CPS, DDIM, DanceSDE, FlowODE, FlowSDE
from visiontune.diffusion.trajectory import Keep, Start, rollout
from visiontune.errors import UserError
from visiontune.models.sd3 import StableDiffusion3
from visiontune.weights.export import export
from visiontune.weights.keys import keys_of


def test_a_prompt_is_clip_beside_clip_then_t5_and_two_pooled_vectors():
    model = tiny_model("sd3")
    cond = model.embed(["a red circle"])
    assert cond.tokens.shape == (1, 32 + 256, 72) and cond.pooled.shape == (1, 64) and cond.mask is None
    assert not cond.tokens[:, :32, 64:].any() and cond.tokens[:, :32, :64].all()
    ids = model.pipe.tokenizer_3("a red circle", padding="max_length", max_length=256, return_tensors="pt").input_ids
    torch.testing.assert_close(cond.tokens[:, 32:], model.pipe.text_encoder_3(ids)[0])


def test_without_t5_its_tokens_are_zero_and_the_rest_is_as_it_was(tmp_path):
    whole, bare = tiny_model("sd3"), tiny_model("sd3", t5=False)
    assert list(bare.of("text")) == ["text_encoder", "text_encoder_2"]
    bare.save(tmp_path / "bare")
    for model in (bare, models.load(str(tmp_path / "bare"))):
        cond = model.embed(["a red circle"])
        assert cond.tokens.shape == (1, 32 + 256, 72) and not cond.tokens[:, 32:].any()
        torch.testing.assert_close(cond.tokens[:, :32], whole.embed(["a red circle"]).tokens[:, :32])


def test_a_transformer_that_is_too_narrow_for_a_t5_gets_no_zeros_for_it():
    assert tiny_model("sd3", t5=False, width=64).embed(["a red circle"]).tokens.shape == (1, 32, 64)


def test_steps_are_those_of_the_scheduler_shifted_by_resolution_where_it_asks():
    fixed, dynamic = tiny_model("sd3"), tiny_model("sd3", dynamic=True)
    for model, moves in ((fixed, False), (dynamic, True)):
        small, large = (model.chain(4, model.latent_shape(side, 16))[0] for side in (16, 48))
        assert torch.equal(small, large) is not moves
        assert small[0] == 1000 and (large >= small).all()
    start, end = fixed.chain(4, fixed.latent_shape())
    fixed.pipe.scheduler.set_timesteps(4)
    torch.testing.assert_close(torch.cat([start, end[-1:]]), fixed.pipe.scheduler.sigmas * 1000)


def test_the_shift_that_a_scheduler_says_nothing_of_is_the_stock_pipelines():
    pipe = tiny_pipe("sd3")
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    model = StableDiffusion3(pipe)
    start, _ = model.chain(4, model.latent_shape(32, 16))
    pipe("a", num_inference_steps=4, height=32, width=16, output_type="latent")
    torch.testing.assert_close(start[1:] / 1000, pipe.scheduler.sigmas[1:-1], rtol=0, atol=1e-7)


def test_ddim_without_noise_is_the_step_of_euler():
    model = tiny_model("sd3")
    cond, start = model.embed(["a red circle"]), Start(generator=torch.Generator().manual_seed(0))
    ddim = rollout(model, cond, chain=4, start=start).final
    euler = rollout(
        model, cond, chain=4, dynamics=FlowODE(), start=Start(generator=torch.Generator().manual_seed(0))
    ).final
    assert torch.equal(ddim, euler)


@pytest.mark.parametrize("dynamics", [DDIM(eta=1.0), FlowSDE(), DanceSDE(), CPS()], ids=lambda kind: kind.name)
def test_every_dynamics_with_noise_steps_from_pure_noise(dynamics):
    model = tiny_model("sd3")
    cond, start = model.embed(["a red circle"]), Start(generator=torch.Generator().manual_seed(0))
    found = rollout(model, cond, chain=4, dynamics=dynamics, start=start, keep=Keep(log_probs=True))
    assert found.final.isfinite().all() and found.log_probs.isfinite().all() and found.scored[:-1].all()
    assert 0.5 < found.final.std() < 3


def test_pictures_must_fit_the_patches_and_the_table_of_places():
    model = tiny_model("sd3")
    assert (model.unit, model.resolution) == (8, 16)
    model.pipe.transformer = remade(model.denoiser, patch_size=8)
    assert StableDiffusion3(model.pipe).unit == 16
    model = tiny_model("sd3")
    assert model.size(48, 16) == (48, 16)
    with pytest.raises(UserError, match="height and width must be at most 48, not 56 and 16"):
        model.size(56, 16)


def test_a_condition_without_pooled_vector_is_refused():
    model = tiny_model("sd3")
    with pytest.raises(ValueError, match="make the Condition with embed"):
        model.predict(torch.ones(1, 16, 8, 8), torch.tensor([1]), Condition(tokens=model.embed(["a"]).tokens))


def test_what_is_no_text_to_image_checkpoint_is_refused():
    pipe = tiny_pipe("sd3")
    pipe.transformer = remade(pipe.transformer, in_channels=33)
    with pytest.raises(UserError, match="its transformer takes 33 channels"):
        StableDiffusion3(pipe)
    pipe = tiny_pipe("sd3")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="its scheduler is not one of flow"):
        StableDiffusion3(pipe)
    pipe = tiny_pipe("sd3")
    pipe.text_encoder_2 = None
    with pytest.raises(UserError, match="it lacks one of its two CLIP text encoders"):
        StableDiffusion3(pipe)


def test_presets_name_the_layers_of_clip_and_of_t5():
    model = tiny_model("sd3")
    layers = attach(model.of("text"), "lora", targets="attention+ff", presets=model.presets(["text"])).layers
    counts = {name: sum(layer.startswith(f"{name}.") for layer in layers) for name in model.of("text")}
    assert counts == {"text_encoder": 3 * 6, "text_encoder_2": 3 * 6, "text_encoder_3": 2 * (4 + 3)}
    layers = attach(model.of("denoiser"), "lora", targets="attention", presets=model.presets()).layers
    # two attentions in the first block; of the last block's text nothing is read but keys and values
    assert len(layers) == (8 + 4) + 6


class TestExport:
    @pytest.fixture
    def file(self, tmp_path):
        """A LoRA of T5 alone."""
        model = tiny_model("sd3")
        found = attach(model.of("text_encoder_3"), "lora", targets="attention", presets=model.presets(["text"]), rank=2)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.add_(0.1)
        return found.save(tmp_path / "adapter.safetensors", {"base_model": str(save_tiny(tmp_path / "model", "sd3"))})

    def test_t5_keeps_its_own_names_of_layers(self, file, tmp_path):
        model = models.load(str(tmp_path / "model"))
        layers = load(model.networks(), file).layers
        keys = keys_of("sd3", model.networks())
        assert [keys.public(layer) for layer in layers] == list(layers)
        assert keys.public("text_encoder.encoder.layers.0.mlp.fc1") == (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        )

    def test_what_the_stock_pipeline_would_leave_out_is_refused(self, file, tmp_path):
        model = models.load(str(tmp_path / "model"))
        adapters = load(model.networks(), file)
        options = {"dtype": torch.float32, "model": model}
        with pytest.raises(UserError, match="StableDiffusion3Pipeline loads no LoRA of its text_encoder_3"):
            export(adapters, tmp_path / "a.safetensors", **options)
        assert not (tmp_path / "a.safetensors").exists()
        expected = model.embed(["a red circle"]).tokens
        export(adapters, tmp_path / "m", "merged", **options)
        torch.testing.assert_close(models.load(str(tmp_path / "m")).embed(["a red circle"]).tokens, expected)
