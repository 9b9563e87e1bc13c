"""HttpReward: what is posted, in which order; retries, and the errors that name the server."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards import HttpReward, RewardError, check_scores, make_rewards

Answer = Callable[[dict[str, Any], int], Any]  # request, how many came before -> status, or outputs, or bytes


class Server(ThreadingHTTPServer):
    """Answers as `answer` says, and keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = brightness

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = len(self.server.requests)
        self.server.requests.append(request)
        self.server.headers.append(dict(self.headers))
        answer = self.server.answer(request, count)
        if isinstance(answer, int):
            self.send_error(answer, "as asked")
            return
        body = answer if isinstance(answer, bytes) else json.dumps({"outputs": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def decoded(request: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in request["images"]]


def brightness(request: dict[str, Any], count: int) -> list[float]:
    return [float(image.mean()) / 255 for image in decoded(request)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def clips() -> tuple[Tensor, list[Control]]:
    video = torch.rand(2, 3, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    return video, [Control(torch.zeros(3, 0, 3), prompt, video[0, 0]) for prompt in ("a cat", "a dog, ü")]


def test_scores_come_in_the_order_of_the_frames(server: Server) -> None:
    video, controls = clips()
    reward = HttpReward(server.url, batch_size=4, headers={"Authorization": "Bearer me"})
    scores = check_scores(reward, reward(video, controls), (2, 3))
    torch.testing.assert_close(scores, video.mean((2, 3, 4)), rtol=0, atol=1 / 255)
    assert [len(request["images"]) for request in server.requests] == [4, 2]
    assert [p for request in server.requests for p in request["prompts"]] == ["a cat"] * 3 + ["a dog, ü"] * 3
    images = np.stack([image for request in server.requests for image in decoded(request)])
    wanted = (255 * video).round().byte().flatten(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, wanted)  # red is red, and nothing is lost
    assert server.headers[0]["Authorization"] == "Bearer me"
    parts = [reward.start(controls).append(part) for part in video.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), scores)


def test_a_server_that_fails_at_first_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.answer = lambda request, count: [500, 503][count] if count < 2 else brightness(request, count)
    video, controls = clips()
    scores = HttpReward(server.url, backoff=0.5)(video, controls)
    torch.testing.assert_close(scores, video.mean((2, 3, 4)), rtol=0, atol=1 / 255)
    assert waits == [0.5, 1.0]
    assert server.requests[0] == server.requests[2]


def test_a_server_that_is_slow_is_asked_again(server: Server) -> None:
    late = threading.Event()

    def answer(request: dict[str, Any], count: int) -> list[float]:
        if count == 0:
            late.wait(20)
        return brightness(request, count)

    server.answer = answer
    video, controls = clips()
    HttpReward(server.url, timeout=1, backoff=0)(video, controls)
    assert len(server.requests) == 2
    server.answer = lambda request, count: late.wait(20)
    with pytest.raises(RewardError, match=rf"{server.url} gave no scores in 2 attempts; TimeoutError"):
        HttpReward(server.url, timeout=0.2, backoff=0, retries=1)(video, controls)
    late.set()


def test_nobody_there(server: Server) -> None:
    video, controls = clips()
    server.server_close()
    with pytest.raises(RewardError, match=rf"{server.url} gave no scores in 3 attempts; .*refused"):
        HttpReward(server.url, retries=2, backoff=0)(video, controls)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (404, "gave no scores in 1 attempts; it answered 404 as asked"),
        ([0.5] * 5, "answered 5 outputs: .*6 finite numbers"),
        ([0.5] * 5 + [float("nan")], "answered nan for image 5"),
        ([0.5, "high", 0, 0, 0, 0], "answered 'high' for image 1"),
        ([True] * 6, "answered True for image 0"),
        (0.5, "answered 0.5: expected"),
        (b'{"scores": []}', "scores.*expected"),
        (b"<html>", "<html>.*expected"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_server(server: Server, answer: Any, says: str) -> None:
    video, controls = clips()
    server.answer = lambda request, count: answer
    with pytest.raises(RewardError, match=f"{server.url} .*{says}"):
        HttpReward(server.url, backoff=0)(video, controls)
    assert len(server.requests) == 1  # another attempt would not help


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=f"url='{url}'"):
        HttpReward(url)


def test_two_servers_have_two_names() -> None:
    made = make_rewards([HttpReward("http://one", name="ocr"), HttpReward("http://two", name="deqa")])
    assert [term.name for term in made] == ["ocr", "deqa"]
    with pytest.raises(ValueError, match="retries=-1"):
        HttpReward("http://one", retries=-1)
