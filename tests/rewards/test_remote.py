"""A reward behind HTTP, against a server in this process."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from visiontune.errors import UserError
from visiontune.ops.pixels import to_tensor
from visiontune.rewards.loading import load

IMAGES = to_tensor(np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8))
PROMPTS = [f"prompt {i}" for i in range(5)]


class Server:
    """Answers with what ``reply`` makes of a request: a status and a body."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.reply: Callable[[dict], tuple[int, object]] = self.means
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                status, body = outer.reply(request)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @staticmethod
    def pictures(request: dict) -> list[np.ndarray]:
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in request["images"]]

    def means(self, request: dict) -> tuple[int, object]:
        return 200, {"scores": [float(picture.mean()) for picture in self.pictures(request)]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()


def _reward(server: Server, **options: object):
    return load({"name": "remote", "url": server.url, "backoff": 0, "timeout": 5, **options})


@pytest.mark.parametrize("format", ["png", "webp"])
def test_pixels_prompts_and_meta_arrive_as_they_are_and_scores_come_back_in_order(
    server: Server, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORE_KEY", "secret\n")
    meta = [{"seed": i, "path": None} for i in range(5)]
    reward = _reward(server, format=format, batch_size=2, headers={"X-Key": "Bearer ${SCORE_KEY}"})
    scores = reward(IMAGES, PROMPTS, meta)
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)) * 255)
    assert [len(request["images"]) for request in server.requests] == [2, 2, 1]
    assert [prompt for request in server.requests for prompt in request["prompts"]] == PROMPTS
    assert [mapping for request in server.requests for mapping in request["meta"]] == meta
    assert server.headers[0]["X-Key"] == "Bearer secret"
    sent = np.stack([picture for request in server.requests for picture in server.pictures(request)])
    assert torch.equal(to_tensor(sent), IMAGES)
    assert not reward(IMAGES.clone().requires_grad_(), PROMPTS).requires_grad
    assert server.requests[-1]["meta"] is None


def test_a_busy_server_is_asked_again(server: Server) -> None:
    def busy(request: dict) -> tuple[int, object]:
        return (503, b"") if len(server.requests) < 3 else server.means(request)

    server.reply = busy
    torch.testing.assert_close(_reward(server, retries=2)(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)) * 255)
    assert len(server.requests) == 3


def test_no_score_is_made_up_when_the_server_fails(server: Server) -> None:
    server.reply = lambda request: (500, b"")
    with pytest.raises(UserError, match=r"failed 3 times \(HTTP 500"):
        _reward(server, retries=2)(IMAGES, PROMPTS)
    assert len(server.requests) == 3


def test_a_refused_request_is_not_repeated(server: Server) -> None:
    server.reply = lambda request: (404, b"")
    with pytest.raises(UserError, match="refused the request: HTTP 404"):
        _reward(server)(IMAGES, PROMPTS)
    assert len(server.requests) == 1


def test_a_slow_server_is_given_up(server: Server) -> None:
    def slow(request: dict) -> tuple[int, object]:
        time.sleep(1)
        return server.means(request)

    server.reply = slow
    with pytest.raises(UserError, match=r"failed 1 times \(timed out\)"):
        _reward(server, timeout=0.2, retries=0)(IMAGES, PROMPTS)


def test_a_server_that_is_not_there_is_named(server: Server) -> None:
    server.http.server_close()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/score failed 2 times .*is the server running"):
        _reward(server, retries=1)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "did not answer"),
        ([1, 2], "did not answer"),
        ({"scores": [1.0]}, "must answer 5 numbers"),
        ({"scores": [1.0, 2.0, None, 3.0, 4.0]}, "must answer 5 numbers"),
        ({"scores": ["1"] * 5}, "must answer 5 numbers"),
        (b"[" * 100_000, "did not answer"),
        (b'{"scores": [' + b"1" * 5000 + b"]}", "did not answer"),
        (b'{"scores": [1, 2, 3, 4, ' + b"1" * 400 + b"]}", "too large for a score"),
        (b'{"scores": [1, 2, NaN, 3, 4]}', r"not finite for 1 of 5 images \(first: image 2\)"),
    ],
)
def test_bad_answers_are_refused(server: Server, body: object, words: str) -> None:
    server.reply = lambda request: (200, body)
    with pytest.raises(UserError, match=words):
        _reward(server)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://"}, "url names no host"),
        ({"url": "http://h:99999/x"}, "url names no host, or a port"),
        ({"url": "http://h:abc/x"}, "url names no host, or a port"),
        ({"url": f"http://{'a' * 300}/"}, "url names no host"),
        ({"url": "http://a..b/"}, "url names no host"),
        ({"url": "http://h/a b"}, "url holds"),
        ({"url": "http://h/\u20ac"}, "url holds"),
        ({"url": "http://h/?q=${PHRASE}"}, "url holds"),
        ({"url": "http://h/", "headers": {"X": "${PHRASE}"}}, "headers.X holds"),
        ({"url": "http://h/", "headers": {"A B": "${PLAIN}"}}, "'A B' is no name of a header"),
    ],
)
def test_what_http_cannot_carry_is_refused_before_anything_is_drawn(monkeypatch, options: dict, words: str) -> None:
    monkeypatch.setenv("PHRASE", "secret \u20ac")
    monkeypatch.setenv("PLAIN", "secret")
    with pytest.raises(UserError, match=words) as error:
        load({"name": "remote", **options})
    assert "secret" not in str(error.value)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="set url"):
        load("remote")
    with pytest.raises(UserError, match="http"):
        load({"name": "remote", "url": "localhost:80"})
    with pytest.raises(UserError, match="batch_size must be a whole number from 1"):
        load({"name": "remote", "url": "http://h", "batch_size": 0})


class Raw:
    """Sends bytes as they are to whoever connects, and what it was sent is kept."""

    def __init__(self, send: Callable[[socket.socket], None]) -> None:
        self.listener, self.received = socket.create_server(("127.0.0.1", 0)), b""
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/score"

        def serve() -> None:
            while True:
                peer, _ = self.listener.accept()
                with peer, contextlib.suppress(OSError):
                    self.received += peer.recv(1 << 16)
                    send(peer)

        threading.Thread(target=serve, daemon=True).start()


def _drip(text: bytes) -> Callable[[socket.socket], None]:
    def send(peer: socket.socket) -> None:
        peer.sendall(text)
        while True:
            time.sleep(0.05)
            peer.sendall(b"a")

    return send


@pytest.mark.parametrize("begun", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 2"])
def test_a_server_that_drips_is_given_up_in_time(begun: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"failed 1 times \(timed out\)"):
        _reward(Raw(_drip(begun)), timeout=0.5, retries=0)(IMAGES, PROMPTS)
    assert time.monotonic() - started < 3


def test_an_endless_answer_is_given_up_early() -> None:
    sent = []

    def endless(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            sent.append(peer.send(b" " * (1 << 16)))

    with pytest.raises(UserError, match="answers more than 1 MiB"):
        _reward(Raw(endless), timeout=60, retries=3)(IMAGES, PROMPTS)
    assert sum(sent) < 1 << 25  # what the system's buffers took besides


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirection_takes_no_header_and_no_picture_elsewhere(
    server: Server, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORE_KEY", "secret")
    there = f"HTTP/1.0 {code} Moved\r\nLocation: {server.url}\r\n\r\n".encode()
    with pytest.raises(UserError, match=rf"sends the request elsewhere \(HTTP {code}\): set url to there"):
        _reward(Raw(lambda peer: peer.sendall(there)), headers={"Authorization": "Bearer ${SCORE_KEY}"})(
            IMAGES, PROMPTS
        )
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": {"Authorization": "Bearer hunter2"}}, "headers.Authorization would be readable"),
        ({"headers": {"X-Anything": "hunter2"}}, "headers.X-Anything would be readable"),
        ({"headers": {"X-Key": "hunter2${HOME}"}}, "headers.X-Key would be readable"),
        ({"url": "http://me:hunter2@host/score"}, "url holds a password"),
        ({"url": "ftp://me:hunter2@host/score"}, "url must start with http"),
        ({"url": "http://host/score?api_key=hunter2"}, "write its api_key as"),
        ({"headers": {"X-Key": "${NOT_THERE}"}}, "needs the environment variable NOT_THERE"),
        ({"headers": {"X-Key": "${TWO_LINES}"}}, "holds a line break"),
    ],
)
def test_secrets_are_neither_taken_literally_nor_printed(
    options: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWO_LINES", "hunter2\r\nX-Other: hunter2")
    with pytest.raises(UserError, match=words) as caught:
        load({"name": "remote", "url": "http://host", **options})
    assert "hunter2" not in str(caught.value)


def test_a_failing_server_is_named_without_the_secrets_of_its_url(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCORE_KEY", "hunter2")
    raw = Raw(lambda peer: peer.sendall(b"HTTP/1.0 500 hunter2\r\n\r\n"))
    with pytest.raises(UserError) as caught:
        _reward(raw, url=f"{raw.url}?key=${{SCORE_KEY}}", retries=1)(IMAGES, PROMPTS)
    assert b"/score?key=hunter2 " in raw.received
    assert "hunter2" not in str(caught.value) + caplog.text and raw.url in str(caught.value)
