"""Media: images, videos and GIFs in and out of tensors. Every error names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class MediaError(ValueError):
    """A file is missing, unreadable or not what its name says; the message names it."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        num_frames: counted from its packets, not from what the header says.
        fps: frames per second; 0 where the file does not say.
    """

    num_frames: int
    fps: float


def read_image(path: str | Path) -> Tensor:
    """An image file as (3, H, W) float32 in [0, 1], turned upright as its EXIF data says.

    Raises:
        MediaError: the file is missing or no image.
    """
    from PIL import Image, ImageOps

    _exists(path)
    try:
        with Image.open(path) as image:
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{str(path)!r} cannot be read as an image: {error}") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def as_image(image: Any) -> Tensor:
    """A file, a PIL image, an array (H, W, 3) or a tensor (3, H, W), as (3, H, W) float32 in [0, 1].

    Integers are taken as 0 to 255.

    Raises:
        MediaError: a file cannot be read.
        TypeError: it is none of these.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Tensor):
        return image.float() if image.is_floating_point() else image.float() / 255
    if hasattr(image, "convert"):  # PIL
        image = np.array(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[-1] != 3:
        what = f"an array of shape {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise TypeError(f"the image is {what}: expected a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W).")
    return as_image(torch.from_numpy(image).permute(2, 0, 1))


def write_image(path: str | Path, image: Tensor) -> None:
    """Writes (3, H, W) in [0, 1]; the suffix chooses the format."""
    from PIL import Image

    pixels = to_uint8(image[None])[0].permute(1, 2, 0).numpy()
    try:
        Image.fromarray(pixels).save(path)
    except (OSError, ValueError) as error:
        raise MediaError(f"{str(path)!r} cannot be written as an image: {error}") from error


def video_info(path: str | Path) -> VideoInfo:
    """Rate and number of frames of a video, without decoding it.

    Raises:
        MediaError: the file is missing or holds no video.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        count = sum(packet.size > 0 for packet in container.demux(stream))
        return VideoInfo(count, float(stream.average_rate or 0))


def read_frames(path: str | Path, start: int = 0, count: int | None = None, stride: int = 1) -> Tensor:
    """Frames of a video, (T, 3, H, W) uint8: `count` of them from `start`, every `stride`-th; None for all.

    Raises:
        MediaError: the file cannot be read or has fewer frames.
    """
    if start < 0 or stride < 1 or (count is not None and count < 1):
        raise ValueError(f"start={start}, count={count}, stride={stride}: expected 0 or more, 1 or more, 1 or more.")
    frames: list[Tensor] = []
    seen = 0
    with _opened(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if seen >= start and (seen - start) % stride == 0:
                frames.append(_pixels(frame))
            seen += 1
            if len(frames) == count:
                break
    if not frames or (count is not None and len(frames) < count):
        raise MediaError(
            f"{str(path)!r} gives {len(frames)} frames: expected {count or 'at least 1'} from {start} in steps of "
            f"{stride}; it has {seen}."
        )
    return torch.stack(frames)


def frames_at(path: str | Path, fps: float) -> Iterator[Tensor]:
    """The frames of a video shown at 0, 1/fps, 2/fps, ... seconds, (3, H, W) uint8, as they are decoded.

    Times are the frames' own, so that a variable frame rate is played as it was recorded: a frame is shown until the
    next one's time.

    Raises:
        MediaError: the file cannot be read, or breaks off before its first frame.
    """
    if not fps > 0:
        raise ValueError(f"fps={fps}: expected a number above 0.")
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        shown, first, moment, due = None, 0.0, 0.0, 0  # the frame on the screen; times in moments of 1/fps
        for count, frame in enumerate(container.decode(video=0)):
            at = frame.time if frame.time is not None else count / float(stream.average_rate or fps)
            first = at if shown is None else first
            moment = (at - first) * fps + 0.01  # times are rounded to the file's clock
            while shown is not None and due + 0.02 < moment:
                yield _pixels(shown)
                due += 1
            shown = frame
        if shown is None:
            raise MediaError(f"{str(path)!r} has no frame that can be decoded.")
        if due <= moment:
            yield _pixels(shown)


def whole_rate(path: str | Path, fps: float) -> float:
    """The frame rate nearest to `fps` of which the file's is a multiple: every k-th frame, or steps would be uneven.

    Raises:
        MediaError: the file is missing or holds no video.
    """
    own = video_info(path).fps
    return own / max(1, round(own / fps)) if own else fps


def read_video(path: str | Path, start: int = 0, count: int | None = None, stride: int = 1) -> Tensor:
    """`read_frames` as float32 in [0, 1]."""
    return read_frames(path, start, count, stride).float() / 255


def write_video(path: str | Path, video: Tensor, fps: float = 8) -> None:
    """Writes (T, 3, H, W) in [0, 1] (or uint8) as H.264; an odd side loses nothing, its last line is repeated.

    Raises:
        MediaError: the file cannot be written.
    """
    import av

    frames = to_uint8(video)
    height, width = frames.shape[-2:]
    if height % 2 or width % 2:  # 4:2:0 needs even sides
        frames = torch.nn.functional.pad(frames.float(), (0, width % 2, 0, height % 2), mode="replicate").byte()
    try:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[-2:]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16"}
            for frame in frames:
                pixels = np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    except (OSError, ValueError) as error:  # av.FFmpegError is one of these
        raise MediaError(f"{str(path)!r} cannot be written as a video: {error}") from error


def write_gif(path: str | Path, video: Tensor | np.ndarray, fps: float = 8) -> None:
    """Writes an endless GIF.

    Args:
        path: where.
        video: (T, 3, H, W) in [0, 1] or uint8, or rendered frames (T, H, W, 3) uint8 as a numpy array.
        fps: frames per second; GIFs know steps of 10 ms.

    Raises:
        MediaError: the file cannot be written.
    """
    from PIL import Image

    if isinstance(video, np.ndarray):
        video = torch.from_numpy(video).permute(0, 3, 1, 2)
    frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in to_uint8(video)]
    try:
        # one palette for all frames, or still areas flicker; of rare colours too, or small things lose theirs
        pixels = np.concatenate([np.asarray(f).reshape(-1, 3) for f in frames])
        some = pixels[:: max(1, len(pixels) // 250_000)]  # a palette of millions takes a minute
        palette = Image.fromarray(some[None]).quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3)
        indexed = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
        indexed[0].save(
            path, format="GIF", save_all=True, append_images=indexed[1:], duration=max(20, round(1000 / fps)), loop=0
        )
    except OSError as error:
        raise MediaError(f"{str(path)!r} cannot be written as a GIF: {error}") from error


def to_uint8(video: Tensor) -> Tensor:
    """(T, 3, H, W) in [0, 1] -> uint8 on the CPU; uint8 stays as it is.

    Raises:
        ValueError: another shape.
    """
    if video.ndim != 4 or video.shape[1] != 3 or not video.shape[0]:
        raise ValueError(f"the video has shape {tuple(video.shape)}: expected (T, 3, H, W), T >= 1.")
    video = video.detach().cpu()
    return video if video.dtype == torch.uint8 else (video.float().clamp(0, 1) * 255).round().byte()


def _pixels(frame: Any) -> Tensor:
    """(3, H, W) uint8, turned upright as the file says: a phone films sideways and notes it."""
    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return torch.from_numpy(upright.copy()).permute(2, 0, 1)


def _exists(path: str | Path) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{str(path)!r} is not there or is no file.")


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A PyAV container with at least one video stream; what goes wrong inside names the file."""
    import av

    _exists(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{str(path)!r} holds no video.")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{str(path)!r} cannot be read as a video: {error}") from error
