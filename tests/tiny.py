"""Tiny random pipelines of the real diffusers classes, for tests: one file a family in `tests/families`.

Every call gives an independent copy of a pipeline that is built once per session from a fixed seed. Images are 16x16
pixels, latents half as wide, prompts at most 32 tokens. A family's file defines

    pipeline(**options) -> the pipeline, in evaluation mode; weights are drawn from torch's own generator
    VARIANTS            -> options that the contract of families tests besides none, if there are any
    SEED                -> of the weights, if not 0
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "a an of the in on photo picture circle square triangle red green blue small large left right above below"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-_()[]<>"
MAX_TOKENS = 32
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 16  # pixels per side


def tiny_pipe(family: str = "sd", **options: Any) -> Any:
    """The tiny pipeline of a family: `tiny_pipe("sd", prediction_type="v_prediction")`."""
    return _copy(_built(family, **options))


def tiny_model(family: str = "sd", source: str | None = None, **options: Any) -> Any:
    """The model of a tiny pipeline, which says that it comes from `source`."""
    from visiontune.models import families

    return families()[family](tiny_pipe(family, **options), source=source or f"tiny-{family}")


def save_tiny(folder: str | Path, family: str = "sd", **options: Any) -> Path:
    """Write a tiny pipeline in the diffusers layout, for whatever opens a model by its folder."""
    _built(family, **options).save_pretrained(folder)
    return Path(folder)


def variants(family: str) -> list[dict[str, Any]]:
    """The options of the pipelines that a family is tested on: none, and its `VARIANTS`."""
    return [{}, *getattr(_file(family), "VARIANTS", ())]


def save_tiny_llava(folder: str | Path, **changes: Any) -> Path:
    """Write a LLaVA with a Llama of two layers, whose pictures are four tokens, in transformers' layout."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<|endoftext|>"})
    mark = words.convert_tokens_to_ids("<image>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **ends, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=SIZE, patch_size=8, projection_dim=16),
        text_config={**text, "vocab_size": len(words)},
        image_token_index=mark,
        image_seq_length=4,
        **changes,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def remade(module: Any, **changes: Any) -> Any:
    """A module of the same class with some options of its config changed, randomly initialised from seed 0."""
    options = {key: value for key, value in module.config.items() if not key.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(module)(**{**options, **changes}).eval()


# -- what the files of families share -----------------------------------------------------------------------------


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of each of WORDS and one of each character elsewhere."""
    merges, pieces = [], [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    for word in WORDS.split():
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
            pieces.append("".join(letters[: end + 1]))
    tokens = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=MAX_TOKENS)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a token for each of WORDS after a space, and a chat template as Qwen's."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [f" {word}" for word in WORDS.split() for _ in range(4)],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        model_max_length=1024,
        padding_side="right",
    )
    words.chat_template = CHAT
    return words


def clip_config(words: CLIPTokenizer) -> CLIPTextConfig:
    """Of a CLIP text encoder of three layers, 32 wide."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=32,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def autoencoder(block_out_channels: tuple[int, ...] = (8, 16), **options: Any) -> AutoencoderKL:
    """A VAE, of two levels unless more are given: 2 pixels per latent along a side."""
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        norm_num_groups=4,
        sample_size=SIZE,
        **options,
    ).eval()


def small_default(pipeline: Any, size: int) -> None:
    """Let a pipeline's class draw pictures of so many pixels where it has the size in its code, however it is made."""
    init = pipeline.__init__
    if getattr(init, "small", False):
        return

    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.default_sample_size = size // self.vae_scale_factor

    made.small = True  # type: ignore[attr-defined]
    pipeline.__init__ = made


def set_default(function: Any, name: str, value: Any) -> None:
    """Let a function, whatever decorates it, take another value for an option of which nothing is said."""
    plain = inspect.unwrap(function)
    options = [p.name for p in inspect.signature(plain).parameters.values() if p.default is not p.empty]
    given = dict(zip(options, plain.__defaults__, strict=True))
    assert name in given
    plain.__defaults__ = tuple((given | {name: value}).values())


# -- building and copying -----------------------------------------------------------------------------------------


def _file(family: str) -> Any:
    return importlib.import_module(f"families.{family}")


@functools.cache
def _built(family: str, **options: Any) -> Any:
    file = _file(family)
    with torch.random.fork_rng():
        torch.manual_seed(getattr(file, "SEED", 0))
        return file.pipeline(**options)


def _copy(pipe: Any) -> Any:
    parts = {k: _twin(v) if isinstance(v, torch.nn.Module) else v for k, v in pipe.components.items()}
    parts["scheduler"] = type(pipe.scheduler).from_config(pipe.scheduler.config)
    settings = {key: value for key, value in pipe.config.items() if not key.startswith("_") and key not in parts}
    made = type(pipe)(**parts, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that is pickled once: hundreds of small modules take `copy.deepcopy` four times as long."""
    content, tensors = _pickled(module)
    return _Reader(content, tensors).load()


@functools.cache
def _pickled(module: torch.nn.Module) -> tuple[bytes, list[torch.Tensor]]:
    """The bytes of a module, and the tensors that they name by number."""
    writer = _Writer(into := io.BytesIO())
    writer.dump(module)
    return into.getvalue(), writer.tensors


class _Writer(pickle.Pickler):
    """Writes all of a module but its tensors, which it numbers."""

    def __init__(self, into: io.BytesIO) -> None:
        super().__init__(into, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.numbers: dict[int, int] = {}

    def persistent_id(self, part: Any) -> int | None:
        if not isinstance(part, torch.Tensor):
            return None
        if id(part) not in self.numbers:
            self.numbers[id(part)] = len(self.tensors)
            self.tensors.append(part)
        return self.numbers[id(part)]


class _Reader(pickle.Unpickler):
    """Reads what a `_Writer` wrote, with copies of its tensors."""

    def __init__(self, content: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors, self.copied = tensors, {}

    def persistent_load(self, number: int) -> torch.Tensor:
        return copy.deepcopy(self.tensors[number], self.copied)
