"""Clips: tasks from real videos, with given tracks (Manifest) or with tracks found in them (ClipFolder)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.fit import Crop, fit
from ardrag_rl.envs.points import moving_points, tracking_size
from ardrag_rl.envs.task import Task
from ardrag_rl.media import VIDEO_SUFFIXES, MediaError, read_frames, read_image, read_video, video_info

logger = logging.getLogger(__name__)

NUM_FRAMES = 16  # of a folder's tasks where nothing else is asked
FPS = 12.0  # windows of faster clips take every k-th frame, to come near it
HELDOUT_SHARE = 8  # one of so many
KEPT = 256  # tasks in memory

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window:
    """Part of a clip: its frames start, start + stride, ..."""

    path: Path
    start: int
    stride: int

    @property
    def name(self) -> str:
        """Clip and first frame."""
        return f"{self.path.stem}/{self.start}"


class ClipFolder:
    """A task source of real clips: windows of a folder's videos, with the one or two points that move most.

    Every window of `num_frames` frames, a new one every other frame, is a task. Points are found on its first frame
    and tracked through it by pyramidal Lucas-Kanade with a forward-backward check; a point that is lost is not
    touched from then on. The prompt is the text of `clip.txt` beside `clip.mp4`, or else the file's name.

    One window in eight is held out, chosen by a hash of file name and first frame. Windows overlap, so the two splits
    show the same clips; for a strict split keep two folders.

    Args:
        folder: of videos; or one video.
        split: "train", "heldout", or "all".
        num_frames: pixel frames of a task; None for 16.
        height, width: in pixels; clips are cropped about their centre.

    Raises:
        ValueError: no clip can be used, or none is left for the split. An unusable clip among others is skipped with
            a logged warning.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", num_frames: int | None = None, height: int = 64, width: int = 64
    ) -> None:
        self.folder, self.split = Path(folder), split
        self.num_frames, self.height, self.width = num_frames or NUM_FRAMES, height, width
        files = [self.folder] if self.folder.is_file() else sorted(self.folder.iterdir())
        files = [f for f in files if f.suffix.lower() in VIDEO_SUFFIXES]
        windows: list[Window] = []
        for file in files:
            try:
                windows += self._windows(file)
            except MediaError as error:
                logger.warning("skipped a clip: %s", error)
        if not windows:
            raise ValueError(
                f"the folder {str(folder)!r} gives no task: of {len(files)} clips ({', '.join(VIDEO_SUFFIXES)}) none "
                f"is readable and at least {self.num_frames} frames long."
            )
        self.windows = split_by_hash(windows, [w.name for w in windows], split, str(folder))
        self._tasks: OrderedDict[int, Task] = OrderedDict()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"task index {index} is outside 0..{len(self) - 1}.")
        if index not in self._tasks:
            self._tasks[index] = self._make(self.windows[index])
            while len(self._tasks) > KEPT:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(index)
        return self._tasks[index]

    def video(self, index: int) -> Tensor:
        """The clip itself, (T, 3, H, W) float32 in [0, 1]."""
        w = self.windows[index]
        frames = read_frames(w.path, w.start, self.num_frames, w.stride)
        return Crop(frame_size(frames), (self.height, self.width)).images(frames).float() / 255

    def _windows(self, file: Path) -> list[Window]:
        info = video_info(file)
        read_frames(file, 0, 1)  # what cannot be decoded is known now
        if info.num_frames < self.num_frames:
            raise MediaError(f"{str(file)!r} has {info.num_frames} frames: expected at least {self.num_frames}.")
        stride = max(1, round(info.fps / FPS))
        stride = min(stride, max(1, (info.num_frames - 1) // max(1, self.num_frames - 1)))
        span = (self.num_frames - 1) * stride + 1
        return [Window(file, start, stride) for start in range(0, info.num_frames - span + 1, 2 * stride)]

    def _make(self, window: Window) -> Task:
        frames = read_frames(window.path, window.start, self.num_frames, window.stride)
        size = frame_size(frames)
        large = Crop(size, tracking_size((self.height, self.width))).images(frames)
        points = moving_points(large)
        if points.shape[1] == 0:
            logger.warning("no point to track was found in %s; the task has no control.", window.name)
        image = Crop(size, (self.height, self.width)).images(frames[:1])[0].float() / 255
        return Task(id=f"clips:{window.name}", control=Control(points, prompt_of(window.path), image))


class Manifest:
    """A task source of JSON lines, each one task:

        {"clip": "dog.mp4", "prompt": "a dog runs", "tracks": [[[x, y, intensity], ... T] per point]}

    `image` in place of `clip` gives the reference image itself; of a clip it is the frame `start` (default 0). Paths
    are relative to the manifest. x and y are fractions of width and height, an intensity left out is 1, points of
    unlike length hold their last position. One line in eight is held out, chosen by a hash of file and line; the split
    "all" has every line.

    Args:
        path: the `.jsonl` file.
        split: "train", "heldout", or "all".
        num_frames: pixel frames of a task; None for the longest line's.
        height, width: in pixels.

    Raises:
        ValueError: a line is malformed; the message has its number.
    """

    def __init__(
        self, path: str | Path, split: str = "train", num_frames: int | None = None, height: int = 64, width: int = 64
    ) -> None:
        self.path, self.split = Path(path), split
        try:
            texts = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"the manifest {str(path)!r} is no UTF-8 text: {error}") from error
        lines = [_Line.parse(self.path, number, text) for number, text in enumerate(texts, 1) if text.strip()]
        if not lines:
            raise ValueError(f"the manifest {str(path)!r} is empty: expected a JSON object per line.")
        self.lines = split_by_hash(lines, [f"{x.file.name}/{x.number}" for x in lines], split, str(path))
        self.num_frames = num_frames or max(len(x.points) for x in lines)
        self.height, self.width = height, width

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"task index {index} is outside 0..{len(self) - 1}.")
        line = self.lines[index]
        try:
            image = read_video(line.file, line.start, 1)[0] if line.clip else read_image(line.file)
        except MediaError as error:
            raise ValueError(f"{str(self.path)!r}, line {line.number}: {error}") from error
        task = Task(id=f"{self.path.stem}:{line.number}", control=Control(line.points, line.prompt, image))
        return fit(task, self.num_frames, self.height, self.width)

    def video(self, index: int) -> Tensor:
        """The clip itself, (T, 3, H, W) float32 in [0, 1].

        Raises:
            ValueError: the line has an image only, or the clip is shorter.
        """
        line = self.lines[index]
        where = f"{str(self.path)!r}, line {line.number}"
        if not line.clip:
            raise ValueError(f"{where} has an image and no clip: there is no true video of it.")
        try:
            frames = read_frames(line.file, line.start, self.num_frames)
        except MediaError as error:
            raise ValueError(f"{where}: {error}") from error
        return Crop(frame_size(frames), (self.height, self.width)).images(frames).float() / 255


_KEYS = {"clip", "image", "start", "prompt", "tracks"}


@dataclass(frozen=True)
class _Line:
    number: int
    file: Path
    clip: bool
    start: int
    prompt: str
    points: Tensor  # (T, K, 3)

    @classmethod
    def parse(cls, path: Path, number: int, text: str) -> _Line:
        where = f"{str(path)!r}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{where}: a {type(line).__name__}: expected an object.")
        if unknown := sorted(set(line) - _KEYS):
            raise ValueError(f"{where}: unknown keys {unknown}: expected some of {sorted(_KEYS)}.")
        kinds = [k for k in ("clip", "image") if k in line]
        if len(kinds) != 1 or not isinstance(line[kinds[0]], str):
            raise ValueError(f'{where}: expected one of "clip" and "image", a path; it has {sorted(line)}.')
        file = path.parent / line[kinds[0]]
        if not file.is_file():
            raise ValueError(f"{where}: the file {str(file)!r} is not there.")
        prompt, start = line.get("prompt", ""), line.get("start", 0)
        if not isinstance(prompt, str) or not isinstance(start, int) or start < 0:
            raise ValueError(f"{where}: prompt={prompt!r}, start={start!r}: expected a text and a frame number.")
        if not isinstance(line.get("tracks"), list):
            raise ValueError(f'{where}: "tracks" is missing or no list: expected [[[x, y, intensity], ...] per point].')
        try:
            points = points_of(line["tracks"])
            Control(points, prompt, torch.zeros(3, 1, 1))  # its checks, before any file is opened
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return cls(number, file, kinds[0] == "clip", start, prompt, points)


def split_by_hash(items: Sequence[Item], names: Sequence[str], split: str, where: str) -> list[Item]:
    """The items of a split, in their order: of two or more, those an eighth (at least one) of least hash are held out.

    Raises:
        ValueError: nothing is left for the split.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split {split!r} is unknown; choose one of train, heldout, all.")
    if split == "all":
        return list(items)
    ranks = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    count = max(1, len(items) // HELDOUT_SHARE) if len(items) > 1 else 0
    held = set(sorted(range(len(items)), key=lambda i: ranks[i])[:count])
    chosen = [item for i, item in enumerate(items) if (i in held) == (split == "heldout")]
    if not chosen:
        raise ValueError(f"{where!r} has {len(items)} task, too few to hold one out: give at least 2.")
    return chosen


def points_of(tracks: Sequence[Any]) -> Tensor:
    """Lists of (x, y) or (x, y, intensity), one list per point, as (T, K, 3) float32.

    An intensity left out is 1; of points of unlike length the shorter hold their last position.

    Raises:
        ValueError: a track is no such list.
    """
    paths = []
    for k, track in enumerate(tracks):
        wanted = f"point {k}: expected a list of [x, y] or of [x, y, intensity]"
        try:
            array = np.asarray([[*p, 1.0] if len(p) == 2 else list(p) for p in track], np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{wanted}: {error}") from error
        if array.ndim != 2 or array.shape[1] != 3 or not len(array):
            raise ValueError(f"{wanted}; its shape is {array.shape}.")
        paths.append(array)
    length = max((len(p) for p in paths), default=1)
    held = [p[np.minimum(np.arange(length), len(p) - 1)] for p in paths]
    return torch.from_numpy(np.stack(held, 1) if held else np.zeros((1, 0, 3))).float()


def frame_size(frames: Tensor) -> tuple[int, int]:
    """(height, width) of (..., H, W)."""
    return int(frames.shape[-2]), int(frames.shape[-1])


def prompt_of(path: Path) -> str:
    """The text of `clip.txt` beside `clip.mp4`, or else the file's name."""
    sidecar = path.with_suffix(".txt")
    if sidecar.is_file():
        return sidecar.read_text().strip()
    return path.stem.replace("-", " ").replace("_", " ")
