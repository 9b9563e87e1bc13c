"""Scores: what is measured of every video by itself, and the features whose distributions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.metrics.features import Features
from ardrag_rl.metrics.frechet import Gaussian, frechet_distance
from ardrag_rl.rewards import Aesthetic, DynamicDegree, Motion, Smoothness, motion_distance


@dataclass(frozen=True)
class Scores:
    """Of n videos of T frames.

    Attributes:
        frame_features: (n, T, D); clip_features: (n, 1, D').
        aesthetic: (n,), Eq. 15, in 1 to 5.
        smoothness: (n,), in 0 to 1.
        consistency: (n,), Eq. 16, in 0 to 5; NaN for a video without a counted frame or without a known control.
        motion_error: (n,), mean distance of dragged and tracked points in pixels; NaN as above.
        dynamic_degree: (n,), mean optical flow in fractions of the shorter side.
    """

    frame_features: np.ndarray
    clip_features: np.ndarray
    aesthetic: np.ndarray
    smoothness: np.ndarray
    consistency: np.ndarray
    motion_error: np.ndarray
    dynamic_degree: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """Those of all videos, in order."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    def __len__(self) -> int:
        return len(self.aesthetic)


class Scorer:
    """Measures batches of videos.

    Args:
        frame, clip: networks of FID and of FVD.
        aesthetic: None is the embedded one.
        motion: None is Eq. 16's with the OpenCV tracker.
    """

    def __init__(
        self, frame: Features, clip: Features, aesthetic: Aesthetic | None = None, motion: Motion | None = None
    ) -> None:
        self.frame, self.clip = frame, clip
        self.aesthetic, self.motion = aesthetic or Aesthetic(), motion or Motion()
        self.smoothness, self.dynamic = Smoothness(), DynamicDegree()

    @torch.no_grad()
    def __call__(self, video: Tensor, controls: Sequence[Control] | None = None) -> Scores:
        """Of videos (B, T, 3, H, W) in [0, 1] and what dragged them."""
        nothing = np.full(len(video), np.nan)
        shown: Sequence[Control] = controls or ()
        consistency, error = nothing, nothing
        if controls is not None:
            counted = torch.stack([c.scored.any(1) for c in controls]).double()  # (B, T)
            reward = self.motion(video, controls).double()
            consistency = ((reward * counted).sum(1) / counted.sum(1)).numpy()  # 0 / 0: nothing to score
            error = motion_distance(video, controls, self.motion.tracker, pixels=True).double().nanmean(1).numpy()
        return Scores(
            self.frame(video),
            self.clip(video),
            self.aesthetic(video, shown).double().mean(1).numpy(),
            self.smoothness(video, shown).double().mean(1).numpy(),
            consistency,
            error,
            self.dynamic(video, shown).double().mean(1).numpy(),
        )


@dataclass(frozen=True)
class Distance:
    """The Frechet distance of videos to the true ones of the same tasks, a statistic of task indices.

    Attributes:
        true, made: features (n, k, D).
    """

    true: np.ndarray
    made: np.ndarray

    def __call__(self, tasks: np.ndarray) -> float:
        a, b = (Gaussian.of(x[tasks].reshape(-1, x.shape[-1])) for x in (self.true, self.made))
        return frechet_distance(a, b)


@dataclass(frozen=True)
class Mean:
    """The mean of a score over the tasks that have one.

    Attributes:
        values: (n,), NaN where there is none.
    """

    values: np.ndarray

    def __call__(self, tasks: np.ndarray) -> float:
        some = self.values[tasks]
        return float(some[np.isfinite(some)].mean()) if np.isfinite(some).any() else float("nan")
