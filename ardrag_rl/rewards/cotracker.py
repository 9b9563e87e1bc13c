"""CoTracker: Meta's learned point tracker behind the protocol of `tracker.py`. Its licence is CC-BY-NC 4.0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.rewards.tracker import Tracks


@dataclass(frozen=True)
class CoTracker:
    """CoTracker3 as a causal tracker: every new frame is tracked through a window of the latest frames.

    Its offline model sees a whole video at once; asked for frame t with frames <= t only, it cannot look ahead. Each
    point enters a window where it was at the window's first frame, so the cost per frame is constant.
    Give it to the motion reward: `Motion(tracker=CoTracker("scaled_offline.pth"))`.

    Args:
        weights: a local file of CoTracker3's offline model; read with weights_only, never downloaded.
        device: where it runs.
        window: frames it looks at, at least 2.

    Raises:
        ImportError: at the first frames, the package is missing; the message says how to install it.
        FileNotFoundError: at the first frames, the weights are missing.
    """

    weights: str | Path
    device: str = "cpu"
    window: int = 16

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window={self.window}: expected at least 2 frames.")

    def start(self, queries: Tensor) -> CoTrackerSession:
        """A session for queries (B, K, 3), (frame, x, y)."""
        return CoTrackerSession(self, queries.float(), None, queries[:, None, :, 1:].float()[:, :0], 0)


@dataclass
class CoTrackerSession:
    """State of `CoTracker` along B videos: the window's frames and where the points were in them."""

    tracker: CoTracker
    queries: Tensor  # (B, K, 3)
    frames: Tensor | None  # (B, w, 3, H, W)
    positions: Tensor  # (B, w, K, 2)
    frame: int

    def append(self, frames: Tensor) -> Tracks:
        """The tracks in t new frames (B, t, 3, H, W)."""
        steps = [self._next(frame[:, None]) for frame in frames.detach().unbind(1)]
        positions, visible = (torch.stack(x, dim=1) for x in zip(*steps, strict=True))
        return Tracks(positions, visible.float(), visible)

    def select(self, rows: Sequence[int]) -> CoTrackerSession:
        """An independent session of these rows."""
        index = list(rows)
        frames = None if self.frames is None else self.frames[index]
        return CoTrackerSession(self.tracker, self.queries[index], frames, self.positions[index], self.frame)

    def _next(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, K, 2) and visibility (B, K) in one new frame (B, 1, 3, H, W)."""
        window = frame if self.frames is None else torch.cat((self.frames, frame), dim=1)
        start, xy = self.queries[..., 0], self.queries[..., 1:]
        exists = (start >= 0) & (start <= self.frame)  # (B, K)
        positions, visible = xy.clone(), exists.clone()  # true on a point's own frame
        old = exists & (start < self.frame)
        if old.any():
            first = self.frame + 1 - window.shape[1]  # the window's first frame
            entry = torch.where(old, (start - first).clip(min=0), 0)  # (B, K), in the window
            # a point that started before the window enters it where it was tracked to
            came = torch.where((start < first)[..., None], self.positions[:, 0], xy)
            tracked, seen = self._track(window, entry, came)
            positions = torch.where(old[..., None], tracked, positions)
            visible = torch.where(old, seen, visible)
        keep = self.tracker.window - 1
        self.frames = window[:, -keep:]
        self.positions = torch.cat((self.positions, positions[:, None]), dim=1)[:, -keep:]
        self.frame += 1
        return positions, visible

    def _track(self, window: Tensor, entry: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Where points that are at xy (B, K, 2) in frame `entry` (B, K) are in the window's last frame."""
        tracker = self.tracker
        model = load_cotracker(str(tracker.weights), tracker.device)
        size = torch.tensor([window.shape[-1], window.shape[-2]])
        asked = torch.cat((entry[..., None].float(), xy * size - 0.5), dim=-1)  # pixel centres at whole numbers
        with torch.inference_mode():
            tracks, visible = model(255 * window.float().to(tracker.device), queries=asked.to(tracker.device))
        last = ((tracks[:, -1].cpu() + 0.5) / size).clip(0, 1).clone()
        return last, visible[:, -1].cpu().clone()


@lru_cache(maxsize=2)
def load_cotracker(weights: str, device: str) -> Any:
    """The offline predictor, frozen; one per process and file."""
    try:
        from cotracker.predictor import CoTrackerPredictor
    except ImportError as error:
        raise ImportError(
            "the CoTracker reward needs the package cotracker, which is not on the package index (licence CC-BY-NC): "
            "pip install git+https://github.com/facebookresearch/co-tracker, "
            "or leave out tracker= for the built-in template tracker."
        ) from error
    if not Path(weights).is_file():
        raise FileNotFoundError(f"CoTracker weights {weights} do not exist: give a local scaled_offline.pth.")
    predictor = CoTrackerPredictor(checkpoint=None, offline=True, window_len=60)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    predictor.model.load_state_dict(state.get("model", state))
    return predictor.to(device).eval()
