"""Smoothness and dynamic degree: how a video moves, whatever it shows. Watch the second when training on the first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.rewards.registry import register_reward
from ardrag_rl.rewards.reward import Reward


@register_reward("smoothness")
class Smoothness(Reward):
    """1 - mean |x[t] - (x[t-1] + x[t+1]) / 2| / 0.5 on the latest three frames, clipped to [0, 1]; causal.

    VBench's motion smoothness drops every other frame, lets an interpolation network restore it and takes one minus
    the mean absolute error. Here the interpolation is the mean of the neighbours, which needs no network and judges
    flicker and jumps: 1 is a video without change or one that fades steadily. Frames 0 and 1 have no second
    difference and score 1.
    """

    memory = 2

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T) in [0, 1]."""
        scores = torch.ones(video.shape[:2])
        if video.shape[1] > 2:
            video = video.float()
            middle = (video[:, 1:-1] - (video[:, :-2] + video[:, 2:]) / 2).abs().mean((-3, -2, -1))
            scores[:, 2:] = (1 - 2 * middle).clip(0, 1).cpu()
        return scores


@register_reward("dynamic_degree")
class DynamicDegree(Reward):
    """Mean length of the optical flow from the frame before, in fractions of the shorter side; causal.

    Flow is OpenCV's Farneback on grey frames, shrunk to a shorter side of 64 at most; pixels that move less than a
    tenth of a pixel count as still, and a frame that repeats the one before scores exactly 0, as does frame 0.
    Meant to be logged (weight 0): a policy that stops moving shows here first.
    """

    memory = 1
    side = 64
    still = 0.1  # pixels

    def __call__(self, video: Tensor, controls: Sequence[Control]) -> Tensor:
        """(B, T, 3, H, W) -> (B, T), 0 or more."""
        import cv2  # slow to import

        grey = video.detach().float().mean(2).cpu().numpy()  # (B, T, H, W)
        scale = min(1.0, self.side / min(grey.shape[2:]))
        size = (round(grey.shape[3] * scale), round(grey.shape[2] * scale))
        scores = torch.zeros(video.shape[:2])
        for b, frames in enumerate(grey):
            small = [(255 * cv2.resize(f, size, interpolation=cv2.INTER_AREA)).astype(np.uint8) for f in frames]
            for t in range(1, len(small)):
                if (small[t] == small[t - 1]).all():
                    continue
                start = np.zeros((*size[::-1], 2), np.float32)
                flow = cv2.calcOpticalFlowFarneback(small[t - 1], small[t], start, 0.5, 2, 9, 1, 5, 1.1, 0)
                length = np.linalg.norm(flow, axis=-1)
                scores[b, t] = float(np.where(length < self.still, 0, length).mean()) / min(size)
        return scores
