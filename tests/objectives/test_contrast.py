"""Contrastive losses against their equations in float64, and what stays the same however a batch is computed."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from objectives import contrast_worker
from processes import apart
from tiny import tiny_model
from tiny_rewards import tiny_clip_folder

from visiontune import models
from visiontune.core import Batch
from visiontune.errors import UserError
from visiontune.objectives import contrastive, fsc_clip, negclip
from visiontune.objectives._contrast import choice, in_parts
from visiontune.objectives.base import Tools
from visiontune.objectives.fsc_clip import local_scores, soft_choice

# The tiny tower reads 14 letters.
CAPTIONS = ["red dog, blue cat", "green cat", "green cat", "two dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip_folder(tmp_path_factory.mktemp("clip") / "clip", 16)


def opened(folder, *parts):
    model = models.load(str(folder))
    for network in model.of(*parts).values() if parts else ():
        network.requires_grad_(True)
    return model


def batch(captions=CAPTIONS) -> Batch:
    rows = len(captions)
    pixels = torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(rows, dtype=torch.bool)
    ids = [str(i) for i in range(rows)]
    return Batch(prompts=[*captions], data={"image": pixels}, cond=None, weight=torch.ones(rows), prior=none, ids=ids)


def tools(seed=0) -> Tools:
    return Tools(rng=torch.Generator().manual_seed(seed))


def cosines(model, rows) -> torch.Tensor:
    shown = F.normalize(model.image_features(rows.data["image"]).pooled, dim=-1)
    return shown @ F.normalize(model.text_features(rows.prompts).pooled, dim=-1).T


# ---------------------------------------------------------------------------------------------------- equations


def test_without_equal_captions_the_loss_is_that_of_transformers(folder):
    model, rows = opened(folder), batch(["red circle", "a green cat", "two dogs", "blue cup"])
    pixels = model.encoder.preprocess(rows.data["image"])
    tokens = model.encoder.tokenizer(rows.prompts, padding=True, return_tensors="pt")
    theirs = model.encoder.model(pixel_values=pixels, **tokens, return_loss=True).loss
    for equal in ("ignore", "positive", "negative"):
        ours = contrastive.build(contrastive.Config(equal=equal)).loss(model, rows, tools()).total
        torch.testing.assert_close(ours, theirs)


def test_equal_captions_are_left_out_or_right_or_wrong(folder):
    model, rows = opened(folder), batch()
    logits = (model.logit_scale * cosines(model, rows)).double()
    same = torch.tensor([[one == other for other in CAPTIONS] for one in CAPTIONS])

    def expected(equal):
        found = []
        for table in (logits, logits.T):
            for i in range(4):
                kept = [j for j in range(4) if j == i or equal != "ignore" or not same[i, j]]
                log = table[i, kept] - torch.logsumexp(table[i, kept], 0)
                right = [k for k, j in enumerate(kept) if (same[i, j] if equal == "positive" else j == i)]
                found.append(-log[right].mean())
        return torch.stack(found).mean()

    losses = {}
    for equal in ("ignore", "positive", "negative"):
        found = contrastive.build(contrastive.Config(equal=equal)).loss(model, rows, tools())
        losses[equal] = found.total.double()
        torch.testing.assert_close(losses[equal], expected(equal), rtol=1e-5, atol=1e-6)
    assert losses["ignore"] < losses["positive"] and losses["ignore"] < losses["negative"]


def test_row_weights_count(folder):
    model, rows = opened(folder), batch()
    whole = contrastive.build(contrastive.Config()).loss(model, rows, tools()).total
    rows.weight.copy_(torch.tensor([4.0, 0, 0, 0]))
    first = contrastive.build(contrastive.Config()).loss(model, rows, tools()).total
    assert not torch.isclose(whole, first) and first > 0


def test_soft_choice_is_smoothed_cross_entropy_or_focal_where_the_other_is_off():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    valid, own = torch.ones(5, 3, dtype=torch.bool), torch.zeros(5, dtype=torch.long)
    smooth = F.cross_entropy(logits, own, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(soft_choice(logits, valid, 0.0, 0.1), smooth)
    log = logits.log_softmax(1)[:, 0]
    torch.testing.assert_close(soft_choice(logits, valid, 2.0, 0.0), -((1 - log.exp()) ** 2) * log)


def test_a_caption_that_is_not_there_changes_nothing():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    valid = torch.tensor([[True, False, True]] * 3)
    found = soft_choice(logits, valid, 2.0, 0.02)
    few = soft_choice(logits[:, [0, 1, 3]], torch.ones(3, 2, dtype=torch.bool), 2.0, 0.02)
    torch.testing.assert_close(found, few)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all() and not gradient[:, 2].any() and gradient[:, :2].all()


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_local_scores_are_their_equation():
    patches, words, scale = unit(2, 5, 6, seed=4), unit(2, 3, 4, 6, seed=5), torch.tensor(7.0)
    mask = torch.arange(4).expand(2, 3, 4) < torch.tensor([[4], [2], [3]])
    found = local_scores(patches, words, mask, scale)
    for b in range(2):
        for k in range(3):
            total = 0.0
            for word in words[b, k][mask[b, k]]:
                seen = patches[b] @ word
                looked = (seen - seen.min()) / (seen.max() - seen.min())
                vector = (looked / looked.sum()) @ patches[b]
                total += math.exp(7 * float(vector @ word / vector.norm()))
            assert float(found[b, k]) == pytest.approx(math.log(total), abs=1e-8)


def test_local_scores_know_no_order_of_patches_and_no_padding_and_do_not_learn_where_to_look():
    patches, words = unit(2, 5, 6, seed=6), unit(2, 1, 4, 6, seed=7)
    mask, scale = torch.ones(2, 1, 4, dtype=torch.bool), torch.tensor(3.0)
    found = local_scores(patches, words, mask, scale)
    torch.testing.assert_close(local_scores(patches[:, torch.randperm(5)], words, mask, scale), found)
    longer = torch.cat([words, unit(2, 1, 2, 6, seed=8)], 2)
    torch.testing.assert_close(local_scores(patches, longer, F.pad(mask, (0, 2)), scale), found)
    # Four words that are equal count as one, and log 4.
    alike = words[:, :, :1].expand(2, 1, 4, 6)
    one = local_scores(patches, alike[:, :, :1], mask[:, :, :1], scale)
    torch.testing.assert_close(local_scores(patches, alike, mask, scale), one + math.log(4))
    # The gradient of the words is that of the cosine with what was found, which stays.
    words.requires_grad_()
    fixed = torch.einsum("bknp,bpd->bknd", looks(patches, words.detach()), patches)
    expected = (scale * (F.normalize(fixed, dim=-1) * words).sum(-1)).logsumexp(-1)
    ours, theirs = (
        torch.autograd.grad(value.sum(), words)[0] for value in (local_scores(patches, words, mask, scale), expected)
    )
    torch.testing.assert_close(ours, theirs)


def looks(patches, words):
    seen = torch.einsum("bknd,bpd->bknp", words, patches)
    low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
    return (seen - low) / (seen - low).sum(-1, keepdim=True) * torch.ones_like(high)


def test_a_blank_picture_is_looked_at_evenly():
    patches = unit(1, 1, 6, seed=9).expand(1, 5, 6).clone().requires_grad_()
    found = local_scores(patches, unit(1, 2, 3, 6, seed=10), torch.ones(1, 2, 3, dtype=torch.bool), torch.tensor(5.0))
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), patches)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------- objectives


def test_negclip_adds_the_false_captions_of_all_rows_to_what_pictures_choose_from(folder):
    model, captions = opened(folder), ["red dog, blue cat", "green cat", "two dogs"]
    rows = batch(captions)
    found = negclip.build(negclip.Config()).loss(model, rows, tools())
    losses = []
    for text in ("blue dog, red cat", "red cat, blue dog"):
        told = F.normalize(model.text_features([*captions, text]).pooled, dim=-1)
        logits = model.logit_scale * F.normalize(model.image_features(rows.data["image"]).pooled, dim=-1) @ told.T
        own = torch.arange(3)
        losses.append(float((F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :3].T, own)) / 2))
    assert any(float(found.total) == pytest.approx(loss, abs=1e-5) for loss in losses)
    assert float(found.terms["negatives"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("module", [negclip, fsc_clip])
def test_without_false_captions_the_loss_is_clips(module, folder):
    model, rows = opened(folder, "vision"), batch(["dog", "cat", "tree", "house"])
    plain = contrastive.build(contrastive.Config()).loss(model, rows, tools()).total
    found = module.build(module.Config(negatives=["swap"])).loss(model, rows, tools()).total
    torch.testing.assert_close(found, plain)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.networks()["vision_model"].parameters())
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.networks()["vision_model"].parameters() if p.grad is not None)


def test_fsc_is_the_sum_of_its_parts_over_the_rows_that_have_false_captions(folder):
    model, rows = opened(folder), batch()
    losses = {}
    for weights in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.2)):
        config = fsc_clip.Config(negatives=["swap"], global_weight=weights[0], local_weight=weights[1])
        losses[weights] = fsc_clip.build(config).loss(model, rows, tools())
    plain = losses[0.0, 0.0].total
    whole, local = losses[1.0, 0.0].total - plain, losses[0.0, 1.0].total - plain
    torch.testing.assert_close(losses[0.5, 0.2].total, plain + 0.5 * whole + 0.2 * local)
    # One row of four has a swap: the mean is over that one.
    torch.testing.assert_close(losses[1.0, 0.0].terms["global"], whole)
    assert whole > 0 and local > 0


# ------------------------------------------------------------------------------------------------------ computation


@pytest.mark.parametrize("module", [contrastive, fsc_clip])
def test_parts_of_a_batch_have_the_gradients_of_the_whole_the_temperature_too(module, folder):
    found = []
    for size in (None, 3):
        model = opened(folder, "vision", "text", "head")
        module.build(module.Config(micro_batch=size)).loss(model, batch(), tools()).total.backward()
        networks = model.networks()
        found.append({f"{n}.{k}": p.grad for n, one in networks.items() for k, p in one.named_parameters()})
    whole, parts = found
    assert whole.keys() == parts.keys() and whole["logit_scale.value"].abs() > 1e-3
    for name, gradient in whole.items():
        if gradient is None:
            assert parts[name] is None or not parts[name].any()
        else:
            torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)


def test_in_parts_keeps_the_activations_of_none(folder):
    model = opened(folder, "vision")
    pixels, kept = batch().data["image"], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model.image_features(pixels)
        whole, kept[:] = sum(kept), []
        in_parts(model.image_features, pixels, 1)
    assert sum(kept) < whole / 4


def test_a_trained_temperature_is_held_at_a_hundred(folder):
    model = opened(folder, "head")
    scale = model.networks()["logit_scale"].value
    scale.data.fill_(6.0)
    found = contrastive.build(contrastive.Config()).loss(model, batch(), tools())
    assert float(model.logit_scale.detach()) == pytest.approx(100, rel=1e-5)
    assert float(found.terms["scale"]) == pytest.approx(100, rel=1e-5)
    found.total.backward()
    assert scale.grad.isfinite()


def test_half_precision_does_not_reach_the_logits(folder):
    model, rows = opened(folder).at(torch.bfloat16), batch(["red circle", "a green cat", "two dogs", "blue cup"])
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive.build(contrastive.Config()).loss(model, rows, tools()).total
    shown = F.normalize(model.image_features(rows.data["image"]).pooled.float(), dim=-1)
    logits = model.logit_scale * shown @ F.normalize(model.text_features(rows.prompts).pooled.float(), dim=-1).T
    exact = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_choosing_among_columns_of_which_some_are_as_right():
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    own, same = torch.tensor([0]), torch.tensor([[True, True, False]])
    left = -math.log(math.exp(1) / (math.exp(1) + math.exp(2)))
    assert float(choice(logits, own, same)) == pytest.approx(left)
    log = logits.log_softmax(1)[0]
    assert float(choice(logits, own, same, "positive")) == pytest.approx(-float(log[0] + log[1]) / 2)
    assert float(choice(logits, own, same, "negative")) == pytest.approx(-float(log[0]))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [contrastive, negclip, fsc_clip])
def test_a_model_that_draws_is_refused(module):
    with pytest.raises(UserError, match=r"for models of pictures and texts \(clip\), not for 'tiny-sd' \(sd\)"):
        module.build(module.Config()).check(tiny_model("sd"), None)


@pytest.mark.parametrize("module", [negclip, fsc_clip])
def test_no_kind_of_false_captions_is_refused(module):
    with pytest.raises(ValueError, match="take contrastive"):
        module.Config(negatives=[])


# -------------------------------------------------------------------------------------------------- several processes


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(folder, tmp_path):
    """Also of the temperature; equal captions and false ones meet across them."""
    one = contrast_worker.gradients(str(folder), "negclip")
    apart("objectives.contrast_worker:run", folder, "negclip", tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    assert abs(one["logit_scale.value"][0]) > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(value), rtol=1e-4, atol=1e-6)
