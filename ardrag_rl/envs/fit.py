"""Fit: any task at an environment's resolution and number of frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.task import Task


@dataclass(frozen=True)
class Crop:
    """The largest centred part of a picture with another one's aspect.

    Attributes:
        source: (height, width) of the picture.
        target: (height, width) of the result.
    """

    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) in the source, whole pixels."""
        (h, w), (th, tw) = self.source, self.target
        scale = min(h / th, w / tw)
        height, width = min(h, max(1, round(th * scale))), min(w, max(1, round(tw * scale)))
        return (h - height) // 2, (w - width) // 2, height, width

    def images(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) float or uint8, cropped and resized (bilinear, antialiased) to the target."""
        from torchvision.transforms.v2.functional import resized_crop

        if self.source == self.target:
            return images
        return resized_crop(images, *self.box, list(self.target), antialias=True)

    def points(self, points: Tensor) -> Tensor:
        """(T, K, 3) fractions of the source to fractions of the target; a point that falls outside is not touched."""
        top, left, height, width = self.box
        h, w = self.source
        x = (points[..., 0] * w - left) / width
        y = (points[..., 1] * h - top) / height
        inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
        return torch.stack([x, y, points[..., 2] * inside], -1)


def parse_size(text: str) -> tuple[int, int]:
    """ "WIDTHxHEIGHT", as sizes are written, to (height, width).

    Raises:
        ValueError: the text is nothing of the kind.
    """
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"size {text!r}: expected WIDTHxHEIGHT, such as 480x368.")
    return int(height), int(width)


def fit(task: Task, num_frames: int, height: int, width: int) -> Task:
    """The task at another size; the same object where it fits already.

    A longer path is cut; a shorter one holds its last position, as touched as it was. The image is cropped to the
    aspect about its centre and resized; points outside the crop are not touched.

    Args:
        task: any.
        num_frames: in pixel frames.
        height, width: in pixels.
    """
    control = task.control
    size = tuple(control.image.shape[-2:])
    if control.num_frames == num_frames and size == (height, width):
        return task
    assert control.visible is not None
    hold = torch.arange(num_frames).clamp(max=control.num_frames - 1)
    crop = Crop((size[0], size[1]), (height, width))
    points = control.points[hold]
    return Task(
        id=task.id,
        control=Control(
            points=points if size == (height, width) else crop.points(points),
            prompt=control.prompt,
            image=crop.images(control.image).clamp(0, 1),
            visible=control.visible[hold],
        ),
    )
