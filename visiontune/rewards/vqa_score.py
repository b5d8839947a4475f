"""VQAScore: the probability that a vision-language model answers "yes" when asked whether the image shows the prompt.

Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", ECCV 2024, with any image-text-to-text
model of transformers. Images go in one by one, so that no padding of the batch changes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from visiontune.errors import UserError
from visiontune.models.sources import pretrained, weights_of
from visiontune.rewards._vlm import chat, inputs_of
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of VQAScore."""

    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", help="folder or Hub id of an image-text-to-text model")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    question: str = option(
        'Does this figure show "{prompt}"? Please answer yes or no.', help="what is asked; {prompt} is the prompt"
    )
    answers: list[str] = option(["Yes", "yes"], help="answers whose probabilities are added (by their first token)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="precision of the weights")

    def __post_init__(self) -> None:
        if "{prompt}" not in self.question:
            raise UserError(f"question must contain {{prompt}}, not just {self.question!r}")


def build(config: Config) -> VqaScore:
    """The reward of a config; loads the weights."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    revision, what = config.revision or "main", f"the vision-language model '{config.model}'"
    with weights_of(what, "transformers", config.model, revision=config.revision):
        model = pretrained(AutoModelForImageTextToText, config.model, revision=revision, dtype=config.dtype)
        processor = AutoProcessor.from_pretrained(config.model, revision=revision)
    return VqaScore(model, processor, config.question, config.answers)


class VqaScore(Reward):
    """A probability in [0, 1].

    Differentiable through processors that work on tensors, which is what transformers loads where torchvision is
    installed; a gradient through a large model costs its activations.
    """

    name = "vqa_score"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)

    def __init__(self, model: Any, processor: Any, question: str, answers: Sequence[str]) -> None:
        self.model, self.processor, self.question = model.eval().requires_grad_(False), processor, question
        tokens = [processor.tokenizer.encode(answer, add_special_tokens=False)[:1] for answer in answers]
        self.answers = sorted({token for first in tokens for token in first})
        if not self.answers:
            raise UserError("answers must name at least one word, such as Yes")

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        self.model.to(images.device)
        return torch.stack([self._yes(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    def _yes(self, image: Tensor, prompt: str) -> Tensor:
        text = chat(self.processor, self.question.replace("{prompt}", prompt))
        inputs = inputs_of(self.processor, image, text, self.name)
        logits = self.model(**inputs.to(self.model.dtype)).logits[0, -1]
        return logits.float().softmax(-1)[self.answers].sum().clamp(max=1)
