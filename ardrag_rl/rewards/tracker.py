"""Tracker: follows points through a running video. The default correlates the patch of the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control

_FLAT = 0.01  # std per channel below which a patch has nothing to follow


@dataclass(frozen=True)
class Tracks:
    """Where K points of B videos are in t frames. Videos with fewer points are padded: not visible, score 0.

    Attributes:
        positions: (B, t, K, 2) x and y as fractions of width and height; the best guess where not visible.
        scores: (B, t, K) in [0, 1], how sure the tracker is.
        visible: (B, t, K) bool, whether the tracker sees the point.
    """

    positions: Tensor
    scores: Tensor
    visible: Tensor


class TrackerSession(Protocol):
    """A tracker along B running videos, at a constant cost per frame."""

    def append(self, frames: Tensor) -> Tracks:
        """The tracks in t new frames (B, t, 3, H, W) in [0, 1]."""
        ...

    def select(self, rows: Sequence[int]) -> TrackerSession:
        """An independent session of these rows; all rows is a copy."""
        ...


class Tracker(Protocol):
    """Makes sessions. Trackers hold settings only, so that they can be copied.

    One whose tracks look at later frames has an attribute `causal = False`: it is given all frames at once.
    """

    def start(self, queries: Tensor) -> TrackerSession:
        """A session for B videos.

        Args:
            queries: (B, K, 3), (frame, x, y): where each point starts, x and y as fractions; frame -1 is no point.
                A point is not visible before its frame.
        """
        ...


def first_touches(controls: Sequence[Control]) -> Tensor:
    """(B, K, 3), (frame, x, y) of each point's first touch, K the most points of a control; frame -1 pads."""
    most = max(control.points.shape[1] for control in controls)
    out = torch.zeros(len(controls), most, 3)
    out[..., 0] = -1
    for row, control in zip(out, controls, strict=True):
        touched = control.points[..., 2] > 0  # (T, K)
        for k in touched.any(0).nonzero().flatten().tolist():
            frame = int(touched[:, k].int().argmax())
            row[k] = torch.tensor([frame, *control.points[frame, k, :2]])
    return out


@dataclass(frozen=True)
class TemplateTracker:
    """Normalised cross-correlation of the patch around a point's start, weighted by a Gaussian, in colour.

    The start patch is never renewed, so there is no drift. It is sought around where the point was last seen, in a
    window that grows while it is lost, and the peak is refined by a parabola. The Gaussian keeps the background in the
    patch's corners from counting: with it a patch may be large enough to hold the outline of a plain object.
    Lengths are fractions of the frame's shorter side.

    Args:
        patch: side of the patch, 21 px at 64.
        std: of the Gaussian weight, 5 px at 64.
        reach: how far a point may move in one frame, 12 px at 64; a lost point has a reach more in each frame.
        visible: the correlation from which a point counts as seen.
        side: larger frames are shrunk to this shorter side first, which bounds the cost.
    """

    patch: float = 21 / 64
    std: float = 5 / 64
    reach: float = 12 / 64
    visible: float = 0.5
    side: int = 64

    def start(self, queries: Tensor) -> TemplateSession:
        """A session for queries (B, K, 3)."""
        points: list[list[_Point | None]] = [[None] * queries.shape[1] for _ in queries]
        return TemplateSession(self, queries.float(), points)


@dataclass(frozen=True)
class _Point:
    """One point's template and where it was. Lengths in pixels of the working resolution."""

    kernel: np.ndarray  # (n, n, 3) weight times the patch less its mean
    energy: float  # weighted variance of the patch, summed over channels
    position: np.ndarray  # (2,) x, y, pixel centres at i + 0.5
    missed: int = 0  # frames since it was seen


@dataclass
class TemplateSession:
    """State of `TemplateTracker` along B videos."""

    tracker: TemplateTracker
    queries: Tensor
    points: list[list[_Point | None]]
    frame: int = field(default=0)

    def append(self, frames: Tensor) -> Tracks:
        """The tracks in t new frames (B, t, 3, H, W)."""
        count, new = frames.shape[:2]
        if count != len(self.points):
            raise ValueError(f"frames of {count} videos for a session of {len(self.points)}.")
        out = np.zeros((count, new, self.queries.shape[1], 3), np.float32)  # x, y, score
        out[..., :2] = self.queries[:, None, :, 1:].numpy()
        starts = self.queries[..., 0].int().tolist()
        images = np.ascontiguousarray(frames.detach().float().cpu().permute(0, 1, 3, 4, 2).numpy())
        for b in range(count):
            for i in range(new):
                active = [k for k, start in enumerate(starts[b]) if 0 <= start <= self.frame + i]
                if not active:
                    continue
                image = _Image.of(images[b, i], self.tracker)
                for k in active:
                    point = self.points[b][k]
                    if point is None:
                        point = image.template(self.queries[b, k, 1:].numpy())
                    self.points[b][k], score = image.follow(point, self.tracker)
                    out[b, i, k, :2] = image.fraction(self.points[b][k])
                    out[b, i, k, 2] = score
        self.frame += new
        tracks = torch.from_numpy(out)
        return Tracks(tracks[..., :2], tracks[..., 2], tracks[..., 2] >= self.tracker.visible)

    def select(self, rows: Sequence[int]) -> TemplateSession:
        """An independent session of these rows."""
        index = list(rows)
        return TemplateSession(self.tracker, self.queries[index], [list(self.points[i]) for i in index], self.frame)


class _Image:
    """A frame at the working resolution with a border as wide as half a patch."""

    def __init__(self, image: np.ndarray, patch: int, std: float, unit: float) -> None:
        import cv2  # slow to import

        self.height, self.width = image.shape[:2]
        self.patch, self.half, self.unit = patch, patch // 2, unit
        self.weight = _gaussian(patch, std)
        self.padded = cv2.copyMakeBorder(image, *(self.half,) * 4, cv2.BORDER_REPLICATE)

    @classmethod
    def of(cls, image: np.ndarray, tracker: TemplateTracker) -> _Image:
        """From (H, W, 3) float32."""
        import cv2

        shorter = min(image.shape[:2])
        if shorter > tracker.side:
            scale = tracker.side / shorter
            size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            shorter = tracker.side
        patch = 2 * round((tracker.patch * shorter - 1) / 2) + 1
        return cls(image, max(patch, 5), tracker.std * shorter, shorter)

    def template(self, xy: np.ndarray) -> _Point:
        """The template at the fraction xy, cut out between pixels."""
        import cv2

        x, y = float(xy[0] * self.width), float(xy[1] * self.height)
        centre = (x - 0.5 + self.half, y - 0.5 + self.half)
        patch = cv2.getRectSubPix(self.padded, (self.patch, self.patch), centre)
        weight = np.outer(self.weight, self.weight)[..., None]
        patch = patch - (weight * patch).sum((0, 1))
        return _Point((weight * patch).astype(np.float32), float((weight * patch**2).sum()), np.array([x, y]))

    def follow(self, point: _Point, tracker: TemplateTracker) -> tuple[_Point, float]:
        """The point in this frame, and its correlation in [0, 1]."""
        import cv2

        if point.energy < 3 * _FLAT**2:
            return point, 0.0
        reach = tracker.reach * self.unit * (1 + point.missed)
        left, top = np.floor(np.maximum(point.position - reach, 0)).astype(int)
        right, bottom = np.ceil(np.minimum(point.position + reach, (self.width, self.height))).astype(int)
        crop = self.padded[top : bottom + 2 * self.half, left : right + 2 * self.half]
        inner = slice(self.half, -self.half)
        mean, square = (
            cv2.sepFilter2D(x, -1, self.weight, self.weight)[inner, inner] for x in (crop, cv2.multiply(crop, crop))
        )
        energy = (square - mean * mean) @ np.ones(3, np.float32)
        # a nearly flat place correlates with anything: it is held against a quarter of the template's energy
        scale = np.sqrt(np.maximum(energy, 0.25 * point.energy) * point.energy)
        match = cv2.matchTemplate(crop, point.kernel, cv2.TM_CCORR) / scale
        x, y, score = _peak(match)
        if score < tracker.visible / 2:  # nothing there: stay
            return _Point(point.kernel, point.energy, point.position, point.missed + 1), max(score, 0.0)
        position = np.clip([left + x + 0.5, top + y + 0.5], 0, (self.width, self.height))
        missed = 0 if score >= tracker.visible else point.missed + 1
        return _Point(point.kernel, point.energy, position, missed), min(score, 1.0)

    def fraction(self, point: _Point | None) -> np.ndarray:
        """(2,) in [0, 1]."""
        assert point is not None
        return point.position / (self.width, self.height)


def _peak(match: np.ndarray) -> tuple[float, float, float]:
    """Column, row and height of the highest value, columns and rows refined by a parabola."""
    y, x = (int(i) for i in np.unravel_index(match.argmax(), match.shape))
    height, width = match.shape
    dx = _vertex(*match[y, x - 1 : x + 2]) if 0 < x < width - 1 else 0.0
    dy = _vertex(*match[y - 1 : y + 2, x]) if 0 < y < height - 1 else 0.0
    return x + dx, y + dy, float(match[y, x])


def _vertex(before: float, at: float, after: float) -> float:
    curvature = before - 2 * at + after
    return float(np.clip((before - after) / (2 * curvature), -0.5, 0.5)) if curvature < -1e-9 else 0.0


@lru_cache(maxsize=16)
def _gaussian(size: int, std: float) -> np.ndarray:
    """(size,) float32, sums to 1."""
    weight = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * std**2))
    return (weight / weight.sum()).astype(np.float32)
