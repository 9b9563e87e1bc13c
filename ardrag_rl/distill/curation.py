"""Curation: raw videos cut into clips that a drag path can control, each kept or rejected with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.envs.clips import frame_size, prompt_of
from ardrag_rl.envs.fit import Crop
from ardrag_rl.envs.points import PointTracks, choose, control_points, corners, follow, tracking_size
from ardrag_rl.media import frames_at, whole_rate
from ardrag_rl.rewards.tracker import Tracker

NEGATIVE_PROMPT = (
    "still picture, overexposed, blurred details, subtitles, watermark, compression artefacts, deformed, flickering"
)


@dataclass(frozen=True)
class Filters:
    """What a clip must be like; lengths are shares of its shorter side.

    Attributes:
        brightness: least mean brightness, in [0, 1].
        motion: least way of a kept point, over the clip.
        jerk: greatest mean second difference of a point's path, per frame.
        followed: least share of frames in which a point is followed.
        error: greatest mean forward-backward error of a point.
        cut: difference of consecutive small frames, in [0, 1], from which on they may be different shots.
    """

    brightness: float = 0.08
    motion: float = 0.06
    jerk: float = 0.02
    followed: float = 0.8
    error: float = 0.003
    cut: float = 0.1


@dataclass(frozen=True)
class Clip:
    """A stretch of a raw video, kept or not.

    Attributes:
        name: of the raw file, and where the clip starts, in frames.
        prompt: what it shows.
        frames: (T, 3, H, W) uint8, at its bucket's size; fewer than T where it was rejected as too short.
        points: (T, K, 3), (x, y, intensity); K = 0 where none was found.
        reason: why it is rejected; empty where it is kept.
        numbers: what the filters looked at.
    """

    name: str
    prompt: str
    frames: Tensor
    points: Tensor
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curator:
    """Cuts and judges.

    Attributes:
        num_frames: T, pixel frames of a clip.
        fps: that clips are brought to, or near it: every k-th frame is taken.
        sizes: (height, width) buckets; a clip goes to the one of the nearest aspect, cropped about its centre.
        filters: see there.
        most_points: control points of a clip at most.
        tracker: None is OpenCV's Lucas-Kanade, or `rewards.CoTracker`.
    """

    num_frames: int
    fps: float
    sizes: tuple[tuple[int, int], ...]
    filters: Filters = Filters()
    most_points: int = 2
    tracker: Tracker | None = None

    def clips(self, path: Path) -> Iterator[Clip]:
        """The clips of a raw video, in order; one that is too short between two cuts is given as rejected.

        Raises:
            MediaError: the file cannot be read.
        """
        shot: list[Tensor] = []
        start, given, last = 0, False, None
        usual = 0.0  # the running mean difference of consecutive frames
        for index, frame in enumerate(frames_at(path, whole_rate(path, self.fps))):
            size = self._bucket(frame_size(frame))
            small = _small(frame)
            difference = 0.0 if last is None else float((small - last).abs().mean())
            if last is not None and difference > max(self.filters.cut, 4 * usual):
                if not given:
                    yield self._short(path, start, shot, "cut")
                shot, start, given, usual = [], index, False, 0.0
            else:
                usual = 0.8 * usual + 0.2 * difference
            last = small
            shot.append(Crop(frame_size(frame), tracking_size(size)).images(frame))
            if len(shot) == self.num_frames:
                yield self._judge(path, start, torch.stack(shot), size)
                shot, start, given = [], index + 1, True
        if not given:
            yield self._short(path, start, shot, "too short")

    def _bucket(self, size: tuple[int, int]) -> tuple[int, int]:
        aspect = np.log(size[0] / size[1])
        return min(self.sizes, key=lambda s: abs(np.log(s[0] / s[1]) - aspect))

    def _short(self, path: Path, start: int, shot: list[Tensor], why: str) -> Clip:
        frames = torch.stack(shot)
        points = torch.zeros(len(frames), 0, 3)
        reason = f"{why}: {len(frames)} of {self.num_frames} frames"
        return Clip(f"{path.stem}-{start:05d}", prompt_of(path), frames, points, reason)

    def _judge(self, path: Path, start: int, large: Tensor, size: tuple[int, int]) -> Clip:
        frames = Crop(frame_size(large), size).images(large)
        nothing = torch.zeros(len(frames), 0, 3)
        clip = Clip(f"{path.stem}-{start:05d}", prompt_of(path), frames, nothing)
        numbers = {"brightness": float(large.float().mean() / 255)}
        if numbers["brightness"] < self.filters.brightness:
            return replace(clip, reason="near black", numbers=numbers)
        found = corners(large[0])
        if not len(found):
            return replace(clip, reason="no key point", numbers=numbers)
        tracks = follow(large, found) if self.tracker is None else _track(self.tracker, large, found)
        numbers |= {"followed": float(tracks.followed.mean(0).max())}
        if numbers["followed"] < self.filters.followed:
            return replace(clip, reason="points are lost", numbers=numbers)
        judged = []  # the point that moves most first; a further one is dropped where it is no good
        for point in choose(tracks, self.most_points):
            movement = _movement(tracks, int(point))
            judged.append((point, movement, self._fault(movement)))
        good = [point for point, _, fault in judged if not fault]
        points = control_points(tracks, np.array(good or [judged[0][0]]))
        _, movement, fault = next((j for j in judged if not j[2]), judged[0])
        return replace(clip, points=points, reason=fault, numbers=numbers | movement)

    def _fault(self, movement: dict[str, float]) -> str:
        """Why a point with these numbers is no control point."""
        if movement["motion"] < self.filters.motion:
            return "near static"
        if movement["jerk"] > self.filters.jerk:
            return "jerky"
        return "forward and backward tracks differ" if movement["error"] > self.filters.error else ""


def _movement(tracks: PointTracks, point: int) -> dict[str, float]:
    """Of a point while it is followed, in shorter sides."""
    side, seen = min(tracks.size), tracks.followed[:, point]
    steps = np.diff(tracks.xy[seen, point] / side, axis=0)
    error = tracks.error[seen[1:], point]
    bends = np.linalg.norm(np.diff(steps, axis=0), axis=-1)
    return {
        "motion": float(np.linalg.norm(steps, axis=-1).sum()),
        "jerk": float(bends.mean()) if len(bends) else 0.0,
        "error": float(error.mean() / side) if np.isfinite(error).any() else 0.0,
    }


def _track(tracker: Tracker, frames: Tensor, points: np.ndarray) -> PointTracks:
    """Another tracker's tracks; a point that is lost once stays lost, as with Lucas-Kanade."""
    height, width = frame_size(frames)
    start = torch.from_numpy((points + 0.5) / (width, height)).float()
    queries = torch.cat([torch.zeros(len(start), 1), start], 1)[None]
    tracks = tracker.start(queries).append(frames[None].float() / 255)
    xy = tracks.positions[0].numpy() * (width, height) - 0.5
    followed = np.logical_and.accumulate(tracks.visible[0].numpy(), 0)
    error = np.full((len(frames) - 1, len(points)), np.nan, np.float32)
    return PointTracks(xy.astype(np.float32), followed, error, (height, width))


def _small(frame: Tensor) -> Tensor:
    """(3, 8, 8) in [0, 1], for telling shots apart: coarse, so that a shaken camera makes no cut."""
    return torch.nn.functional.interpolate(frame[None].float() / 255, (8, 8), mode="area")[0]
