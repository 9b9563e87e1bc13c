"""CoTracker: Meta's learned point tracker behind the protocol of `tracker.py`. Its licence is CC-BY-NC 4.0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.hub import local_file
from ardrag_rl.rewards.tracker import Tracks
from ardrag_rl.rewards.weights import load_weights


@dataclass(frozen=True)
class CoTracker:
    """CoTracker3's offline model, which sees all frames that it is given at once.

    Asked for frame t with frames <= t only it cannot look ahead, so every new frame is tracked through a window that
    ends with it; a window as long as the video gives the model exactly the video's prefixes. A point that is older
    than the window enters it where it was first visible in it. Give it to the motion reward:
    `Motion(tracker=CoTracker("scaled_offline.pth"))`. `CoTrackerOnline` remembers how a point looked instead.

    Args:
        weights: a local file of the offline model, scaled_offline.pth; read with weights_only, never downloaded.
        device: where it runs.
        window: frames it looks at, at least 2: one pass per frame. None: one pass over a whole video, which is
            faster but not causal, so that the motion reward is paid at the end.
        dtype: what its matrix products and convolutions run in; weights and coordinates stay float32.
        batch_size: videos per forward pass.

    Raises:
        ImportError: at the first frames, the package is missing; the message says how to install it.
        FileNotFoundError: at the first frames, the weights are missing.
        ValueError: the window is too short; at the first frames, the weights are of another model.
    """

    weights: str | Path
    device: str = "cpu"
    window: int | None = 16
    dtype: torch.dtype = torch.float32
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise ValueError(f"window={self.window}: expected at least 2 frames, or None for whole videos.")

    @property
    def causal(self) -> bool:
        """Whether the tracks in frame t depend on frames <= t only."""
        return self.window is not None

    def start(self, queries: Tensor) -> CoTrackerSession:
        """A session for queries (B, K, 3), (frame, x, y)."""
        empty = queries[:, None, :, 1:].float()[:, :0]
        return CoTrackerSession(self, queries.float(), None, empty, empty[..., 0].bool(), 0)


@dataclass
class CoTrackerSession:
    """State of `CoTracker` along B videos: the window's frames and where the points were in them."""

    tracker: CoTracker
    queries: Tensor  # (B, K, 3)
    frames: Tensor | None  # (B, w, 3, H, W), on the tracker's device
    positions: Tensor  # (B, w, K, 2)
    visible: Tensor  # (B, w, K)
    frame: int

    def append(self, frames: Tensor) -> Tracks:
        """The tracks in t new frames (B, t, 3, H, W).

        Raises:
            ValueError: the tracker takes whole videos and has been given one already.
        """
        frames = frames.detach().to(self.tracker.device)
        if self.tracker.window is None:
            return self._whole(frames)
        steps = [self._next(frame[:, None]) for frame in frames.unbind(1)]
        positions, visible = (torch.stack(x, dim=1) for x in zip(*steps, strict=True))
        return Tracks(positions, visible.float(), visible)

    def select(self, rows: Sequence[int]) -> CoTrackerSession:
        """An independent session of these rows."""
        index = list(rows)
        frames = None if self.frames is None else self.frames[index]
        past = self.positions[index], self.visible[index]
        return CoTrackerSession(self.tracker, self.queries[index], frames, *past, self.frame)

    def _whole(self, video: Tensor) -> Tracks:
        if self.frame:
            raise ValueError("a CoTracker with window=None tracks whole videos: give it all frames at once.")
        self.frame = video.shape[1]
        start, xy = self.queries[..., 0], self.queries[..., 1:]
        positions, visible = self._track(video, start, xy, (start >= 0) & (start < self.frame))
        exists = began(start, torch.arange(self.frame))
        positions = torch.where(exists[..., None], positions, xy[:, None])
        return Tracks(positions, (visible & exists).float(), visible & exists)

    def _next(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, K, 2) and visibility (B, K) in one new frame (B, 1, 3, H, W)."""
        window = frame if self.frames is None else torch.cat((self.frames, frame), dim=1)
        start, xy = self.queries[..., 0], self.queries[..., 1:]
        positions, visible = xy.clone(), began(start, self.frame)  # true on a point's own frame
        old = began(start, self.frame - 1)
        if old.any():
            first = self.frame + 1 - window.shape[1]  # the window's first frame
            seen = self.visible.int().argmax(1)  # (B, K), where each point was first visible in the window
            entry = torch.where(start < first, seen, (start - first).clip(min=0))
            came = self.positions.gather(1, seen[:, None, :, None].expand(-1, -1, -1, 2))[:, 0]
            came = torch.where((start < first)[..., None], came, xy)
            tracked, now = (x[:, -1] for x in self._track(window, entry, came, old))
            positions = torch.where(old[..., None], tracked, positions)
            visible = torch.where(old, now, visible)
        assert self.tracker.window is not None
        keep = self.tracker.window - 1
        self.frames = window[:, -keep:]
        self.positions = torch.cat((self.positions, positions[:, None]), dim=1)[:, -keep:]
        self.visible = torch.cat((self.visible, visible[:, None]), dim=1)[:, -keep:]
        self.frame += 1
        return positions, visible

    def _track(self, video: Tensor, entry: Tensor, xy: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Where the asked points (B, K), at xy (B, K, 2) in frame `entry` (B, K), are: (B, T, K, 2), (B, T, K)."""
        tracker = self.tracker
        model = load_cotracker(str(tracker.weights), tracker.device, False)
        positions = xy[:, None].repeat(1, video.shape[1], 1, 1)
        visible = torch.zeros(positions.shape[:-1], dtype=torch.bool)
        for rows, points in batches(asked, tracker.batch_size):
            where = rows[:, None], points
            queries = torch.cat((entry[where][..., None], to_pixels(xy[where], video)), dim=-1)
            with torch.inference_mode(), autocast(tracker.device, tracker.dtype):
                tracks, seen = model(255 * video[rows].float(), queries=queries.to(tracker.device))
            index = rows[:, None, None], torch.arange(video.shape[1])[:, None], points
            positions[index], visible[index] = to_fractions(tracks, video), seen.cpu()
        return positions, visible


def began(start: Tensor, frame: Tensor | int) -> Tensor:
    """Whether points that start at frame `start` (B, K) exist at a frame, (B, K), or at T frames, (B, T, K)."""
    if isinstance(frame, Tensor):
        start, frame = start[:, None], frame[:, None]
    return (start >= 0) & (start <= frame)


def batches(asked: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `size` rows at a time that ask for the same points, and these points, of (B, K).

    CoTracker's points attend to each other, so that padding would change the tracks of the others.
    """
    groups = defaultdict(list)
    for row, mask in enumerate(asked.tolist()):
        groups[tuple(mask)].append(row)
    for mask, rows in groups.items():
        if any(mask):
            for part in torch.tensor(rows).split(size):
                yield part, torch.tensor(mask).nonzero()[:, 0]


def to_pixels(xy: Tensor, video: Tensor) -> Tensor:
    """Fractions as CoTracker's pixels, whose centres are whole numbers."""
    return xy * torch.tensor([video.shape[-1], video.shape[-2]]) - 0.5


def to_fractions(tracks: Tensor, video: Tensor) -> Tensor:
    """CoTracker's pixels as fractions, within the frame."""
    return ((tracks.float().cpu() + 0.5) / torch.tensor([video.shape[-1], video.shape[-2]])).clip(0, 1)


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision, as the model makes float32 tensors of its own; none for float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


@lru_cache(maxsize=2)
def load_cotracker(weights: str, device: str, online: bool) -> Any:
    """The offline or online predictor, frozen; one per process and file."""
    local_file(weights)
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cuda):  # importing it seeds torch, and making it draws
        try:
            from cotracker.predictor import CoTrackerOnlinePredictor, CoTrackerPredictor
        except ImportError as error:
            raise ImportError(
                "the CoTracker reward needs the package cotracker, which is not on the package index (licence "
                "CC-BY-NC): pip install git+https://github.com/facebookresearch/co-tracker, "
                "or leave out tracker= for the built-in template tracker."
            ) from error
        if online:
            predictor = CoTrackerOnlinePredictor(checkpoint=None, window_len=16)
        else:
            predictor = CoTrackerPredictor(checkpoint=None, offline=True, window_len=60)
    load_weights(predictor.model, weights)
    _take_batches(predictor.model)
    return predictor.to(device).eval().requires_grad_(False)


def _take_batches(model: Any) -> None:
    """Makes a model take several videos: of float32 queries it makes a view that it cannot reshape for more than one.

    Its cast of float64 ones to float32 makes a copy; only the sampling of features needs float32 before that.
    """
    forward, sample = model.forward, model.get_track_feat

    def doubled(video: Tensor, queries: Tensor, **settings: Any) -> Any:
        return forward(video=video, queries=queries.double(), **settings)

    def sampled(maps: Tensor, frames: Tensor, xy: Tensor, **settings: Any) -> Any:
        return sample(maps, frames, xy.float(), **settings)

    model.forward, model.get_track_feat = doubled, sampled
