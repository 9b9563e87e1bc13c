"""Points: what can be followed through a clip, and which of it makes a drag path."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PointTracks:
    """P points through T frames.

    Attributes:
        xy: (T, P, 2) float32, in pixels; a lost point stays where it was seen last.
        followed: (T, P) bool, false from the frame on at which a point is lost.
        error: (T - 1, P) float32, how many pixels a point misses itself by, followed on a frame and back again; NaN for
            trackers that do not go back.
        size: (height, width) of the frames.
    """

    xy: np.ndarray
    followed: np.ndarray
    error: np.ndarray
    size: tuple[int, int]


def tracking_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which points of a clip of this size are found: more is seen than in a small one."""
    scale = max(1.0, 256 / min(size))
    return round(size[0] * scale), round(size[1] * scale)


def corners(frame: Tensor, most: int = 200) -> np.ndarray:
    """Key points (P, 2) of a frame (3, H, W) uint8, in pixels; P = 0 where it has no corner."""
    import cv2

    grey = _grey(frame)
    side = min(grey.shape)
    mask = np.zeros_like(grey)
    margin = round(0.1 * side)  # a tracker needs what surrounds the point
    mask[margin : grey.shape[0] - margin, margin : grey.shape[1] - margin] = 255
    found = cv2.goodFeaturesToTrack(grey, most, 0.02, max(4, side // 32), mask=mask)
    return np.zeros((0, 2), np.float32) if found is None else np.asarray(found, np.float32).reshape(-1, 2)


def follow(frames: Tensor, points: np.ndarray) -> PointTracks:
    """Pyramidal Lucas-Kanade with a forward-backward check.

    Args:
        frames: (T, 3, H, W) uint8.
        points: (P, 2) on the first frame, in pixels.
    """
    grey = [_grey(f) for f in frames]
    height, width = grey[0].shape
    side = min(height, width)
    track, alive, errors = [points], [np.ones(len(points), bool)], []
    for before, after in itertools.pairwise(grey):
        start = track[-1][:, None]
        there, ok = _flow(before, after, start)
        back, ok_back = _flow(after, before, there)
        error = np.linalg.norm(back - start, axis=-1)[:, 0]
        jump = np.linalg.norm(there - start, axis=-1)[:, 0]
        inside = np.all((there >= 0) & (there <= (width - 1, height - 1)), axis=(1, 2))
        good = ok & ok_back & (error < 0.004 * side) & (jump < 0.15 * side) & inside
        alive.append(alive[-1] & good)
        track.append(np.where(alive[-1][:, None], there[:, 0], track[-1]))
        errors.append(error)
    shape = (len(frames) - 1, len(points))
    return PointTracks(np.stack(track), np.stack(alive), np.array(errors).reshape(shape), (height, width))


def choose(tracks: PointTracks, most: int = 2) -> np.ndarray:
    """Which points move most, on the screen and against the camera, of those that are followed longest.

    Args:
        tracks: of at least one point.
        most: how many at most; a further one must be elsewhere and move at least half as far as the first.

    Returns:
        (K,) indices.
    """
    xy, followed, side = tracks.xy, tracks.followed, min(tracks.size)
    steps = np.diff(xy, axis=0)
    lasting = np.flatnonzero(followed.sum(0) == followed.sum(0).max())
    camera = np.median(steps[:, lasting], axis=1, keepdims=True)
    # movement on the screen and against the camera's: what a camera follows moves too
    length = (np.linalg.norm(steps, axis=-1) + np.linalg.norm(steps - camera, axis=-1)).sum(0)  # (P,)
    order = lasting[np.argsort(-length[lasting], kind="stable")]
    first = order[len(order) // 10]  # not the very fastest, which may be a mistake
    chosen = [first]
    for p in order[len(order) // 10 :]:
        apart = np.linalg.norm(xy[0, p] - xy[0, chosen], axis=-1).min() > 0.2 * side
        if len(chosen) < most and apart and length[p] >= 0.5 * length[first]:
            chosen.append(p)
    return np.array(chosen)


def control_points(tracks: PointTracks, chosen: np.ndarray) -> Tensor:
    """(T, K, 3), (x, y, intensity) of chosen points; intensity 1 while a point is followed, 0 after it is lost."""
    height, width = tracks.size
    fractions = (tracks.xy[:, chosen] + 0.5) / (width, height)
    return torch.from_numpy(np.concatenate([fractions, tracks.followed[:, chosen, None]], -1)).float()


def moving_points(frames: Tensor, most: int = 2) -> Tensor:
    """Tracks of the points of a clip (T, 3, H, W) uint8 that move most and can be followed longest.

    Returns:
        (T, K, 3), as `control_points`; K = 0 where the first frame has no corner.
    """
    points = corners(frames[0])
    if not len(points):
        return torch.zeros(len(frames), 0, 3)
    tracks = follow(frames, points)
    return control_points(tracks, choose(tracks, most))


def _grey(frame: Tensor) -> np.ndarray:
    import cv2

    return np.asarray(cv2.cvtColor(frame.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY), np.uint8)


def _flow(before: np.ndarray, after: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (P, 1, 2) go from one grey picture to the next, and which (P,) were found."""
    import cv2

    there, ok, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]  # its stubs forbid None
        before, after, points, None, winSize=(21, 21), maxLevel=3
    )
    return np.asarray(there), np.asarray(ok)[:, 0] > 0
