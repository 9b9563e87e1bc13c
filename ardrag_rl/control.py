"""Control: what a person gives the model (paper Eq. 6): drag points, a prompt, a reference image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEAT_MAP_STD = 10 / 256  # of the shorter side; the paper's 10 px at 256


@dataclass(frozen=True)
class Control:
    """The control of one video.

    Attributes:
        points: (T, K, 3) float32, (x, y, intensity) of K points in T pixel frames. x and y are fractions of width
            and height in [0, 1], pixel centres at (i + 0.5) / size. Intensity in [0, 1] is the touch force and
            0 means not touched: x and y may then be anything finite. K = 0 is no control.
        prompt: what the video shows.
        image: (3, H, W) float32 in [0, 1], the reference image.
        visible: (T, K) bool, whether the task says that the point can be seen (not behind an occluder);
            None means wherever it is touched. Motion rewards count only points that are touched and visible.

    Raises:
        ValueError: a shape is wrong, a value is not finite, an intensity or a touched point is outside [0, 1].
    """

    points: Tensor
    prompt: str
    image: Tensor
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        points, image = torch.as_tensor(self.points).float(), torch.as_tensor(self.image).float()
        if points.ndim != 3 or points.shape[-1] != 3 or points.shape[0] == 0:
            raise ValueError(f"points have shape {tuple(points.shape)}: expected (T, K, 3), (x, y, intensity), T >= 1.")
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}: expected (3, H, W).")
        if not torch.isfinite(points).all():
            raise ValueError("points hold NaN or infinity: expected finite (x, y, intensity).")
        if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
            raise ValueError("image has values outside [0, 1]: divide 8-bit images by 255.")
        intensity = points[..., 2]
        if ((intensity < 0) | (intensity > 1)).any():
            raise ValueError(f"an intensity of {_worst(intensity)} is outside [0, 1], where 0 means not touched.")
        touched = points[intensity > 0][:, :2]
        if ((touched < 0) | (touched > 1)).any():
            raise ValueError(
                f"a touched point has the coordinate {_worst(touched)}, outside [0, 1]: divide pixels by width and "
                'height (a drag file may have "units": "pixels"); a point that leaves the frame has the intensity 0.'
            )
        visible = intensity > 0 if self.visible is None else torch.as_tensor(self.visible).bool()
        if visible.shape != intensity.shape:
            raise ValueError(
                f"visible has shape {tuple(visible.shape)}: expected {tuple(intensity.shape)} like points."
            )
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "visible", visible)

    @property
    def num_frames(self) -> int:
        """T, in pixel frames."""
        return self.points.shape[0]

    @property
    def scored(self) -> Tensor:
        """(T, K) bool: touched and visible, what a motion reward counts."""
        assert self.visible is not None
        return (self.points[..., 2] > 0) & self.visible

    def heat_maps(self, height: int, width: int) -> Tensor:
        """The control drawn as a video, (T, 3, height, width) in [-1, 1].

        Gaussian spots whose peak is the intensity and whose std is 10 px at a side of 256, scaled with the
        shorter side; where spots meet the stronger counts; three equal channels; -1 is no touch.
        """
        return draw_heat_maps(self.points, height, width)


def draw_heat_maps(points: Tensor, height: int, width: int) -> Tensor:
    """Points (..., K, 3) as pictures (..., 3, height, width) in [-1, 1], as `Control.heat_maps` says."""
    std = HEAT_MAP_STD * min(height, width)
    y = torch.arange(height, dtype=torch.float32) + 0.5
    x = torch.arange(width, dtype=torch.float32) + 0.5
    px, py, intensity = points.unbind(-1)  # (..., K) each
    gx = torch.exp(-((x - (px * width)[..., None]) ** 2) / (2 * std**2))  # (..., K, W)
    gy = torch.exp(-((y - (py * height)[..., None]) ** 2) / (2 * std**2))  # (..., K, H)
    spots = intensity[..., None, None] * gy[..., :, None] * gx[..., None, :]  # (..., K, H, W)
    heat = spots.amax(-3) if spots.shape[-3] else spots.new_zeros(*spots.shape[:-3], height, width)
    return (2 * heat - 1)[..., None, :, :].expand(*heat.shape[:-2], 3, -1, -1)


def _worst(values: Tensor) -> float:
    """The value farthest from [0, 1]."""
    flat = values.flatten()
    return float(flat[((flat - 0.5).abs()).argmax()])
