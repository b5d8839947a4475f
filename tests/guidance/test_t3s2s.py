"""T3-S2S: balanced nouns, prominent channels, logits pushed into regions, and what each leaves alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from visiontune.core import Request
from visiontune.diffusion.guidance import guided
from visiontune.errors import UserError
from visiontune.guidance import _layout, _words, cfg, mixture, t3s2s
from visiontune.guidance._network import Network
from visiontune.guidance._phrases import Phrase
from visiontune.guidance._regions import Region
from visiontune.guidance._taps import replaced
from visiontune.guidance.stack import GuidanceStack

PROMPT = "a red circle above a blue square"
EXACT = {"rtol": 1e-12, "atol": 1e-12}
REGIONS = [Phrase(phrase="red circle", mask=(0, 0, 16, 8)), Phrase(phrase="a blue square", mask=(0, 8, 16, 8))]
OFF = {"balance": "none", "alpha": 1.0, "cross": 0.0, "itself": 0.0}


@functools.cache
def model(family="sd"):
    made = tiny_model(family)
    made.pipe.scheduler = made.sampler(made.samplers()[0])
    return made


def term(**options):
    return t3s2s.Config(**{"regions": REGIONS, "prompt": PROMPT, **options})


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def predicted(*terms, t=600, rows=2, family="sd", prompt=PROMPT):
    made = model(family)
    x = drawn(rows, *made.latent_shape()).float()
    cond, uncond = made.embed([prompt] * rows), made.embed(["small"] * rows, negative=True)
    with torch.no_grad():
        return guided(made, x, torch.tensor([t] * rows), cond, uncond, GuidanceStack(terms))


def test_a_mask_is_halved_to_the_grid_of_a_layer():
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[0, :, 3:] = True
    assert torch.equal(_layout.on_grid(mask, 30), mask.flatten(1))
    halved = _layout.on_grid(mask, 9).view(3, 3)  # 5 x 6, then 3 x 3
    assert halved[:, 2].all() and not halved[:, 0].any()
    with pytest.raises(ValueError, match="no halving"):
        _layout.on_grid(mask, 10)


def test_a_place_is_about_the_tokens_of_its_region():
    regions = torch.tensor([[True, True, False, False], [False, True, True, False]])
    inside = _layout.about(regions, [[1, 2], [4]], 6)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, 1:3] = expected[1:3, 4] = True
    assert torch.equal(inside, expected)
    outside = _layout.apart(inside, [[1, 2], [4]])
    assert torch.equal(outside[:3], ~expected[:3])  # the other tokens, marks too
    assert outside[3].nonzero().flatten().tolist() == [1, 2, 4]  # of no region: not about the regions' tokens
    same = _layout.alike(regions)
    assert same.diagonal().all() and torch.equal(same, same.T)
    assert same[0, 1] and same[1, 2] and not same[0, 2] and not same[2, 3]


def test_logits_go_their_share_of_the_way():
    logits, inside = drawn(2, 3, 5, 7), drawn(5, 7, seed=1) > 0
    whole = logits + _layout.pushed(logits, inside, ~inside, torch.tensor(1.0))
    most, least = logits.amax(-1, keepdim=True), logits.amin(-1, keepdim=True)
    torch.testing.assert_close(whole, torch.where(inside, most, least), **EXACT)
    part = logits + _layout.pushed(logits, inside, ~inside, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(part, logits.lerp(torch.where(inside, most, least), 0.3), **EXACT)
    # The picture's attention to itself is pushed up alone, and a picture of one region keeps its greatest.
    up = logits + _layout.pushed(logits, torch.ones_like(inside), None, torch.tensor(0.3))
    torch.testing.assert_close(up.amax(-1, keepdim=True), most, **EXACT)
    assert (up >= logits).all()


def test_a_channel_stands_out_where_a_noun_is_among_the_strongest():
    values = torch.tensor([[9.0, 0.0], [1.0, -3.0], [-2.0, 2.0], [0.5, 1.0], [8.0, 8.0]])[None]  # 5 tokens, 2 channels
    nouns = torch.zeros(3, 5, dtype=torch.bool)
    nouns[0, 2] = nouns[1, 3] = True  # token 2 in place 0, token 3 in place 1
    words = slice(1, 4)
    one, two = (_layout.prominent(values, words, nouns, top)[0].tolist() for top in (1, 2))
    assert one == [[True, False], [False, False], [False, False]]  # channel 1 is token 1's, which is no noun
    assert two == [[True, True], [False, False], [False, False]]
    # With as many as there are words, each noun has all channels in its region.
    every = _layout.prominent(values, words, nouns, 7)[0]
    assert torch.equal(every, nouns.any(1, keepdim=True).expand(3, 2))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("balance", ["word", "phrase", "own"])
def test_nouns_have_one_energy_and_other_tokens_are_what_they_were(family, balance):
    made, seen = model(family), []
    raw = made.embed([PROMPT])
    at = {noun: _words.places(made, PROMPT, noun, "t3s2s") for noun in ("circle", "square")}
    nouns = [place for places in at.values() for place in places]
    end = len(_words.tokens_of(made, PROMPT, "t3s2s")) - 1

    def make(name, forward):
        @functools.wraps(forward)
        def noted(*args, **kwargs):
            seen.append(kwargs["encoder_hidden_states"])
            return forward(*args, **kwargs)

        return noted

    with replaced(Network.of_model(made).reading("t3s2s"), make):
        predicted(cfg.Config(scale=3.0), term(**{**OFF, "balance": balance, "beta": 0.7}), family=family, rows=1)
    uncond, cond = seen[0]
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert torch.equal(uncond, made.embed(["small"], negative=True).tokens[0])
    energy = cond.square().sum(-1)
    torch.testing.assert_close(energy[nouns], 0.7 * energy[end].expand(len(nouns)), rtol=1e-4, atol=0)
    rest = [i for i in range(len(cond)) if i not in nouns]
    assert torch.equal(cond[rest], raw.tokens[0, rest])
    # Their direction is that of the word by itself, of the phrase, or their own.
    alone = {
        "word": made.embed(["circle"]).tokens[0, 1 : 1 + len(at["circle"])],
        "phrase": made.embed(["red circle"]).tokens[0, _words.places(made, "red circle", "circle", "t3s2s")],
        "own": raw.tokens[0, at["circle"]],
    }[balance]
    torch.testing.assert_close(
        torch.cosine_similarity(cond[at["circle"]], alone), torch.ones(len(alone)), rtol=0, atol=1e-5
    )


def test_what_is_off_does_nothing_and_each_part_does_something():
    plain = predicted()
    assert term(**OFF).idle and torch.equal(predicted(term(**OFF)), plain)
    assert torch.equal(predicted(term(**{**OFF, "alpha": 3.0, "top": 0})), plain)
    parts = [
        {"balance": "word"},
        {"balance": "own", "beta": 0.5},
        {"alpha": 2.0},
        {"alpha": 1.0, "prominence": "select"},
        {"cross": 0.5},
        {"itself": 0.5},
    ]
    found = [predicted(term(**{**OFF, **part})) for part in parts] + [plain, predicted(term())]
    assert all((one - other).abs().max() > 1e-5 for i, one in enumerate(found) for other in found[:i])


def test_time_strength_and_area_are_shares_of_the_push():
    """tau is level ** power: at level 1 as if there were none, at half of it 1/32."""

    def push(t, **options):
        return predicted(term(**{**OFF, "cross": 0.4, "itself": 0.2, **options}), t=t)

    torch.testing.assert_close(push(500), push(500, power=0.0, scale=1 / 32), rtol=0, atol=1e-6)
    assert (push(500) - push(500, power=0.0)).abs().max() > 1e-5
    # Each region is half of the picture, so that area 1 halves the push.
    torch.testing.assert_close(push(600, area=1.0), push(600, scale=0.5), rtol=0, atol=1e-6)


def test_the_unconditional_half_is_left_alone():
    """And a picture is drawn in its region alone: moved where the other half is not looked at."""
    made = model()
    x, t = drawn(1, *made.latent_shape()).float(), torch.tensor([600])
    cond, uncond = made.embed([PROMPT]), made.embed(["small"], negative=True)
    with torch.no_grad():
        u, c = made.predict(x, t, uncond), made.predict(x, t, cond)
        shaped = guided(made, x, t, cond, uncond, GuidanceStack([term()]))
        both = guided(made, x, t, cond, uncond, GuidanceStack([cfg.Config(scale=3.0), term()]))
    torch.testing.assert_close(both, u + 3 * (shaped - u), rtol=0, atol=1e-5)
    assert (shaped - c).abs().max() > 1e-4


def test_masks_are_regions_and_rows_have_prompts_of_their_own():
    made = model()
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    masked = [Phrase(phrase="red circle", mask=Image.fromarray(white)), REGIONS[1]]
    assert torch.equal(predicted(term(regions=masked)), predicted(term()))
    requests = [Request(prompt=p, seed=1) for p in (PROMPT, "a blue square above a red circle")]
    stack = GuidanceStack([cfg.Config(scale=3.0), term(prompt=None)])
    together = made.draw(requests, steps=2, guidance=stack)
    for one, picture in zip(requests, together, strict=True):
        np.testing.assert_allclose(made.draw([one], steps=2, guidance=stack)[0], picture, rtol=0, atol=1e-5)


def test_the_background_is_what_no_region_covers():
    halves = [*REGIONS]
    alone = term(regions=halves[:1], background="a blue square")
    torch.testing.assert_close(predicted(alone), predicted(term()), rtol=0, atol=1e-6)
    assert (predicted(term(regions=halves[:1])) - predicted(term())).abs().max() > 1e-5


def test_in_the_tiles_of_a_canvas_regions_lie_where_they_lay():
    tiled = mixture.Config(regions=[Region(box=(0, 0, 16, 8)), Region(box=(0, 8, 16, 8))])
    seen = []

    class Watched(t3s2s.Config):
        def _regions(self, point, places):
            seen.append((point.place, super()._regions(point, places)))
            return seen[-1][1]

    predicted(tiled, Watched(regions=REGIONS, prompt=PROMPT))
    for place, regions in seen:
        mine, other = (0, 1) if place == (0, 0) else (1, 0)
        assert regions[mine].all() and not regions[other].any()
    assert {place for place, _ in seen} == {(0, 0), (4, 0)} or len({place for place, _ in seen}) == 2


def test_equal_phrases_are_told_apart():
    prompt = "a red circle above a red circle"
    made = model()
    first, second = (_words.places(made, prompt, "a red circle", "t3s2s", number=i) for i in (0, 1))
    assert len(first) == len(second) and first[-1] < second[0]
    twice = [Phrase(phrase="red circle", mask=region.mask) for region in REGIONS]
    predicted(term(regions=twice, prompt=prompt), prompt=prompt)
    with pytest.raises(UserError, match="'red circle' does not stand 2 times in what is read"):
        predicted(term(regions=twice), rows=1)


def test_what_it_cannot_do_is_said():
    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            GuidanceStack([term(**options)]).plan(model(), 2)

    refused("t3s2s needs regions", regions=[])
    refused("'green triangle' does not stand in what is read of the prompt", background="green triangle")
    refused(
        "'blue' does not stand in what is read of the prompt 'red circle'",
        regions=[Phrase(phrase="red circle", nouns=["blue"], mask=(0, 0, 8, 8))],
    )
    refused("ends outside of the 16x16 that are drawn", regions=[Phrase(phrase="red circle", mask=(8, 0, 16, 8))])
    black = Image.new("L", (16, 16))
    refused("t3s2s: the mask is black everywhere", regions=[Phrase(phrase="red circle", mask=black)])
    refused("t3s2s: mask must be a file, or left, top, width and height", regions=[Phrase(phrase="red circle", mask=3)])
    refused("regions cover all of the picture", background="above")
    refused("no layer of 'tiny-sd' is called 'up_blocks.7'", layers=["up_blocks.7"])
    with pytest.raises(UserError, match="are not known here: set its prompt, or give them to attach"):
        predicted(term(prompt=None))
    with pytest.raises(UserError, match="attach the stack to a model"), GuidanceStack([term()]).attach(model().pipe):
        model().pipe(PROMPT, num_inference_steps=1, height=16, width=16, guidance_scale=1.0)
