"""The maps of words: against full attention, in the layers of real networks, and where words of a prompt stand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import scaled_dot_product_attention

from visiontune.errors import UserError
from visiontune.guidance._network import Network
from visiontune.guidance._probe import of_places, probing, together, word_maps
from visiontune.guidance._taps import noted
from visiontune.models.words import places

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel_map(q, k, mask=None):
    """The map of the fused kernel, by values that are the unit vectors."""
    eye = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return scaled_dot_product_attention(q, k, eye, attn_mask=mask).mean(1)


@pytest.mark.parametrize("words", [slice(0, 3), slice(-3, None)])
def test_of_joint_attention_both_ways_are_averaged_with_all_keys_in_the_denominator(words):
    q, k = drawn(2, 3, 7, 4, seed=1), drawn(2, 3, 7, 4, seed=2)
    whole = kernel_map(q, k)
    at, of = ([0, 1, 2], [3, 4, 5, 6]) if words.start == 0 else ([4, 5, 6], [0, 1, 2, 3])
    expected = (whole[:, of][:, :, at] + whole[:, at][:, :, of].mT) / 2
    torch.testing.assert_close(word_maps(q, k, None, words), expected, **EXACT)


def test_of_cross_attention_it_is_the_map_with_its_mask_and_scale():
    q, k = drawn(2, 3, 6, 4, seed=1), drawn(2, 3, 5, 4, seed=2)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[1, ..., 3:] = float("-inf")
    torch.testing.assert_close(word_maps(q, k, mask, None), kernel_map(q, k, mask), **EXACT)
    torch.testing.assert_close(word_maps(q, k, mask == 0, None), kernel_map(q, k, mask), **EXACT)
    torch.testing.assert_close(word_maps(q, k, None, None, 0.5), kernel_map(q, k), **EXACT)


def test_maps_of_layers_meet_on_the_finest_grid():
    coarse, fine = drawn(1, 2, 2, 3), drawn(1, 4, 4, 3, seed=1)
    one, two = (of_places(found, [[0, 2]]) for found in (coarse, fine))
    torch.testing.assert_close(one, coarse[..., [0, 2]].mean(-1), **EXACT)
    repeated = one.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(together([one, two]), (repeated + two) / 2, **EXACT)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_network_is_watched_and_not_changed(family):
    made = tiny_model(family)
    network = Network.of_model(made)
    layers, cond = network.worded("all", "probe"), made.embed(["a red circle", "green triangle"])
    x, t = torch.randn(2, *made.latent_shape(), generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    plain, arguments, maps = made.predict(x, t, cond), {}, {}
    with noted(made.denoiser, arguments), probing(network, layers, arguments, "probe", maps.__setitem__) as check:
        assert torch.equal(made.predict(x, t, cond), plain)
    check()
    assert maps.keys() == layers.keys() and len(maps) > 1
    for found in maps.values():
        assert found.shape[0] == 2 and found.shape[3] == cond.tokens.shape[1] and found.shape[1] == found.shape[2]
        whole = found.sum(-1)
        if family == "sd":  # where words stand among the picture's tokens they have a part of the attention
            torch.testing.assert_close(whole, torch.ones_like(whole))
    # Maps carry gradients, also where the network is computed again.
    grads = []
    parameter = next(one for name, one in made.denoiser.named_parameters() if "to_q.weight" in name)
    made.denoiser.train()
    for checkpointed in (False, True):
        if checkpointed:
            made.denoiser.enable_gradient_checkpointing()
        parameter.requires_grad_()
        parameter.grad, kept = None, {}
        with noted(made.denoiser, arguments), probing(network, layers, arguments, "probe", kept.setdefault):
            predicted = made.predict(x, t, cond)
            (sum(one[..., 1].square().sum() for one in kept.values()) + 0 * predicted.sum()).backward()
        grads.append(parameter.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_where_words_stand():
    prompt = "a photo of a Red circle above a red square"
    for family, before in (("sd", 0), ("flux", None), ("sd3", 0), ("pixart", None)):
        made = tiny_model(family)
        found = places(made, prompt, "red circle")
        assert set(found) < set(places(made, prompt, "red")) | set(places(made, prompt, "circle"))
        if before == 0:  # CLIP's mark of the beginning, then a word a token
            assert found[:2] == [5, 6] and places(made, prompt, "red")[:2] == [5, 9]
        tokens = made.embed([prompt]).tokens
        assert max(places(made, prompt, "square")) < tokens.shape[1]
        # Another word in its place is other tokens there, and at no place before.
        other = made.embed([prompt.replace("square", "triangle")]).tokens
        changed = (tokens != other).any(-1)[0].nonzero().flatten()
        if family == "sd":  # whose encoder sees what came before alone
            assert int(changed[0]) == min(places(made, prompt, "square"))
        with pytest.raises(UserError, match="'green' is not among the words that are read of the prompt 'a photo"):
            places(made, prompt, "green")
    assert len(places(tiny_model("sd3"), prompt, "red circle")) > 2
