"""Score-of-mixture distillation: pictures in one step, made likelier where the teacher draws more than the student.

Jayashankar, Ryu, Wornell, "Score-of-Mixture Training", 2025, arXiv 2502.09609, the distilling form (SMD). With p what
the guided teacher draws and q what the student draws in its few steps, x one of the student's pictures and x_t that
with noise, the gradient of a skewed Jensen-Shannon divergence, for every skew a in (0, 1], is

    dL/dx = D (mu_q - mu_p) / (a |x - mu_p|),    D = 1 / (1 + (1 - a) q / (a p))

where mu_p and mu_q are the clean latents that either model expects at x_t, |.| is a mean over the picture, and a is
drawn anew for each row. mu_q is a second network, a *critic* of the same shape as the student, which learns to denoise
the student's pictures; log p/q is a small judge's, which learns to tell noised pictures of the two apart:

    mean over p of a (1 - D)^2 |mu_p - mu_q|^2  +  mean over q of (1 - a) D^2 |mu_p - mu_q|^2

Both take several steps for one of the student. With a = 1 alone, D is 1 and no judge is needed, nor any picture of the
teacher: that is distribution matching distillation (Yin et al., 2024, arXiv 2311.18828) with the critic of DMD2 (Yin et
al., 2024, arXiv 2405.14867) and without its regression and its adversarial loss.

Steps before the one that is differentiated are made without a gradient, as many as chance says, as samplers will make
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import LCMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from visiontune.core import Batch, Condition, Loss
from visiontune.diffusion.guidance import guided
from visiontune.diffusion.timesteps import Timesteps
from visiontune.diffusion.trajectory import Chain, require_no_memory
from visiontune.diffusion.transition import transition
from visiontune.objectives._critic import Critic, Judge, critic_of
from visiontune.objectives._distilled import few_facts, few_sampler, refuse_told
from visiontune.objectives._online import Stepped, SteppedConfig, parts_of
from visiontune.objectives.base import Needs, Tools, per_row
from visiontune.objectives.consistency import consistency
from visiontune.schema import option

if TYPE_CHECKING:
    from visiontune.models.diffusion import DiffusionModel

LEAST_SKEW, MOST_SKEW = 1e-3, 1 - 1e-4
LEAST_DISTANCE = 1e-2  # of a picture from what the teacher takes it for, so that the gradient stays finite


@dataclass(frozen=True, kw_only=True)
class Config(SteppedConfig):
    """Options of score-of-mixture distillation; `steps`, `cfg_scale` and `guidance` are the teacher's."""

    few_steps: int = option(1, least=1, greatest=50, help="sampling steps of what is trained, without guidance")
    mixture: bool = option(
        True, help="skews from 0 to 1, for which the teacher draws pictures too; false: 1 alone (DMD)"
    )
    critic_updates: int = option(5, least=1, greatest=1000, help="steps of the critic for one of the student")
    critic_lr: float = option(
        1e-3, above=0, greatest=1, help="the critic's learning rate, for pocket/sd; full-size models want about 1e-5"
    )
    timesteps: Timesteps = option(Timesteps(low=0.02, high=0.98), help="the noise that pictures are compared at")


def build(config: Config) -> ScoreMixture:
    """The objective that ``config`` describes."""
    return ScoreMixture(config)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """Some prompts of a batch, and the teacher's pictures of them ``[b, ...]``, if any are needed."""

    rows: Batch
    real: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Noised:
    """Pictures ``x`` with noise ``eps``: ``x_t`` at timesteps ``t`` ``[b]``; the others are ``[b, ...]``."""

    x: Tensor
    eps: Tensor
    x_t: Tensor
    t: Tensor
    cond: Condition


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """For the judge: the teacher's pictures with noise, what the teacher takes for clean in them and in the student's
    ``[b, ...]``, and skews ``[b]``."""

    real: Noised
    of_real: Tensor
    of_fake: Tensor
    skew: Tensor


class ScoreMixture(Stepped):
    """Logs ``gap``, the mean size of the gradient in pictures, times their number of values; ``critic``, the loss of
    the critic and of its judge in their last step.

    Attributes:
        sampler: by which the result is to be drawn, known once a model was checked.
    """

    config: Config
    sampler: str = "lcm"

    @property
    def needs(self) -> Needs:
        return Needs(online=True, reference=True, text=False)

    def check(self, model: Any, reward: Any) -> None:
        """Besides, refuse a model that is told its guidance, and a teacher that single steps cannot ask."""
        super().check(model, reward)
        guidance = self.guidance(model)
        refuse_told(model, guidance)
        require_no_memory(guidance)
        self.sampler = few_sampler(model)

    def facts(self) -> dict[str, str]:
        """How many steps samplers are to take, by which, and that guidance is inside."""
        return few_facts(self.config, self.config.few_steps, self.sampler)

    def setup(self, model: DiffusionModel, tools: Tools) -> None:
        """The critic begins as the student."""
        channels = model.latent_shape()[0] if self.config.mixture else None
        tools.state["critic"] = critic_of(tools, self.config.critic_lr, channels, model.device)

    @torch.no_grad()
    def collect(self, model: DiffusionModel, batch: Batch, tools: Tools) -> list[Collected]:
        """The teacher's pictures of each prompt; none without mixtures."""
        parts = parts_of(batch, self.config.micro_batch)
        if not self.config.mixture:
            return [Collected(rows=rows, real=None) for rows in parts]
        # Their noise is not that of the student's pictures.
        return [Collected(rows=rows, real=self.drawn_by_base(model, rows, tools, "teacher")) for rows in parts]

    def update(self, model: DiffusionModel, collected: list[Collected], part: int, tools: Tools) -> Loss:
        """The student's gradient, and then the critic's steps."""
        critic, count = tools.state["critic"], sum(len(one.rows) for one in collected)
        total, gap = torch.zeros((), device=model.device), torch.zeros((), device=model.device)
        for one in collected:
            share = len(one.rows) / count
            with torch.enable_grad():
                loss, size = self._student(model, one.rows, critic, tools)
                (tools.scale * share * loss).backward()
            total, gap = total + share * loss.detach(), gap + share * size
        found = 0.0
        for step in range(self.config.critic_updates):
            watched = [self._watched(model, one, tools, step) for one in collected]
            found = critic.learn(tools, [partial(self._criticism, model, critic, one, count) for one in watched])
        return Loss(total=total, terms={"gap": gap, "critic": torch.tensor(found, device=model.device)})

    # -- the student --------------------------------------------------------------------------------------------

    def _student(self, model: DiffusionModel, rows: Batch, critic: Critic, tools: Tools) -> tuple[Tensor, Tensor]:
        """A loss whose gradient in the pictures is that of the divergence, and the mean size of that."""
        cond = model.embed(rows.prompts)
        x = self.generate(model, cond, rows, tools, "student")
        with torch.no_grad():
            seen = self._noised(model, x.detach(), cond, rows, tools, "student")
            mu_p = self._of_teacher(model, seen, tools)
            with critic.as_model(tools):
                mu_q = self._clean(model, seen)
            scale = 1 / per_row((seen.x - mu_p).abs()).clamp(min=LEAST_DISTANCE)
            if critic.judge is not None:
                skew = self._skews(rows, tools, "student").to(x.device)
                scale = scale * _share(critic.judge, model, seen, mu_p, mu_q, skew) / skew
            towards = scale.view(-1, *(1,) * (x.ndim - 1)) * (mu_q - mu_p)
        return 0.5 * per_row((x - (x - towards).detach()).square()).mean(), towards.abs().mean()

    def generate(self, model: DiffusionModel, cond: Condition, rows: Batch, tools: Tools, *key: int | str) -> Tensor:
        """The student's clean latents ``[b, ...]`` after one step or more; the last has a gradient, where any has."""
        generators = tools.generators(rows, *key)
        start, end = self.chain(model)
        last = int(torch.randint(len(start), (), generator=tools.shared(*key)))
        x = randn_tensor((len(rows), *model.latent_shape()), generator=generators, device=model.device)
        for t, t_next in zip(start[:last], end[:last], strict=True):
            with torch.no_grad():
                x = self._step(model, x, t.expand(len(x)), t_next.expand(len(x)), cond, generators)
        t = start[last].expand(len(x))
        return consistency(model.schedule, model.predict(x, t, cond), x, t)

    def chain(self, model: DiffusionModel) -> Chain:
        """Where the student's steps begin and end: those of ``LCMScheduler``, or of flow the model's own."""
        if model.schedule.prediction == "flow":
            start, end = model.chain(self.config.few_steps, model.latent_shape())
        else:
            total = model.schedule.num_train_timesteps
            stock: Any = LCMScheduler(num_train_timesteps=total, original_inference_steps=min(50, total))
            stock.set_timesteps(self.config.few_steps)
            start = stock.timesteps
            end = torch.cat([start[1:], start.new_tensor([-1])])
        return start.to(model.device), end.to(model.device)

    def _step(
        self,
        model: DiffusionModel,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        cond: Condition,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """As the sampler steps: clean latents noised anew; of flow along the straight line."""
        pred = model.predict(x, t, cond)
        if model.schedule.prediction == "flow":
            return transition(model.schedule, pred, x, t, t_next, self.dynamics)[0]
        eps = randn_tensor(x.shape, generator=list(generators), device=x.device)
        return model.schedule.add_noise(consistency(model.schedule, pred, x, t), eps, t_next)

    # -- the critic ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _watched(
        self, model: DiffusionModel, one: Collected, tools: Tools, step: int
    ) -> tuple[Noised, Compared | None]:
        """Pictures that the student draws now, and the teacher's, if there are any, with the same noise."""
        rows, key = one.rows, ("critic", step)
        cond = model.embed(rows.prompts)
        fake = self._noised(model, self.generate(model, cond, rows, tools, *key), cond, rows, tools, *key)
        if one.real is None:
            return fake, None
        real, skew = self._noised(model, one.real, cond, rows, tools, *key), self._skews(rows, tools, *key)
        of_real, of_fake = (self._of_teacher(model, seen, tools) for seen in (real, fake))
        return fake, Compared(real=real, of_real=of_real, of_fake=of_fake, skew=skew.to(model.device))

    def _criticism(
        self, model: DiffusionModel, critic: Critic, watched: tuple[Noised, Compared | None], count: int
    ) -> Tensor:
        """The loss of the critic, which the model is here, and of its judge: the share of these of ``count`` rows."""
        fake, other = watched
        pred = model.predict(fake.x_t, fake.t, fake.cond)
        loss = per_row((pred.float() - model.schedule.target(fake.x, fake.eps, fake.t).float()).square())
        if critic.judge is not None and other is not None:
            with torch.no_grad():
                of_fake = model.schedule.to_x_0(pred, fake.x_t, fake.t)
                of_real = self._clean(model, other.real)
            real = _share(critic.judge, model, other.real, other.of_real, of_real, other.skew)
            taken = _share(critic.judge, model, fake, other.of_fake, of_fake, other.skew)
            loss = loss + other.skew * (1 - real).square() * _apart(other.of_real, of_real)
            loss = loss + (1 - other.skew) * taken.square() * _apart(other.of_fake, of_fake)
        return loss.sum() / count

    # -- both ---------------------------------------------------------------------------------------------------

    def _noised(
        self, model: DiffusionModel, x: Tensor, cond: Condition, rows: Batch, tools: Tools, *key: int | str
    ) -> Noised:
        """Clean latents with noise of the rows' own."""
        generators = tools.generators(rows, *key, "noise")
        quantile = torch.cat([torch.rand(1, generator=rng, dtype=torch.float64) for rng in generators])
        t = self.config.timesteps.draw(model, x.shape[1:], len(x), tools.rng, quantile).to(x.device)
        eps = randn_tensor(x.shape, generator=generators, device=x.device)
        return Noised(x=x, eps=eps, x_t=model.schedule.add_noise(x, eps, t), t=t, cond=cond)

    def _of_teacher(self, model: DiffusionModel, seen: Noised, tools: Tools) -> Tensor:
        """mu_p: what the guided teacher takes for clean."""
        with tools.reference():
            pred = guided(model, seen.x_t, seen.t, seen.cond, None, self.guidance(model))
        return model.schedule.to_x_0(pred, seen.x_t, seen.t)

    def _clean(self, model: DiffusionModel, seen: Noised) -> Tensor:
        """What the model takes for clean."""
        return model.schedule.to_x_0(model.predict(seen.x_t, seen.t, seen.cond), seen.x_t, seen.t)

    def _skews(self, rows: Batch, tools: Tools, *key: int | str) -> Tensor:
        """a ``[b]`` of each row, on the CPU."""
        drawn = [torch.rand(1, generator=rng) for rng in tools.generators(rows, *key, "skew")]
        return torch.cat(drawn).clamp(LEAST_SKEW, MOST_SKEW)


def _share(judge: Judge, model: DiffusionModel, seen: Noised, mu_p: Tensor, mu_q: Tensor, skew: Tensor) -> Tensor:
    """D ``[b]``."""
    return torch.sigmoid(judge(seen.x_t, mu_p, mu_q, seen.t / model.schedule.num_train_timesteps) + skew.logit())


def _apart(ones: Tensor, others: Tensor) -> Tensor:
    """Mean squared distance ``[b]``."""
    return per_row((ones - others).float().square())
