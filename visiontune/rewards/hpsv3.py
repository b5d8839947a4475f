"""HPS v3: a vision-language model trained on human preferences over pictures of every kind.

Ma et al., "HPSv3: Towards Wide-Spectrum Human Preference Score", ICCV 2025: Qwen2-VL reads an image and an instruction
with the prompt in it, and a small head on the state of one token of its own gives the mean and the logarithm of the
deviation of the preference. The mean is the score. Two things are as the published code has them, since the weights
were trained so: every image is brought to about 448 x 448 pixels, and its tokens are numbered on in a row, where
Qwen2-VL has rows and columns. Images go in one by one, so that no padding of the batch changes a score.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visiontune.errors import UserError
from visiontune.models.sources import find_file, load_exactly, read_tensors, weights_of
from visiontune.rewards._vlm import chat, inputs_of
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

FILE, TOKEN, PIXELS = "HPSv3.safetensors", "<|Reward|>", 448 * 448


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of HPS v3."""

    model: str = option("MizzenAI/HPSv3", help="checkpoint file, its folder, or a Hub id")
    revision: str | None = option(None, help="branch, tag or commit of a Hub model")
    base: str = option("Qwen/Qwen2-VL-7B-Instruct", help="folder or Hub id of its configuration and processor")
    base_revision: str | None = option(None, help="branch, tag or commit of the base")
    instruction: str | None = option(
        None, help="text file of what is asked, with {text_prompt}; null reads that of the package hpsv3"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", help="precision of all but the head")


def build(config: Config) -> HpsV3:
    """The reward of a config; loads the weights."""
    instruction = _instruction(config.instruction)
    path = find_file(config.model, FILE, config.revision)
    from transformers import AutoProcessor, Qwen2VLConfig

    revision, what = config.base_revision or "main", f"the base '{config.base}' of HPS v3"
    with weights_of(what, "transformers", config.base, option="base", revision=config.base_revision):
        settings = Qwen2VLConfig.from_pretrained(config.base, revision=revision)
        processor = AutoProcessor.from_pretrained(config.base, revision=revision)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    processor.image_processor.size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    model, head = _networks(settings, read_tensors(path), path, getattr(torch, config.dtype))
    return HpsV3(model, head, processor, instruction)


def _networks(settings: Any, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """The model without its language head, and the reward head in float32."""
    from transformers import Qwen2VLModel

    words = tensors.get("model.embed_tokens.weight")
    if words is None:
        raise UserError(f"{path} does not hold these weights: model.embed_tokens.weight is missing")
    # The published file is cut to the words of the tokenizer, the reward's own included.
    settings.text_config.vocab_size = len(words)
    width = settings.text_config.hidden_size
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    mine = {key.removeprefix("rm_head."): t.float() for key, t in tensors.items() if key.startswith("rm_head.")}
    load_exactly(head, mine, path)
    rest = {_renamed(key): t for key, t in tensors.items() if not key.startswith(("rm_head.", "lm_head."))}
    with torch.device("meta"):
        load_exactly(Qwen2VLModel(settings), {key: t.to("meta") for key, t in rest.items()}, path)
    model = Qwen2VLModel.from_pretrained(None, config=settings, state_dict=rest, dtype=dtype)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def _renamed(key: str) -> str:
    """Where transformers 5 keeps what the file, written by transformers 4, calls ``key``."""
    return re.sub(r"^model\.", "language_model.", key)


def _instruction(file: str | None) -> str:
    """What is asked, with a place for the prompt and with the reward's token."""
    if file is not None:
        path = Path(file).expanduser()
        if not path.is_file():
            raise UserError(f"there is no file {path}: correct instruction")
        text = path.read_text(encoding="utf-8")
    else:
        text = _published_instruction()
    if "{text_prompt}" not in text or TOKEN not in text:
        raise UserError(f"the instruction of HPS v3 must contain {{text_prompt}} and {TOKEN}")
    return text


def _published_instruction() -> str:
    """The text the weights were trained with, read from the authors' package without importing it.

    The package itself asks for a version of transformers that nothing else here works with.
    """
    found = importlib.util.find_spec("hpsv3")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "HPS v3 was trained with one instruction, which is in its authors' package: `pip install --no-deps hpsv3`, "
            "or set instruction: FILE"
        )
    source = Path(found.submodule_search_locations[0]) / "dataset" / "data_collator_qwen.py"
    body = ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []
    assigned = [(node.targets[0], node.value) for node in body if isinstance(node, ast.Assign)]
    texts = {
        name.id: value.value
        for name, value in assigned
        if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
    try:
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except KeyError as missing:
        raise UserError(f"the package hpsv3 has no {missing}: install hpsv3==1.0.0, or set instruction: FILE") from None


class HpsV3(Reward):
    """The mean of a preference, unbounded; about -5 to 15. Differentiable; images may have any size."""

    name = "hpsv3"
    differentiable: bool = True

    def __init__(self, model: Any, head: nn.Module, processor: Any, instruction: str) -> None:
        self.model, self.head, self.processor, self.instruction = model, head, processor, instruction
        self.token = processor.tokenizer.convert_tokens_to_ids(TOKEN)

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        self.model.to(images.device)
        self.head.to(images.device)
        return torch.stack([self._mean(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    def _mean(self, image: Tensor, prompt: str) -> Tensor:
        text = chat(self.processor, self.instruction.replace("{text_prompt}", prompt))
        inputs = inputs_of(self.processor, image, text, self.name).to(self.model.dtype)
        inputs.pop("mm_token_type_ids", None)
        tokens = inputs["input_ids"]
        in_a_row = torch.arange(tokens.shape[1], device=tokens.device).expand(3, 1, -1)
        states = self.model(**inputs, position_ids=in_a_row, use_cache=False).last_hidden_state
        return self.head(states[0, tokens[0] == self.token][-1].float())[0]
