"""Motion: does the touched object follow the drag (paper Eq. 16)?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards.registry import register_reward
from ardrag_rl.rewards.reward import Reward
from ardrag_rl.rewards.tracker import TemplateTracker, Tracker, TrackerSession, first_touches

ALPHA = (3 / 64) ** 2


@register_reward("motion")
class Motion(Reward):
    """lambda * max(0, alpha - ||c_hat - c||^2) in normalised [0, 1] coordinates, Eq. 16, averaged over points.

    c is the control's point in a frame and c_hat where a tracker, started from the control's points on frame 0 (or
    where a point is first touched), sees it. The average is over the points that are touched and that the task says
    are visible; one that the tracker loses scores 0, so that losing the object does not pay. A frame without such a
    point scores 0 and is not counted in means.

    Args:
        tracker: how points are followed; None is `TemplateTracker()`. One that sees the whole video at once has
            `causal = False`, and so has the reward then: it is paid at the end.
        alpha: the squared distance from which a point scores 0; the default is 3 px at 64.
        scale: lambda; None is 5 / alpha, which puts the reward in [0, 5].
    """

    def __init__(self, tracker: Tracker | None = None, alpha: float = ALPHA, scale: float | None = None) -> None:
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha={alpha}: expected a finite squared distance above 0.")
        self.tracker = tracker or TemplateTracker()
        self.causal = getattr(self.tracker, "causal", True)
        self.alpha, self.scale = alpha, 5 / alpha if scale is None else scale

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T) in [0, scale * alpha]."""
        return self._session(controls).append(video)

    def start(self, controls: Sequence[Control]) -> MotionSession:
        """A session for B new videos, at a constant cost per frame.

        Raises:
            ValueError: the tracker is not causal.
        """
        if not self.causal:
            raise ValueError(f"reward {self.name!r} tracks whole videos: call it once, on all frames.")
        return self._session(controls)

    def _session(self, controls: Sequence[Control]) -> MotionSession:
        return MotionSession(self, controls, self.tracker.start(first_touches(controls)))

    def counted(self, controls: Sequence[Control]) -> Tensor:
        """(B, T) bool: frames with a point that is touched and visible."""
        return stack_points(controls)[1].any(-1)


class MotionSession:
    """The motion reward along B running videos."""

    def __init__(self, reward: Motion, controls: Sequence[Control], tracker: TrackerSession, frame: int = 0) -> None:
        self._reward, self._controls, self._tracker, self._frame = reward, tuple(controls), tracker, frame

    def append(self, frames: Tensor) -> Tensor:
        """The scores (B, t) of t new frames (B, t, 3, H, W)."""
        points, scored = stack_points(self._controls)
        now = slice(self._frame, self._frame + frames.shape[1])
        if now.stop > points.shape[1]:
            raise ValueError(f"frame {now.stop - 1} has no control: the controls have {points.shape[1]} frames.")
        tracks = self._tracker.append(frames)
        self._frame = now.stop
        wanted, scored = points[:, now, :, :2], scored[:, now]
        squared = (tracks.positions - wanted).square().sum(-1)  # (B, t, K)
        hinge = self._reward.scale * (self._reward.alpha - squared).clip(min=0)
        hinge = torch.where(scored & tracks.visible, hinge, 0.0)
        return hinge.sum(-1) / scored.sum(-1).clip(min=1)

    def select(self, rows: Sequence[int]) -> MotionSession:
        """An independent session of these rows."""
        index = list(rows)
        return MotionSession(self._reward, [self._controls[i] for i in index], self._tracker.select(index), self._frame)


def motion_distance(
    video: Tensor, controls: Sequence[Control], tracker: Tracker | None = None, pixels: bool = False
) -> Tensor:
    """The mean distance between dragged and tracked points, frame by frame.

    A lost point counts with the tracker's best guess.

    Args:
        video: (B, T, 3, H, W) in [0, 1].
        controls: B of them, of at least T frames.
        tracker: None is `TemplateTracker()`.
        pixels: whether in pixels of the video instead of normalised coordinates.

    Returns:
        (B, T) float32, NaN in frames without a point that is touched and visible.
    """
    points, scored = stack_points(controls)
    length = video.shape[1]
    tracks = (tracker or TemplateTracker()).start(first_touches(controls)).append(video)
    offset = tracks.positions - points[:, :length, :, :2]
    if pixels:
        offset = offset * torch.tensor([video.shape[-1], video.shape[-2]])
    scored = scored[:, :length]
    # 0 / 0 is the NaN of a frame that is not counted
    return torch.where(scored, offset.norm(dim=-1), 0.0).sum(-1) / scored.sum(-1)


def stack_points(controls: Sequence[Control]) -> tuple[Tensor, Tensor]:
    """Points (B, T, K, 3) and what is scored (B, T, K) of B controls, padded to the most points with unscored ones."""
    lengths = {control.num_frames for control in controls}
    if len(lengths) != 1:
        raise ValueError(f"the controls of a batch have {sorted(lengths)} frames: expected one length.")
    most = max(control.points.shape[1] for control in controls)
    points = torch.zeros(len(controls), lengths.pop(), most, 3)
    scored = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for b, control in enumerate(controls):
        count = control.points.shape[1]
        points[b, :, :count], scored[b, :, :count] = control.points, control.scored
    return points, scored
