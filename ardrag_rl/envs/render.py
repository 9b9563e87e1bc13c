"""Drawing: a frame with its drag path on it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ardrag_rl.control import Control

READABLE = 256  # shorter side in pixels; smaller frames are enlarged
COLOURS = ((255, 64, 64), (64, 160, 255), (80, 220, 100), (255, 200, 40))  # one per point, in turn


def draw_drag(frame: Tensor, control: Control, at: int, size: int = READABLE) -> np.ndarray:
    """A frame with the drag path: solid up to pixel frame `at`, faint after; the current point is a ring.

    Args:
        frame: (3, H, W) in [0, 1].
        control: its path is drawn where it is touched.
        at: the pixel frame shown, 0..T-1.
        size: a frame whose shorter side is below it is enlarged by a whole number.

    Returns:
        (H', W', 3) uint8, RGB.
    """
    import cv2

    image = (frame.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    scale = max(1, -(-size // min(image.shape[:2])))
    if scale > 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    canvas = np.ascontiguousarray(image)
    height, width = canvas.shape[:2]
    thick = max(1, round(min(height, width) / 128))
    points = control.points.cpu().numpy()  # (T, K, 3)
    pixels = points[..., :2] * (width, height)
    touched = points[..., 2] > 0
    at = min(max(at, 0), len(points) - 1)

    def lines(canvas: np.ndarray, first: int, last: int, width: int) -> None:
        for k in range(points.shape[1]):
            for t in range(first, last):
                if touched[t, k] and touched[t + 1, k]:
                    ends = [(round(float(x)), round(float(y))) for x, y in pixels[[t, t + 1], k]]
                    cv2.line(canvas, ends[0], ends[1], COLOURS[k % len(COLOURS)], width, cv2.LINE_AA)

    faint = canvas.copy()
    lines(faint, at, len(points) - 1, thick)
    canvas = cv2.addWeighted(faint, 0.45, canvas, 0.55, 0)
    lines(canvas, 0, at, 2 * thick)
    for k in range(points.shape[1]):
        if touched[at, k]:
            x, y = (round(float(v)) for v in pixels[at, k])
            cv2.circle(canvas, (x, y), 4 * thick, (255, 255, 255), 3 * thick, cv2.LINE_AA)
            cv2.circle(canvas, (x, y), 4 * thick, COLOURS[k % len(COLOURS)], 2 * thick, cv2.LINE_AA)
    return np.asarray(canvas, np.uint8)
