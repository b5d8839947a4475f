"""A reward behind HTTP: images are posted to a server of yours, which answers with scores.

The request is ``POST`` with the JSON body ``{"images": [base64 of a lossless PNG or WebP file, ...], "prompts": [...],
"meta": [...] or null}``; the answer must be JSON ``{"scores": [one number an image]}``. A server that does not answer
stops the run: no score is ever made up.

A server is not trusted with more than its answer: its size, the time of a whole request and its redirections (none) are
limited. Secrets stand in the environment; options, which are written to recipes and cards, hold their names.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visiontune import outside
from visiontune.errors import UserError
from visiontune.ops.pixels import to_uint8
from visiontune.rewards.base import Meta, Reward
from visiontune.schema import option

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 20
_KEY = re.compile(r"key|token|secret|pass|auth|sig|cred", re.IGNORECASE)
_SECRET = re.compile(r"\$\{(\w+)\}")
# Headers that say nothing secret; whatever another holds may be.
_OPEN_HEADERS = ("accept", "accept-encoding", "accept-language", "content-type", "user-agent")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the remote reward."""

    url: str = option("", help="where images are posted, http://host:port/path; ${NAME} is a variable; required")
    format: Literal["png", "webp"] = option("png", help="lossless file format of the images")
    batch_size: int = option(16, least=1, greatest=4096, help="images a request")
    timeout: float = option(60.0, above=0, greatest=86400, help="seconds that a request may take in all")
    retries: int = option(3, least=0, greatest=1000, help="further attempts when a request fails or the server is busy")
    backoff: float = option(
        1.0, least=0, greatest=3600, help="seconds before the first further attempt; doubled each time"
    )
    headers: dict[str, str] = option(
        {}, help="HTTP headers; secrets by variables of the environment: {Authorization: 'Bearer ${NAME}'}"
    )

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise UserError("url must start with http:// or https://")
        if "@" in urlsplit(self.url).netloc:
            raise UserError("url holds a password: give it by headers: {Authorization: 'Basic ${NAME}'}")
        for name, value in parse_qsl(urlsplit(self.url).query):
            if _KEY.search(name) and not _is_named(value):
                raise UserError(f"url would be readable in the run's recipe: write its {name} as ${{NAME}}, a variable")
        for name, value in self.headers.items():
            if name.lower() not in _OPEN_HEADERS and not _is_named(value):
                raise UserError(
                    f"headers.{name} would be readable in the run's recipe: put its value into a variable of the "
                    f"environment and give the name, {name}: '${{NAME}}'"
                )


def build(config: Config) -> Remote:
    """The reward of a config; the server is first asked when images are scored."""
    if not config.url:
        raise UserError("the reward remote needs a server: set url: http://HOST:PORT/PATH")
    for name, text in {"url": config.url, **{f"headers.{key}": value for key, value in config.headers.items()}}.items():
        told = _resolved(text, name)
        if not (told.isprintable() and told.isascii()) or (name == "url" and " " in told):
            raise UserError(
                f"{name} holds a line break, a letter beyond ASCII or another character that HTTP has no place for"
            )
    for key in config.headers:
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", key):
            raise UserError(f"headers: {key!r} is no name of a header")
    _check_host(_resolved(config.url, "url"))
    return Remote(config)


def _check_host(url: str) -> None:
    """Raises UserError where an address names no host and port; it is not shown, since it may hold a secret."""
    try:
        parts = urlsplit(url)
        found = bool(parts.hostname and parts.hostname.encode("idna")) and parts.port != 0
    except ValueError:
        found = False
    if not found:
        raise UserError("url names no host, or a port that there cannot be: write http://HOST:PORT/PATH")


def _is_named(text: str) -> bool:
    """Whether a secret stands in ``text`` by its variable alone, but for a word such as Bearer before it."""
    return bool(_SECRET.search(text) and re.fullmatch(r"[A-Za-z]*", _SECRET.sub("", text).strip()))


def _resolved(text: str, option: str) -> str:
    """``text`` with the values of variables in it; not to be kept, logged or raised."""
    missing = [name for name in _SECRET.findall(text) if name not in os.environ]
    if missing:
        raise UserError(f"{option} needs the environment variable {missing[0]}, which is not set")
    return _SECRET.sub(lambda found: os.environ[found[1]].strip(), text)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would take headers and pictures to another host, and its scores from there."""

    def redirect_request(self, *_: Any) -> None:
        return None


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
            scores = outside.parse_json(answer, "the answer")["scores"]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f'{self._server} did not answer {{"scores": [...]}} but {_short(answer)}') from error
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or len(scores) != len(pictures):
            raise UserError(f"{self._server} must answer {len(pictures)} numbers, not {_short(json.dumps(scores))}")
        try:
            return [float(score) for score in scores]
        except OverflowError as error:
            raise UserError(f"{self._server} answered a number that is too large for a score") from error

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self.config.retries + 1):
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code}"
                if 300 <= error.code < 400:
                    raise UserError(
                        f"{self._server} sends the request elsewhere (HTTP {error.code}): set url to there"
                    ) from error
                # The request itself is at fault: it would fail again.
                if error.code < 500 and error.code not in (408, 429):
                    raise UserError(f"{self._server} refused the request: {trouble}") from error
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                words = " ".join(str(reason).split()) or type(error).__name__
                trouble = "timed out" if isinstance(reason, TimeoutError) else outside.shown(words)
            if attempt < self.config.retries:
                _log.warning(
                    "%s failed (%s), attempt %d of %d", self._server, trouble, attempt + 1, self.config.retries + 1
                )
                time.sleep(self.config.backoff * 2**attempt)
        raise UserError(f"{self._server} failed {self.config.retries + 1} times ({trouble}): is the server running?")

    def _once(self, body: bytes) -> bytes:
        """One request, given up after ``timeout`` seconds in all.

        It runs in a thread of its own: a socket's timeout is for each read, and a server can drip a byte in each.
        """
        answer: list[bytes | Exception] = []

        def ask(deadline: float = time.monotonic() + self.config.timeout) -> None:
            try:
                answer.append(self._read(body, deadline))
            except Exception as error:
                answer.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.config.timeout)
        if not answer:
            raise TimeoutError
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _read(self, body: bytes, deadline: float) -> bytes:
        headers = {key: _resolved(value, f"headers.{key}") for key, value in self.config.headers.items()}
        url = _resolved(self.config.url, "url")
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers}, method="POST")
        content = b""
        with urllib.request.build_opener(_Stay).open(request, timeout=self.config.timeout) as answer:
            while part := answer.read1(1 << 16):
                content += part
                if len(content) > _MOST_BYTES:
                    raise UserError(f"{self._server} answers more than {_MOST_BYTES >> 20} MiB, which are no scores")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return content

    @property
    def _server(self) -> str:
        # Without the query, which may hold a key.
        return f"the server of reward '{self.name}' at {self.config.url.partition('?')[0]}"

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
