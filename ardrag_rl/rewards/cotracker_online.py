"""CoTrackerOnline: CoTracker3's online model, which carries how a point looked from window to window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.rewards.cotracker import autocast, batches, began, load_cotracker, to_fractions, to_pixels
from ardrag_rl.rewards.tracker import Tracks

_SUPPORT = 6  # a grid of 6 x 6 more points on frame 0, as the offline predictor adds of itself
_CARRIED = (
    *("online_coords_predicted", "online_vis_predicted", "online_conf_predicted"),
    *("online_track_feat", "online_track_support"),  # lists, one tensor per level of the pyramid
)
Carried = dict[str, tuple[Tensor, ...]]  # of one video, 1 in front


@dataclass(frozen=True)
class CoTrackerOnline:
    """CoTracker3's online model as a causal tracker: windows of 16 frames that move on by 8.

    The model tracks a window as soon as it is full. Here every new frame is tracked in the window that it falls in,
    whose missing frames repeat it, as the model does itself at the end of a video; only full windows are carried on.
    So frame t looks at frames <= t, at a constant cost of one pass, and in the frames that fill a window the tracks
    are the published predictor's own. Against `CoTracker`, a point is always compared with how it looked in its first
    frame, so that it may be found again however long it was hidden.

    Args:
        weights: a local file of the online model, scaled_online.pth; read with weights_only, never downloaded.
        device: where it runs.
        dtype: what its matrix products and convolutions run in; weights and coordinates stay float32.
        batch_size: videos per forward pass.

    Raises:
        ImportError: at the first frames, the package is missing; the message says how to install it.
        FileNotFoundError: at the first frames, the weights are missing.
        ValueError: at the first frames, the weights are of another model.
    """

    weights: str | Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16

    def start(self, queries: Tensor) -> OnlineSession:
        """A session for queries (B, K, 3), (frame, x, y)."""
        return OnlineSession(self, queries.float(), None, 0, (None,) * len(queries))


@dataclass
class OnlineSession:
    """State of `CoTrackerOnline` along B videos: the window's frames and what the model carries into it."""

    tracker: CoTrackerOnline
    queries: Tensor  # (B, K, 3)
    frames: Tensor | None  # (B, w, 3, H, W), w < 16, on the tracker's device
    first: int  # the window's first frame
    carried: tuple[Carried | None, ...]  # B

    def append(self, frames: Tensor) -> Tracks:
        """The tracks in t new frames (B, t, 3, H, W)."""
        steps = [self._next(frame[:, None]) for frame in frames.detach().to(self.tracker.device).unbind(1)]
        positions, visible = (torch.stack(x, dim=1) for x in zip(*steps, strict=True))
        return Tracks(positions, visible.float(), visible)

    def select(self, rows: Sequence[int]) -> OnlineSession:
        """An independent session of these rows."""
        index = list(rows)
        frames = None if self.frames is None else self.frames[index]
        carried = tuple(self.carried[i] for i in index)
        return OnlineSession(self.tracker, self.queries[index], frames, self.first, carried)

    def _next(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, K, 2) and visibility (B, K) in one new frame (B, 1, 3, H, W)."""
        predictor = load_cotracker(str(self.tracker.weights), self.tracker.device, True)
        window = frame if self.frames is None else torch.cat((self.frames, frame), dim=1)
        now = self.first + window.shape[1] - 1
        full = window.shape[1] == predictor.model.window_len
        start, positions = self.queries[..., 0], self.queries[..., 1:].clone()
        visible, old = began(start, now), began(start, now - 1)  # true on a point's own frame
        carried = list(self.carried)
        for rows, points in batches(start >= 0, self.tracker.batch_size):
            if not full and not old[rows].any():
                continue
            where = rows[:, None], points
            past = [self.carried[row] for row in rows.tolist()]
            tracked, seen, new = self._track(predictor, window[rows], self.queries[where], past)
            positions[where] = torch.where(old[where][..., None], tracked, positions[where])
            visible[where] = torch.where(old[where], seen, visible[where])
            for row, state in zip(rows.tolist(), new, strict=True):
                carried[row] = state
        if full:
            self.carried = tuple(carried)
            self.first += predictor.step
            window = window[:, predictor.step :]
        self.frames = window
        return positions, visible

    def _track(
        self, predictor: Any, window: Tensor, queries: Tensor, past: Sequence[Carried | None]
    ) -> tuple[Tensor, Tensor, list[Carried]]:
        """Positions (B, K, 2) and visibility (B, K) in the window's last frame, and what would be carried on."""
        support = torch.linspace(0.5 / _SUPPORT, 1 - 0.5 / _SUPPORT, _SUPPORT)
        grid = torch.cartesian_prod(torch.zeros(1), support, support).expand(len(queries), -1, -1)
        asked = torch.cat((queries, grid), dim=1)
        asked = torch.cat((asked[..., :1], to_pixels(asked[..., 1:], window)), dim=-1).to(self.tracker.device)
        video = 255 * window.float()
        with torch.inference_mode(), autocast(self.tracker.device, self.tracker.dtype):
            predictor(video, is_first_step=True, queries=asked)  # a new video: forgets the one before
            _carry_in(predictor.model, past, self.first)
            tracks, visible = predictor(video)
        count = queries.shape[1]
        last = tracks[:, -1, :count], visible[:, -1, :count]
        return to_fractions(last[0], window), last[1].cpu(), _carry_out(predictor.model, len(window))


def _carry_in(model: Any, past: Sequence[Carried | None], first: int) -> None:
    """Sets what the model of a window that begins at frame `first` knows of the windows before."""
    model.online_ind = first
    states = [state for state in past if state is not None]
    for name in _CARRIED if states else ():
        # the copies that `cat` makes are the model's own: it writes to them
        tensors = [torch.cat(rows) for rows in zip(*(state[name] for state in states), strict=True)]
        setattr(model, name, tensors if isinstance(getattr(model, name), list) else tensors[0])


def _carry_out(model: Any, count: int) -> list[Carried]:
    """What the model knows of each of its videos now."""
    values = {name: getattr(model, name) for name in _CARRIED}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [{name: tuple(t[i : i + 1] for t in value) for name, value in lists.items()} for i in range(count)]
