"""HttpReward: scores from a server of the user's, for scorers that need an environment or a machine of their own."""

from __future__ import annotations

import base64
import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards.error import RewardError
from ardrag_rl.rewards.reward import Reward


class HttpReward(Reward):
    """Posts frames to a reward server and takes a score for each from its answer, in order.

    The request and the answer are JSON, with the keys of flow_grpo's reward servers::

        POST url    {"images": ["<PNG in base64>", ...], "prompts": ["<of the first image>", ...]}
        200         {"outputs": [0.83, ...]}

    One request holds at most `batch_size` images, 8-bit RGB, each with the prompt of its video, and is answered by as
    many finite numbers. A server needs no more than `base64.b64decode` and an image reader::

        images = [PIL.Image.open(io.BytesIO(base64.b64decode(text))) for text in request.json["images"]]

    By name, for scripts: `register_reward("ocr")(lambda: HttpReward("http://127.0.0.1:18085"))`.
    What may pass (no connection, no answer in time, a status of 500 or more) is tried again after `backoff`, then
    twice that, and so on; the server may see a request more than once.

    Args:
        url: http or https.
        name: what the reward is called; two servers need two names.
        timeout: seconds to wait for the server, at each attempt.
        retries: how often a request is tried again.
        backoff: seconds before the first of them.
        batch_size: frames per request.
        headers: of every request, such as an Authorization.

    Raises:
        ValueError: the url is neither http nor https, or retries is negative.
        RewardError: at a call, the last attempt failed, the server refused (another status), or its answer is not as
            above; the message names the url.
    """

    memory = 0  # a frame is rated by itself

    def __init__(
        self,
        url: str,
        name: str = "http",
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        batch_size: int = 64,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r}: expected http://host:port/path or https.")
        if retries < 0:
            raise ValueError(f"retries={retries}: expected 0 or more.")
        self.url, self.name, self.timeout, self.retries = url, name, timeout, retries
        self.backoff, self.batch_size, self.headers = backoff, batch_size, dict(headers or {})

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T)."""
        frames = (255 * video.detach().flatten(0, 1)).round().clip(0, 255).byte().cpu()
        prompts = [control.prompt for control in controls for _ in range(video.shape[1])]
        scores: list[float] = []
        for part in frames.split(self.batch_size):
            scores += self._ask(part.permute(0, 2, 3, 1).numpy(), prompts[len(scores) : len(scores) + len(part)])
        return torch.tensor(scores).view(video.shape[:2])

    def _ask(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        """The scores of (N, H, W, 3) uint8, one request."""
        body = json.dumps({"images": [_png(image) for image in images], "prompts": prompts}).encode()
        return self._outputs(self._post(body), len(images))

    def _post(self, body: bytes) -> bytes:
        """The body of the answer."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **self.headers})
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    failure = f"it answered {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
                if error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:  # no connection, too late, cut off
                failure = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(self.backoff * 2**attempt)
        raise RewardError(f"the reward server {self.url} gave no scores in {attempt + 1} attempts; {failure}")

    def _outputs(self, answer: bytes, count: int) -> list[float]:
        wanted = f'expected {{"outputs": [...]}} with {count} finite numbers, one for each image'
        try:
            outputs = json.loads(answer)["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f"the reward server {self.url} answered {answer[:200]!r}: {wanted}.") from error
        if not isinstance(outputs, list) or len(outputs) != count:
            got = f"{len(outputs)} outputs" if isinstance(outputs, list) else repr(outputs)[:200]
            raise RewardError(f"the reward server {self.url} answered {got}: {wanted}.")
        for i, value in enumerate(outputs):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RewardError(f"the reward server {self.url} answered {value!r} for image {i}: {wanted}.")
        return outputs


def _png(image: np.ndarray) -> str:
    """(H, W, 3) uint8, RGB, as a PNG in base64."""
    import cv2  # slow to import

    return base64.b64encode(cv2.imencode(".png", image[..., ::-1])[1].tobytes()).decode()
