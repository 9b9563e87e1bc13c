"""Tasks: task sources by name, from files, or ready made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ardrag_rl.control import Control
from ardrag_rl.envs.clips import ClipFolder, Manifest, points_of
from ardrag_rl.envs.fit import fit
from ardrag_rl.envs.sprites import LEVELS, Sprites
from ardrag_rl.envs.task import Task, TaskSource
from ardrag_rl.media import VIDEO_SUFFIXES, as_image

TaskSpec = str | Path | TaskSource | Task | Sequence[Task]

NAMES = {"sprites" if level == "gentle" else f"sprites-{level}": level for level in LEVELS}
SPLITS = ("train", "heldout", "all")

__all__ = ["TaskList", "TaskSpec", "fit", "image_task", "make_tasks"]


class TaskList:
    """A task source of given tasks.

    Args:
        tasks: at least one; `num_frames` is that of the longest.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks or not all(isinstance(task, Task) for task in tasks):
            raise ValueError(f"tasks={tasks!r}: expected at least one, all of them Task objects.")
        self.tasks = tuple(tasks)
        self.num_frames = max(task.control.num_frames for task in tasks)
        self.height, self.width = (int(s) for s in tasks[0].control.image.shape[-2:])

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]


def make_tasks(spec: TaskSpec, num_frames: int | None, height: int, width: int) -> TaskSource:
    """The task source that `spec` names.

    Args:
        spec: "sprites", "sprites-medium", "sprites-hard", a `.jsonl` manifest, a folder of clips or one clip; each with
            ":heldout" for its held-out split, files also with ":all" for both. Or a task, a list of tasks, or a task
            source, which is returned as it is.
        num_frames: pixel frames of each task; None for the source's own number.
        height, width: in pixels.

    Raises:
        ValueError: the name is unknown, or a file or folder gives no tasks; the message says what exists.
    """
    if isinstance(spec, Task):
        return TaskList([spec])
    if not isinstance(spec, (str, Path)):
        if isinstance(spec, (list, tuple)):
            return TaskList(spec)
        if isinstance(spec, TaskSource):
            return spec
        raise ValueError(f"tasks={spec!r}: expected a name, a path, a Task, a list of them, or a task source.")
    name, colon, split = str(spec).rpartition(":")
    if not colon or split not in SPLITS:
        name, split = str(spec), "train"
    if name in NAMES:
        return Sprites(NAMES[name], split, num_frames, height, width)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES):
        return ClipFolder(path, split, num_frames, height, width)
    if path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson"):
        return Manifest(path, split, num_frames, height, width)
    if path.is_file():
        raise ValueError(
            f"tasks={str(spec)!r}: a {path.suffix or 'nameless'} file is no task source; expected a .jsonl manifest or "
            "a clip. One image and a drag path make a task with image_task(image, drag, prompt)."
        )
    raise ValueError(
        f"tasks={str(spec)!r} is unknown: expected one of {', '.join(NAMES)} (also with ':heldout'), a manifest "
        "(.jsonl) or a folder of clips; no file or folder of this name exists."
    )


def image_task(
    image: Any,
    drag: str | Path | Sequence[Any],
    prompt: str = "",
    num_frames: int | None = None,
    id: str | None = None,
) -> Task:
    """One image and a drag path.

    Args:
        image: a file, a PIL image, an array (H, W, 3), or a tensor (3, H, W) in [0, 1].
        drag: a JSON file `{"points": [[[x, y] or [x, y, intensity], ...] per point], "units": "pixels" or
            "fractions"}`, or such points in fractions of width and height. Pixels are counted from 0 in the image as
            it is. An intensity left out is 1; of points of unlike length the shorter hold their last position.
        prompt: what the video shows.
        num_frames: the path, taken as drawn at constant time steps, is resampled to so many pixel frames; None keeps
            a position per frame.
        id: of the task; the file's stem by default.

    Raises:
        ValueError: a file cannot be read, or a point is malformed or outside the image.
    """
    picture = as_image(image)
    where, units = "the drag path", "fractions"
    points: Any = drag
    if isinstance(drag, (str, Path)):
        where = repr(str(drag))
        try:
            content = json.loads(Path(drag).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict) or "points" not in content:
            raise ValueError(f'{where}: expected an object with the key "points".')
        points, units = content["points"], content.get("units", "fractions")
    if units not in ("pixels", "fractions"):
        raise ValueError(f'{where}: units={units!r}: expected "pixels" or "fractions".')
    if not isinstance(points, (list, tuple)):
        raise ValueError(f"{where}: the points are a {type(points).__name__}: expected a list of tracks.")
    try:
        path = points_of(points)  # (T, K, 3)
        if units == "pixels":
            path[..., :2] = _fractions(path, picture.shape[-1], picture.shape[-2])
        path = path if num_frames is None else _resampled(path, num_frames)
        control = Control(path, prompt, picture)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    name = id or (Path(image).stem if isinstance(image, str | Path) else "image")
    return Task(id=name, control=control)


def _fractions(path: Tensor, width: int, height: int) -> Tensor:
    """Pixels, counted from 0, of (T, K, 3) as fractions of width and height, (T, K, 2)."""
    xy = path[..., :2]
    outside = (path[..., 2] > 0) & ((xy < -0.5) | (xy > torch.tensor([width, height]) - 0.5)).any(-1)
    if outside.any():
        t, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"point {k} is touched at {xy[t, k].tolist()} px, outside the image of {width} x {height} px: give a point "
            "that leaves it an intensity of 0."
        )
    return (xy + 0.5) / torch.tensor([width, height])


def _resampled(path: Tensor, num_frames: int) -> Tensor:
    """(T, K, 3) -> (num_frames, K, 3): even motion between two touched samples, else the nearest one."""
    at = torch.linspace(0, len(path) - 1, num_frames)
    before, after, nearest = path[at.floor().long()], path[at.ceil().long()], path[at.round().long()]
    between = torch.lerp(before[..., :2], after[..., :2], (at - at.floor())[:, None, None])
    both = (before[..., 2:] > 0) & (after[..., 2:] > 0)  # where a point is let go its coordinates mean nothing
    return torch.cat([torch.where(both, between, nearest[..., :2]), nearest[..., 2:]], -1)
