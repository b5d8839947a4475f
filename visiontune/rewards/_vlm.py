"""One image and one text on their way into a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visiontune.errors import UserError


def chat(processor: Any, text: str) -> str:
    """A user's message of the image and ``text``, as the processor's template puts it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    if getattr(processor, "chat_template", None):
        message = [{"role": "user", "content": content}]
        return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return f"{getattr(processor, 'image_token', '')}\n{text}"


def inputs_of(processor: Any, image: Tensor, text: str, reward: str) -> Any:
    """What the model reads for an image ``[3, h, w]`` in [0, 1] and a finished ``text``.

    Differentiable through processors that work on tensors, which is what transformers loads where torchvision is
    installed.

    Raises:
        UserError: the image wants a gradient, and the processor works on arrays. ``reward`` is named in it.
    """
    from transformers.image_processing_backends import TorchvisionBackend

    # A processor that works on arrays can take no part in a graph.
    pixels = image if isinstance(processor.image_processor, TorchvisionBackend) else image.detach().cpu()
    inputs = processor(text=[text], images=[pixels], do_rescale=False, return_tensors="pt")
    if image.requires_grad and torch.is_grad_enabled() and not inputs["pixel_values"].requires_grad:
        raise UserError(f"the processor of reward '{reward}' passes no gradient: install torchvision")
    return inputs.to(image.device)
