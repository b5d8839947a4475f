"""What every term of guidance owes on every family that it can guide: it is the same in rollouts and in the stock
pipeline, costs what its plan says, does nothing at its neutral strength, and leaves nothing behind.

The terms are found by name; `OPTIONS` gives those that need options to act on pipelines of two blocks.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from control_nets import adapter
from PIL import Image
from tiny import SIZE, tiny_model

from visiontune import adapters, plugin
from visiontune.core import Request
from visiontune.diffusion.guidance import CFG, NO_GUIDANCE, guided
from visiontune.diffusion.pathwise import backpropagate
from visiontune.diffusion.replay import replay
from visiontune.diffusion.trajectory import Keep, Start, Window, rollout
from visiontune.diffusion.unmask import guided_logits, unmask
from visiontune.errors import UserError
from visiontune.guidance import control
from visiontune.guidance._phrases import Phrase
from visiontune.guidance._regions import Region
from visiontune.guidance._taps import replaced
from visiontune.guidance.actor import Actor
from visiontune.guidance.base import Base, Edit, Feeding, Perturbed, Shaping, Told
from visiontune.guidance.projector import TextProjector
from visiontune.guidance.stack import GuidanceStack
from visiontune.models.masked import MaskedModel
from visiontune.models.pipeline import own_generator

PROMPTS = ["a red circle above a blue square", "green triangle"]
REQUESTS = [Request(prompt=prompt, negative="small", seed=seed) for seed, prompt in enumerate(PROMPTS)]
STEPS = 2
FAMILIES = ["sd", "sdxl", "sd3", "flux", "pixart", "z_image", "amused"]
GRADIENT = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
CONTROLS = [control.Config(net=adapter(seed), picture=GRADIENT.rotate(90 * seed)) for seed in (0, 1)]
PROJECTION = TextProjector(32, 3)
PROJECTION.bias.data.copy_(torch.ones(32).cumsum(0) / 16 - 1)
OPTIONS = {
    "control": {"net": CONTROLS[0].net, "picture": GRADIENT},
    "maxfusion": {"controls": CONTROLS},
    "inpaint": {"picture": GRADIENT, "mask": Image.linear_gradient("L")},
    "magicmix": {"picture": GRADIENT},
    "shine": {"picture": GRADIENT, "mask": [0, 0, 8, 8], "subject": "red circle", "prompt": PROMPTS[0]},
    "styleid": {"content": GRADIENT, "style": GRADIENT.rotate(90), "layers": "all"},
    "cfg": {"scale": 3.0},
    "cfg_zero": {"scale": 3.0, "zero": None},
    "apg": {"scale": 3.0, "threshold": 1.0},
    "rescale": {"scale": 0.7},
    "seg": {"sigma": 1.0},
    "mixture": {
        "regions": [
            Region(box=(0, 0, 16, 8), prompt="a red circle"),
            Region(box=(0, 8, 16, 8), prompt="green triangle"),
        ]
    },
    "msg": {"reference": Image.new("RGB", (SIZE, SIZE), "red"), "seed": 0, "window": (0.0, 0.99)},
    "reward": {"reward": "brightness", "scale": 100.0, "prompt": ""},
    "t3s2s": {
        "regions": [Phrase(phrase="red circle", mask=(0, 0, 16, 8)), Phrase(phrase="blue square", mask=(0, 8, 16, 8))],
        "prompt": PROMPTS[0],
    },
    "oneactor": {
        "file": Actor(target=torch.ones(32).cumsum(0) / 16 - 1, average=torch.ones(32), word="circle", about={}),
        "prompt": PROMPTS[0],
        "exclude": 0.5,
        "window": (0.0, 1.0),
    },
    "wiclp": {"file": PROJECTION, "window": (0.0, 1.0)},
}
UNETS = ("control", "inherit", "maxfusion", "scalelong", "skip_tuning")
# What a term cannot do, and what it says of it.
CANNOT = {
    **{
        (name, "amused"): "predicts tokens: take cfg"
        for name in ("apg", "inpaint", "magicmix", "mixture", "msg", "reward", "styleid")
    },
    **{("shine", family): "has no layers of its own: leave shine out" for family in ("z_image", "amused")},
    ("styleid", "z_image"): "has no layers: take slg",
    ("pag", "z_image"): "has no layers: take slg",
    ("seg", "z_image"): "has no layers: take slg",
    ("stg", "z_image"): "has no layers: take slg",
    **{("embedded", family): "carries no guidance inside" for family in FAMILIES if family != "flux"},
    **{
        (name, family): "has no layers of their own"
        for name in ("oneactor", "t3s2s", "wiclp")
        for family in FAMILIES
        if family not in ("sd", "sdxl")
    },
    **{(name, family): "is for UNets" for name in UNETS for family in FAMILIES if family not in ("sd", "sdxl")},
}
# Terms that act from step to step of a run, and say so where a prediction is of none; the last step moves little.
STEPPING = {"inherit": "this is a step of none"}
# Rows of each step that a term has the network see once in a run, however many pictures it draws.
ONCE = {"styleid": 2}
# Each term by itself where families differ, and all together where one is made and called as another.
ALIKE = {
    "sdxl": (
        "cfg",
        "pag",
        "seg",
        "slg",
        "autoguidance",
        "skip_tuning",
        "inherit",
        "rescale",
        "styleid",
        "control",
        "t3s2s",
    ),
    "pixart": ("apg", "pag", "slg", "stg", "rescale", "styleid"),
}
CASES = [(family, (name,)) for family in FAMILIES if family not in ALIKE for name in plugin.names("guidance")]
CASES += ALIKE.items()
# A run starts in one way alone.
CASES += [(family, ("shine",)) for family in ALIKE]


@functools.cache
def model(family):
    """One model for all tests of a family, which leave it as it was, with adapters that do something."""
    made = tiny_model(family)
    if not isinstance(made, MaskedModel):
        made.pipe.scheduler = made.sampler(made.samplers()[0])
    found = adapters.attach(made.of("denoiser"), "lora", targets="attention", presets=made.presets()).eval()
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.copy_(0.3 * noise)
    return made


@functools.cache
def untouched(family, guides, steps):
    """A picture of the stock pipeline as it was first drawn."""
    return drawn(model(family), CFG(scale=3.0) if guides else NO_GUIDANCE, REQUESTS[1:], steps)


def term_of(name, **options):
    module = importlib.import_module(f"visiontune.guidance.{name}")
    return module.Config(**{**OPTIONS.get(name, {}), **options})


def stack_of(*terms):
    """The terms, on CFG where they bring no base that acts."""
    based = any(isinstance(term, Base) for term in terms)
    return GuidanceStack([*(() if based else (term_of("cfg"),)), *terms])


def drawn(made, stack, requests=REQUESTS, steps=STEPS):
    return made.draw(requests, steps=steps, guidance=stack)


def noise_of(made, requests=REQUESTS):
    return torch.stack([torch.randn(made.latent_shape(), generator=own_generator(one)) for one in requests])


def rolled(made, stack, steps=STEPS):
    """The pictures of a rollout, or of our own unmasking."""
    cond, uncond = made.embed(PROMPTS), made.embed(["small"] * 2, negative=True)
    with torch.no_grad():
        if isinstance(made, MaskedModel):
            rows = [own_generator(one) for one in REQUESTS]
            found = unmask(made, cond, uncond=uncond, guidance=stack, steps=steps, generator=rows)
        else:
            start = Start(latents=noise_of(made))
            found = rollout(made, cond, uncond=uncond, guidance=stack, chain=steps, start=start).final
        pictures = (made.decode(found) / 2 + 0.5).clamp(0, 1)
    return pictures.permute(0, 2, 3, 1).numpy()


def moved(made, stack, plain, pictures):
    """How far a stack moves what another gives: pictures, or logits, of which tokens may be the same."""
    if not isinstance(made, MaskedModel):
        return float(np.abs(pictures).max())
    cond, shape = made.embed(PROMPTS), (2, *made.grid())
    tokens = torch.randint(made.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = made.mask_token
    with torch.no_grad():
        one, other = (guided_logits(made, tokens, cond, None, given) for given in (stack, plain))
    return float((one - other).abs().max())


@contextmanager
def counted(made):
    """Rows that the denoiser sees in the block."""
    rows = []

    def make(name, forward):
        def noted(*args, **kwargs):
            rows.append(len(args[0] if args else kwargs[made.STRUCTURE.noisy]))
            return forward(*args, **kwargs)

        noted.__wrapped__ = forward
        return noted

    with replaced({"": made.denoiser}, make):
        yield rows


def state(made):
    """What an attached stack could leave changed."""
    patched = [name for name, module in made.denoiser.named_modules() if "forward" in vars(module)]
    hooks = [name for name, module in made.denoiser.named_modules() if module._forward_pre_hooks]
    sets = [(s.enabled, s.scale) for s in adapters.attached(made.of("denoiser")).values()]
    return patched, hooks, sets


@pytest.mark.parametrize(("family", "names"), CASES, ids=["-".join([f, *names]) for f, names in CASES])
def test_terms(family, names):
    made, before = model(family), state(model(family))
    stack = stack_of(*map(term_of, names))
    if (names[0], family) in CANNOT:
        for refused in (stack.begin, stack.attach, lambda one: stack.plan(one, STEPS)):
            with pytest.raises(UserError, match=CANNOT[names[0], family]):
                refused(made)
        return
    steps = STEPS + bool(STEPPING.keys() & names)
    plain = stack_of(*(term_of(name, scale=term_of(name).NEUTRAL) for name in names))
    base = CFG(scale=3.0) if plain.contrasts else NO_GUIDANCE
    untouched(family, plain.contrasts, steps)

    # What the stock pipeline draws is what a rollout ends in, at the cost that was planned.
    with counted(made) as rows:
        pictures = drawn(made, stack, steps=steps)
        seen = sum(rows)
        # Masked pictures are drawn one by one, so that rows are counted and not calls.
        once = steps * sum(ONCE.get(name, 0) for name in names)
        assert seen == len(REQUESTS) * sum(stack.plan(made, steps).rows) + once
        ours = rolled(made, stack, steps)
        assert sum(rows) == 2 * seen
    np.testing.assert_allclose(pictures, ours, rtol=0, atol=1e-5)
    # A row does not see the others.
    alone = drawn(made, stack, REQUESTS[1:], steps)
    np.testing.assert_allclose(alone, pictures[1:], rtol=0, atol=1e-5)

    # At its neutral strength nothing is called, and nothing changes by a bit.
    with counted(made) as rows:
        neutral = drawn(made, plain, REQUESTS[1:], steps)
        assert sum(rows) == steps * (2 if plain.contrasts else 1)
    stock = drawn(made, base, REQUESTS[1:], steps)
    if names != ("cfg",):
        assert moved(made, stack, plain, alone - stock) > 1e-3
    if family != "z_image" or not plain.contrasts:
        np.testing.assert_array_equal(neutral, stock)
    else:  # its pipeline computes c + (w - 1) (c - u)
        np.testing.assert_allclose(neutral, stock, rtol=0, atol=1e-5)
    assert state(made) == before
    np.testing.assert_array_equal(stock, untouched(family, plain.contrasts, steps))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_without_a_base_is_added_to_what_the_pipeline_does(family):
    made = model(family)
    slg = term_of("slg")
    request = REQUESTS[:1]
    with GuidanceStack([slg]).attach(made):
        found = drawn(made, CFG(scale=3.0), request)
    np.testing.assert_allclose(found, drawn(made, stack_of(slg), request), rtol=0, atol=1e-5)
    with GuidanceStack([term_of("slg", scale=0)]).attach(made):
        found = drawn(made, CFG(scale=3.0), request)
    np.testing.assert_array_equal(found, drawn(made, CFG(scale=3.0), request))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_stock_pipeline_is_guided_as_it_is_called(family):
    """By its user, who gives the guidance that the pipeline needs and no more."""
    made, before = model(family), state(model(family))
    stack = stack_of(term_of("pag", window=(0.0, 0.9)))
    options = {"num_inference_steps": STEPS, "latents": made._stock_latents(noise_of(made)), "output_type": "np"}
    own = {"true_cfg_scale": 2.0, "guidance_scale": 1.0} if family == "flux" else {"guidance_scale": 9.0}
    off = {"guidance_scale": 1.0}
    with stack.attach(made.pipe):
        found = made.pipe(PROMPTS, negative_prompt=["small"] * 2, height=16, width=16, **options, **own).images
    np.testing.assert_allclose(found, drawn(made, stack), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="does not predict"), stack.attach(made.pipe):
        made.pipe(PROMPTS, height=16, width=16, **options, **off)
    with pytest.raises(UserError, match="attached to this pipeline already"), stack.attach(made.pipe):
        drawn(made, stack)
    with pytest.raises(KeyboardInterrupt), stack.attach(made.pipe):
        raise KeyboardInterrupt
    assert state(made) == before


def pairs():
    names = [name for name in plugin.names("guidance") if (name, "sd") not in CANNOT and name not in STEPPING]
    # What edits latents acts between predictions.
    terms = {name: term for name in names if not isinstance(term := term_of(name), Edit)}
    for one, other in itertools.combinations(terms, 2):
        if not (isinstance(terms[one], Base) and isinstance(terms[other], Base)):
            yield terms[one], terms[other]


def test_terms_stand_beside_each_other():
    made = model("sd")
    cond, x = made.embed(PROMPTS[:1]), noise_of(made, REQUESTS[:1])
    uncond, t = made.unconditional(1), torch.tensor([600])

    @torch.no_grad()
    def at(stack):
        return guided(made, x, t, cond, uncond, stack)

    @functools.cache
    def alone(*names):
        return at(GuidanceStack([term_of(name) for name in names]))

    for one, other in pairs():
        stack = stack_of(one, other)
        with counted(made) as rows:
            found = at(stack)
        assert sum(rows) == stack.plan(made, STEPS).rows[0]
        # Both act: without either it is another prediction, and the order in which they are listed is none.
        for term in (one, other):
            without = alone(*(left.name for left in stack.terms if left is not term))
            assert (found - without).abs().max() > 1e-5
        torch.testing.assert_close(at(GuidanceStack(stack.terms[::-1])), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", STEPPING)
def test_a_term_that_steps_needs_a_run(name):
    made = model("sd")
    given = (made, noise_of(made), torch.tensor([600, 600]), made.embed(PROMPTS), None, GuidanceStack([term_of(name)]))
    with torch.no_grad(), pytest.raises(UserError, match=STEPPING[name]):
        guided(*given)
    with pytest.raises(UserError, match="no gradient"):
        guided(*given)


def test_the_perturbations_of_a_stack_add_up():
    """base + sum of s (c - worse), each computed by itself, in float64."""
    made = model("sd")
    made.denoiser.double()
    try:
        cond, uncond = (
            replace(side, tokens=side.tokens.double()) for side in (made.embed(PROMPTS), made.unconditional(2))
        )
        x, t = noise_of(made).double(), torch.tensor([700, 300])
        terms = [term_of(name) for name in ("pag", "seg", "slg", "autoguidance")]

        @torch.no_grad()
        def at(*given):
            return guided(made, x, t, cond, uncond, GuidanceStack(given))

        c = at()
        expected = at(term_of("cfg")) + sum(at(term) - c for term in terms)
        torch.testing.assert_close(at(term_of("cfg"), *terms), expected, rtol=0, atol=1e-10)
        with torch.no_grad():
            assert torch.equal(c, made.predict(x, t, cond))
        # Rows have strengths of their own.
        window = at(term_of("pag", window=(0.5, 1.0)))
        torch.testing.assert_close(window[0], at(term_of("pag"))[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(window[1], c[1], rtol=0, atol=1e-10)
    finally:
        made.denoiser.float()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_gradients_are_those_of_the_guided_chain(family):
    """Step by step, with the network's own checkpoints, and as one graph, whatever perturbs or shapes the network."""
    able = [term_of(name) for name in plugin.names("guidance") if (name, family) not in CANNOT and name not in STEPPING]
    # What remembers is computed in one go, and refused here.
    terms = [term for term in able if isinstance(term, Perturbed | Shaping | Feeding) and not term.remembers]
    made = model(family)
    made.denoiser.train()
    cond, start, found = made.embed(PROMPTS), Start(latents=noise_of(made)), []
    parameter = next(adapters.attached(made.of("denoiser"))["default"].parameters())
    options = {"guidance": GuidanceStack(terms), "chain": STEPS, "start": start}
    for checkpointed in (False, True):
        if checkpointed:
            made.denoiser.enable_gradient_checkpointing()
        parameter.grad = None
        rollout(made, cond, window=Window(steps=STEPS), **options).final.square().sum().backward()
        found.append(parameter.grad)
    parameter.grad = None
    trajectory = rollout(made, cond, window=Window(steps=STEPS, deferred=True), **options)
    backpropagate(made, trajectory, 2 * trajectory.final)
    made.denoiser.disable_gradient_checkpointing()
    made.denoiser.eval()
    for other in (found[1], parameter.grad):
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))
    assert found[0].abs().max() > 0


def test_replay_scores_what_was_guided():
    from visiontune.diffusion.dynamics import DDIM

    made = model("sd")
    stack = stack_of(term_of("pag"), term_of("rescale"))
    options = {
        "chain": 3,
        "dynamics": DDIM(eta=1.0),
        "start": Start(latents=noise_of(made), generator=torch.Generator()),
    }
    with torch.no_grad():
        trajectory = rollout(made, made.embed(PROMPTS), guidance=stack, keep=Keep(log_probs=True), **options)
        torch.testing.assert_close(replay(made, trajectory), trajectory.log_probs[:, trajectory.scored], rtol=0, atol=0)
        apg = GuidanceStack([term_of("apg")])
        with pytest.raises(UserError, match="remembers earlier steps"):
            rollout(made, made.embed(PROMPTS), guidance=apg, keep=Keep(log_probs=True), **options)
        kept = rollout(made, made.embed(PROMPTS), guidance=apg, keep=Keep(history=True), **options)
        with pytest.raises(UserError, match="remembers earlier steps"):
            replay(made, kept)


def test_pag_is_that_of_diffusers():
    """Its pipeline perturbs `mid`, as we do."""
    from diffusers import StableDiffusionPAGPipeline

    made = model("sd")
    stock = StableDiffusionPAGPipeline(
        **{**made.pipe.components, "requires_safety_checker": False}, pag_applied_layers="mid"
    )
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "latents": noise_of(made), "output_type": "np", "height": 16, "width": 16}
    processors = made.denoiser.attn_processors
    expected = stock(PROMPTS, negative_prompt=["small"] * 2, guidance_scale=3.0, pag_scale=2.0, **options).images
    made.denoiser.set_attn_processor(processors)
    np.testing.assert_allclose(drawn(made, stack_of(term_of("pag", scale=2.0))), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        (
            "sd",
            {"pag": {"layers": ["down_block.0"]}},
            "no layer of 'tiny-sd' is called 'down_block.0'; did you mean 'down_bl",
        ),
        ("sd3", {"slg": {"layers": [7]}}, "no layer of 'tiny-sd3' is called '7'"),
        ("sd", {"pag": {"window": [0.2, 0.21]}}, r"pag acts at none of the steps.*window, which is \[0.2, 0.21\]"),
        ("sd", {"cfg_zero": 3}, "'tiny-sd' predicts eps: set its zero to null"),
        ("sd", {"autoguidance": {"weak": "earlier"}}, "no adapters called 'earlier' are attached; known: default"),
        ("sd", {"autoguidance": {"strength": 1}}, "would be the model itself: attach adapters"),
        ("sd", {"autoguidance": {"weak": "default"}}, "acts in the model that is guided, too"),
    ],
)
def test_what_cannot_be_is_said(family, spec, message):
    with pytest.raises(UserError, match=message):
        GuidanceStack.of([spec]).plan(model(family), STEPS)


def test_autoguidance_takes_an_earlier_checkpoint_or_less_of_the_adapters():
    made = model("sd")
    cond, x, t = made.embed(PROMPTS), noise_of(made), torch.tensor([700, 300])
    trained = adapters.attached(made.of("denoiser"))["default"]
    with torch.no_grad():
        strong = made.predict(x, t, cond)
        trained.scale = 0.5
        weak = made.predict(x, t, cond)
        trained.scale = 1.0
        found = guided(made, x, t, cond, None, GuidanceStack([term_of("autoguidance", scale=3.0, strength=0.5)]))
        torch.testing.assert_close(found, weak + 3 * (strong - weak), rtol=0, atol=1e-5)
        earlier = adapters.attach(
            made.of("denoiser"), "lora", name="earlier", targets="attention", presets=made.presets()
        )
        for parameter in earlier.eval().parameters():
            parameter.fill_(0.2)
        with trained.disable():
            weak = made.predict(x, t, cond)
        earlier.enabled = False
        found = guided(made, x, t, cond, None, GuidanceStack([term_of("autoguidance", scale=3.0, weak="earlier")]))
        torch.testing.assert_close(found, weak + 3 * (strong - weak), rtol=0, atol=1e-5)
        assert trained.enabled and not earlier.enabled
    earlier.detach()


def test_a_network_that_is_told_its_guidance_is_told_that_of_the_stack():
    made = model("flux")
    stack = GuidanceStack([term_of("embedded", scale=2.5)])
    assert isinstance(stack.told, Told) and stack.plan(made, STEPS).rows == (1,) * STEPS
    plain = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    np.testing.assert_array_equal(drawn(made, stack, plain), drawn(made, made.guidance(2.5), plain))
