"""A reward behind HTTP: images are posted to a server of yours, which answers with scores.

The request is ``POST`` with the JSON body ``{"images": [base64 of a lossless PNG or WebP file, ...], "prompts": [...],
"meta": [...] or null}``; the answer must be JSON ``{"scores": [one number an image]}``. A server that does not answer
stops the run: no score is ever made up.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visiontune.errors import UserError
from visiontune.ops.pixels import to_uint8
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the remote reward."""

    url: str = option("", help="where images are posted, http://host:port/path; required")
    format: Literal["png", "webp"] = option("png", help="lossless file format of the images")
    batch_size: int = option(16, help="images a request")
    timeout: float = option(60.0, help="seconds that a request may take")
    retries: int = option(3, help="further attempts when a request fails or the server is busy")
    backoff: float = option(1.0, help="seconds before the first further attempt; doubled each time")
    headers: dict[str, str] = option({}, help="HTTP headers, for instance an authorisation")

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UserError(f"url must start with http:// or https://, not '{self.url}'")
        if self.batch_size < 1 or self.timeout <= 0 or self.retries < 0 or self.backoff < 0:
            raise UserError("batch_size and timeout must be positive, retries and backoff at least 0")


def build(config: Config) -> Remote:
    """The reward of a config; the server is first asked when images are scored."""
    if not config.url:
        raise UserError("the reward remote needs a server: set url: http://HOST:PORT/PATH")
    return Remote(config)


class Remote(Reward):
    """A black box; pixels travel as bytes."""

    name = "remote"

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, images: Tensor, prompts: Sequence[str], meta: Meta) -> Tensor:
        pictures, size = [self._file(picture) for picture in to_uint8(images)], self.config.batch_size
        scores: list[float] = []
        for start in range(0, len(pictures), size):
            part = slice(start, start + size)
            scores += self._ask(pictures[part], list(prompts[part]), list(meta[part]) if meta is not None else None)
        return torch.tensor(scores, dtype=torch.float32)

    def _ask(self, pictures: list[str], prompts: list[str], meta: Any) -> list[float]:
        body = json.dumps({"images": pictures, "prompts": prompts, "meta": meta}, default=str).encode()
        answer = self._post(body)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{self._server} did not answer {{"scores": [...]}} but {_short(answer)}') from error
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or len(scores) != len(pictures):
            raise UserError(f"{self._server} must answer {len(pictures)} numbers, not {_short(json.dumps(scores))}")
        return scores

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", **self.config.headers}
        request = urllib.request.Request(self.config.url, body, headers, method="POST")
        for attempt in range(self.config.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.config.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}"
                # The request itself is at fault: it would fail again.
                if error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{self._server} refused the request: {trouble}") from error
            except (OSError, HTTPException) as error:
                trouble = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.config.retries:
                _log.warning(
                    "%s failed (%s), attempt %d of %d", self._server, trouble, attempt + 1, self.config.retries + 1
                )
                time.sleep(self.config.backoff * 2**attempt)
        raise UserError(f"{self._server} failed {self.config.retries + 1} times ({trouble}): is the server running?")

    @property
    def _server(self) -> str:
        return f"the server of reward '{self.name}' at {self.config.url}"

    def _file(self, picture: np.ndarray) -> str:
        file = io.BytesIO()
        # Fast settings: both formats are lossless at any effort.
        settings: dict[str, Any] = (
            {"compress_level": 1} if self.config.format == "png" else {"lossless": True, "method": 0}
        )
        Image.fromarray(picture).save(file, self.config.format, **settings)
        return base64.b64encode(file.getvalue()).decode()


def _short(text: bytes | str) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
